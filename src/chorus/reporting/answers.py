"""Twenty answers to look at: the mixture's tokens, coloured by how much the agents disagree on each."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from chorus.ensemble.tables import label_of
from chorus.reporting.answer_pictures import NAMES, answers_compared
from chorus.reporting.sources import Row, RunRecord

SHOWN = 20
LONGEST_PROMPT = 600  # characters of a prompt; only the end of a longer one is shown


class ShownToken(NamedTuple):
    """One token: its text (empty for the end token), colour intensity from 0 to 1, and statistics."""

    text: str
    strength: float
    figures: str


class ShownAnswer(NamedTuple):
    """One problem with the mixture's answer.

    Attributes:
        kind: right, wrong, or out of distribution.
        tokens: of the answer; empty where only `text` is known.
        figures: probability and uncertainties, in words.
        agents: label, answer, and whether it differs from the mixture's.
    """

    prompt: str
    reference: str
    kind: str
    text: str
    tokens: list[ShownToken]
    figures: str
    agents: list[tuple[str, str, bool]]


def shown_answers(run: RunRecord) -> list[ShownAnswer]:
    """The ten answers on which the agents disagree most, and ten spread evenly over the others."""
    mixture = run.mixture
    if not mixture:
        return []
    ordered = sorted(run.problems, key=lambda one: -_disagreement(one, mixture))
    first, others = ordered[: SHOWN // 2], ordered[SHOWN // 2 :]
    count = min(len(others), SHOWN - len(first))
    spread = [others[n * (len(others) - 1) // max(count - 1, 1)] for n in range(count)]
    return [_shown(one, mixture, run.agents) for one in [*first, *spread]]


def _disagreement(problem: Row, mixture: str) -> float:
    return problem["answers"][mixture]["uncertainty"]["mutual_information"]


def _shown(problem: Row, mixture: str, agents: Sequence[str]) -> ShownAnswer:
    own = problem["answers"][mixture]
    kind = "right" if own["right"] else "wrong"
    answer, *others = answers_compared(problem, [mixture, *agents])
    of_agents = [
        (label_of(name), problem["answers"][name]["text"].strip(), other != answer)
        for name, other in zip(agents, others, strict=True)
    ]
    figures = ", ".join(f"{NAMES[name]} {value:.3f}" for name, value in own["uncertainty"].items())
    prompt = problem["prompt"].strip()
    return ShownAnswer(
        prompt if len(prompt) <= LONGEST_PROMPT else f"... {prompt[-LONGEST_PROMPT:]}",
        problem["reference"].strip(),
        f"{kind}, out of distribution" if problem.get("ood") else kind,
        own["text"].strip(),
        _tokens(own.get("tokens"), len(agents)),
        figures,
        of_agents,
    )


def _tokens(columns: Row | None, num_agents: int) -> list[ShownToken]:
    """Coloured by sqrt(mutual information / log K), log K the maximum, so that small values are visible."""
    if not columns:
        return []
    most = math.log(max(num_agents, 2))
    texts = [columns["text"][0].lstrip(), *columns["text"][1:]]
    rows = zip(
        texts, *(columns[key] for key in ("probability", "mutual_information", "entropy")), strict=True
    )
    return [
        ShownToken(
            text,
            round(min(1.0, max(0.0, information / most)) ** 0.5, 3),
            f"probability {probability:.3f}, mutual information {information:.3f} of at most {most:.2f} "
            f"nats, entropy {entropy:.3f} nats",
        )
        for text, probability, information, entropy in rows
    ]
