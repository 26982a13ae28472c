"""What a run will do: its sizes, its steps, and one training row with its loss mask."""

from typing import Any, NamedTuple

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from chorus.config import RunConfig
from chorus.data.order import steps_per_epoch
from chorus.data.samples import Samples
from chorus.planning.forecast import Machine
from chorus.planning.traffic import Traffic, traffic
from chorus.training.engine import DTYPES


class Plan(NamedTuple):
    """The sizes of a run."""

    agents: int
    rank: int
    trainable: int
    base_parameters: int
    num_processes: int
    agent_size: int
    sent: Traffic
    rows: int
    longest_row: int
    rows_of_a_step: int
    steps_of_an_epoch: int
    steps: int
    checkpoint_bytes: int
    checkpoints: int

    def describe(self, config: RunConfig) -> list[tuple[str, str]]:
        epochs = self.steps / self.steps_of_an_epoch
        split = f"batch_size {config.batch_size} x accumulation {config.gradient_accumulation_steps}"
        megabytes = self.checkpoint_bytes / 1e6
        spread = f" / agent_parallel_size {self.agent_size}" if self.agent_size > 1 else ""
        return [
            ("agents", f"{self.agents}, {config.parallel_mode}, rank {self.rank}"),
            ("base", f"{config.model_name}, {self.base_parameters:,} parameters, frozen"),
            ("trainable", f"{self.trainable:,} parameters, {self.trainable // self.agents:,} an agent"),
            ("rows", f"{self.rows:,} to train on, the longest of {self.longest_row} tokens"),
            (
                "a step",
                f"{self.rows_of_a_step} rows = {split} x processes {self.num_processes}{spread}; "
                f"{_who_sees_them(config)}",
            ),
            *([] if self.num_processes == 1 else [("processes", self._holders()), ("sent", self._sent())]),
            ("steps", f"{self.steps:,} ({self.steps_of_an_epoch:,} an epoch, {epochs:.2f} epochs)"),
            ("disk", f"{megabytes:,.1f} MB a checkpoint, at most {self.checkpoints} at a time"),
        ]

    def _holders(self) -> str:
        """Which processes hold which agents."""
        held, data_size = self.agents // self.agent_size, self.num_processes // self.agent_size
        if self.agent_size == 1:
            return f"each of {self.num_processes} holds all agents"
        return "; ".join(
            f"{_span(index * data_size, data_size)}: agents {_span(index * held, held)}"
            for index in range(self.agent_size)
        )

    def _sent(self) -> str:
        """What each process sends in a step."""
        parts = {
            "gradients": self.sent.gradients,
            "weights": self.sent.weights,
            "projections": self.sent.points + self.sent.sorted_points,
        }
        told = ", ".join(f"{size / 1e6:,.2f} MB {name}" for name, size in parts.items() if size)
        return f"{told or 'nothing but norms'}, by each process in a step"

    def table(self, config: RunConfig) -> Table:
        table = Table(title="plan", title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in self.describe(config):
            table.add_row(name, text)
        return table


def _who_sees_them(config: RunConfig) -> str:
    """How the agents share the rows of a step, in words."""
    seen = "every agent has its own" if config.per_agent_batches else "every agent sees all"
    return seen if config.bootstrap == "none" else f"{seen}, weighted (bootstrap {config.bootstrap})"


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first} to {first + count - 1}"


def plan(
    config: RunConfig,
    samples: Samples,
    trainable: int,
    base_parameters: int,
    machine: Machine,
    precision: str = "no",
) -> Plan:
    """The arithmetic of a run over these rows."""
    data_size = machine.mesh.data_size
    rows_of_a_step = config.batch_size * config.gradient_accumulation_steps * data_size
    of_an_epoch = steps_per_epoch(
        len(samples), config.batch_size, config.gradient_accumulation_steps, data_size
    )
    steps = config.epochs * of_an_epoch if config.max_train_steps is None else config.max_train_steps
    saves = -(-steps // config.save_steps) if config.save_steps else 1
    kept = saves if config.save_total_limit is None else min(saves, config.save_total_limit)
    return Plan(
        agents=config.num_agents,
        rank=config.lora_rank,
        trainable=trainable,
        base_parameters=base_parameters,
        num_processes=machine.num_processes,
        agent_size=machine.agent_size,
        sent=sent_in_a_step(config, trainable // config.num_agents, machine, precision),
        rows=len(samples),
        longest_row=min(int(samples.lengths.max()), config.max_seq_length),
        rows_of_a_step=rows_of_a_step,
        steps_of_an_epoch=of_an_epoch,
        steps=steps,
        checkpoint_bytes=12 * trainable + 10**6,  # weights and two moments in fp32, and the JSON files
        checkpoints=kept + 1,  # the oldest is deleted after the newest is complete
    )


def sent_in_a_step(config: RunConfig, adapter: int, machine: Machine, precision: str) -> Traffic:
    """What each process sends in a step of this configuration.

    Args:
        adapter: trained numbers of one agent.
    """
    points = config.swd_points_per_row if config.swd_representation == "tokens" else 1
    return traffic(
        machine.mesh,
        agents=config.num_agents,
        adapter=adapter,
        zero_stage=0 if machine.deepspeed is None else machine.deepspeed["zero_optimization"]["stage"],
        itemsize=DTYPES[precision].itemsize,
        micro_batches=config.gradient_accumulation_steps,
        points=config.batch_size * points if config.lambda_sw > 0 else 0,
        projections=config.swd_num_projections,
    )


def sample_tokens(samples: Samples, index: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Each token of a sample with its id, whether loss is due on it, and whether it should be but is not.

    Nothing predicts the first token.
    """
    sample = samples[index]
    texts = [tokenizer.decode([token]) for token in sample.ids.tolist()]
    targets = [False, *sample.is_target[1:].tolist()]
    tokens = zip(sample.ids.tolist(), texts, targets, samples.is_merged(index), strict=True)
    return [
        {"id": one, "text": text, "loss": loss, "unlearnt": unlearnt} for one, text, loss, unlearnt in tokens
    ]
