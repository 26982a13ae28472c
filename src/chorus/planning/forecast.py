"""A memory forecast: the machine it is for, bytes by part, and a table of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.table import Table

from chorus.mesh import Mesh

GIB = 2**30


class Machine(NamedTuple):
    """Where a process runs: its device type, the number of processes, DeepSpeed's JSON if it is active, and
    over how many processes the agents are spread."""

    device_type: str
    num_processes: int = 1
    deepspeed: Mapping[str, Any] | None = None
    agent_size: int = 1

    @property
    def mesh(self) -> Mesh:
        """The place of the first process; the memory of all processes is the same."""
        return Mesh(self.agent_size, self.num_processes // self.agent_size)

    @property
    def base_in_shards(self) -> bool:
        return self.deepspeed is not None and self.deepspeed["zero_optimization"]["stage"] == 3


class Forecast(NamedTuple):
    """Bytes on each device. A training step peaks at `standing` + activations + the largest of loss,
    diversity and backward.

    Attributes:
        standing: held during the whole step, by name.
        activations: held for the backward pass when the last loss is computed.
        loss: in addition, while the logits of a chunk exist.
        diversity: in addition, while the agents' hidden states are compared; 0 with `lambda_sw: 0`.
        backward: in addition, in the backward pass; gradients included.
        evaluation: in addition to `standing`, while held-out rows are scored; 0 without any.
        trainable: trained numbers of all agents.
    """

    standing: dict[str, int]
    activations: int
    loss: int
    diversity: int
    backward: int
    evaluation: int
    trainable: int

    @property
    def training(self) -> int:
        return sum(self.standing.values()) + self.activations + max(self._in_turn().values())

    def _in_turn(self) -> dict[str, int]:
        """The peaks on top of the activations, in order of time."""
        return {"loss": self.loss, "diversity": self.diversity, "backward": self.backward}

    @property
    def peak(self) -> int:
        return max(self.training, sum(self.standing.values()) + self.evaluation)

    def report(self) -> dict[str, float]:
        """GiB by part, for JSON."""
        parts = {**self.standing, **{name: getattr(self, name) for name in self._fields[1:6]}}
        return {name: round(size / GIB, 3) for name, size in {**parts, "peak": self.peak}.items()}

    def table(self) -> Table:
        table = Table(title="memory forecast, for each process", title_justify="left")
        table.add_column("part")
        table.add_column("needs", justify="right")
        table.add_column("when")
        for name, size in self.standing.items():
            table.add_row(name, in_words(size), "always")
        table.add_row("activations", in_words(self.activations), "from forward to backward")
        while_what = {
            "loss": "while the loss is computed",
            "diversity": "while the agents are compared",
            "backward": "while backward runs, gradients included",
        }
        for name, size in self._in_turn().items():
            is_peak = size == max(self._in_turn().values()) and self.training == self.peak
            what = while_what[name] + ("" if is_peak else " (not at the peak)")
            table.add_row(name, in_words(size), what)
        if self.evaluation:
            beside = "in place of the four above" + (
                "" if self.peak > self.training else " (not at the peak)"
            )
            table.add_row("evaluation", in_words(self.evaluation), beside)
        table.add_section()
        table.add_row("peak", in_words(self.peak), "")
        return table


def in_words(size: int) -> str:
    """A number of bytes for people: `9.31 GiB`, or `5.0 MiB` where it is little."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
