"""An ensemble that is ready for questions: its agents, its answerers, and the form of its prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chorus.data.templates import Form
from chorus.ensemble.load import Ensemble, load_ensemble
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.prompts import PromptForm, prompt_form
from chorus.errors import InputError
from chorus.model.base import positions_of
from chorus.training.engine import DTYPES, decide_precision

BASE, MIXTURE = "base", "mixture"
UNKNOWN_LENGTH = 4096  # for a base without a maximum number of positions


@dataclass(frozen=True)
class Opened:
    """An ensemble with its answerers.

    Attributes:
        answerers: the mixture, every agent, and the base.
        positions: the most tokens of a text, prompt included.
    """

    ensemble: Ensemble
    answerers: tuple[Answerer, ...]
    form: PromptForm
    positions: int

    @property
    def names(self) -> list[str]:
        """Of the answerers: mixture, agent_0, ..., base."""
        return [answerer.name for answerer in self.answerers]

    def index_of(self, name: str) -> int:
        """The place of an answerer.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.names:
            raise InputError(f"there is no {name!r}; there is {', '.join(self.names)}")
        return self.names.index(name)

    def refuse_too_long(self, num_prompt: int, num_new: int, limit: int) -> None:
        """Raise InputError where prompt and answer may not fit into `limit` tokens."""
        if num_prompt + num_new > limit:
            room = limit - num_prompt
            remedy = f"ask for at most {room}" if room > 0 else f"shorten the prompt to {limit - 1} at most"
            raise InputError(
                f"the prompt has {num_prompt} tokens, and with {num_new} new ones the text would be longer "
                f"than {limit}; {remedy}"
            )


def open_ensemble(
    paths: Sequence[str], base: str | None, precision: str, device: str, form: Form | None
) -> Opened:
    """Load an ensemble to ask it questions.

    Args:
        paths: see `load_ensemble`.
        base: a folder or hub id in place of the one that the adapters name.
        precision: as the key `mixed_precision`.
        device: auto is a GPU where there is one.
        form: of prompts; None is the one of the run.

    Raises:
        InputError: what `load_ensemble` refuses, or a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "no" if (device, precision) == ("cpu", "auto") else decide_precision(precision)
    dtype = DTYPES[precision]
    ensemble = load_ensemble(list(paths), device=device, dtype=dtype, base=base, base_option="--model BASE")
    agents = tuple(ensemble.agents.agents)
    mixture = Answerer(MIXTURE, agents, tuple(ensemble.weights), ensemble.temperature)
    alone = [Answerer(f"agent_{agent}", (agent,)) for agent in agents]
    answerers = (mixture, *alone, Answerer(BASE, (None,)))
    limit = positions_of(ensemble.agents.config) or UNKNOWN_LENGTH
    return Opened(ensemble, answerers, prompt_form(ensemble, form), limit)
