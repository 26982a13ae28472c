"""How well the base, each agent and their mixtures answer held-out problems, and how well calibrated they
are.

Held-out rows are divided into calibration rows, to which weights and temperatures are fitted, and rows that
are scored. Neither is trained on. Every process answers its part of them, and all get the result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from chorus.config.evaluation import EvaluationSettings
from chorus.data.rows import HeldOutRow
from chorus.ensemble.answers import answer_to
from chorus.ensemble.calibration import Calibrated, calibrate, fit_weights
from chorus.ensemble.distributions import Chunks, choice_chunks, token_chunks
from chorus.ensemble.evaluation_rows import EvaluationRows
from chorus.ensemble.lanes import Member
from chorus.ensemble.metrics import Interval
from chorus.ensemble.mixture import Mixture
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.outcomes import Outcome, Outcomes, choice_outcomes, text_outcomes
from chorus.ensemble.scores import (
    Scores,
    ensemble_scores,
    intervals_of,
    scores_of,
    uncertainties,
    uncertainty,
)
from chorus.model.agents import Agents

UNIFORM, FITTED, CALIBRATED = "uniform", "fitted", "calibrated"


@dataclass
class Evaluation:
    """The scores of every answerer under `base`, `agent_0`, ..., `uniform` and, with fitted weights,
    `fitted`; and of each at its own temperature under the same name with `/calibrated` behind it.

    Attributes:
        mixture: the fitted weights and temperature; None where only the base was scored.
        intervals: 95 % intervals of scores; `differences`: of their differences to those of the chosen
        mixture.
        problems: one object a problem, for JSON; those of the second data set come last.
    """

    num_problems: int = 0
    num_calibration: int = 0
    num_ood: int = 0
    is_choice: bool = False
    mixture: Mixture | None = None
    temperatures: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    differences: dict[str, dict[str, Interval]] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)

    @property
    def chosen(self) -> str:
        """The name of the mixture that ensemble.json holds."""
        return FITTED if FITTED in self.scores else UNIFORM

    def flat(self) -> dict[str, float]:
        """Every score under one name, such as `uniform/calibrated/cal/ECE`."""
        return {f"{name}/{score}": value for name, own in self.scores.items() for score, value in own.items()}

    def report(self) -> dict[str, Any]:
        """All but the problems, for JSON; empty where there was no problem to score."""
        if not self.num_problems:
            return {}
        return {
            "num_problems": self.num_problems,
            "num_calibration": self.num_calibration,
            "num_ood": self.num_ood,
            "task": "choice" if self.is_choice else "text",
            "mixture": self.mixture and self.mixture.to_json(),
            "temperatures": self.temperatures,
            "scores": _without_nan(self.scores),
            "intervals": self.intervals,
            "differences": self.differences,
        }

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> "Evaluation":
        """The evaluation in a report, without the problems."""
        if not report:
            return cls()
        scores = {
            name: {score: float("nan") if value is None else value for score, value in own.items()}
            for name, own in report["scores"].items()
        }
        counts = {key: report[key] for key in ("num_problems", "num_calibration", "num_ood", "temperatures")}
        intervals, differences = (
            {name: {score: Interval(*bounds) for score, bounds in own.items()} for name, own in given.items()}
            for given in (report.get("intervals", {}), report.get("differences", {}))
        )
        is_choice = report["task"] == "choice"
        return cls(**counts, is_choice=is_choice, scores=scores, intervals=intervals, differences=differences)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and value != value else value


def evaluate(
    agents: Agents,
    rows: EvaluationRows,
    settings: EvaluationSettings,
    seed: int,
    *,
    alpha: float | None = None,
    with_base: bool = True,
    with_agents: bool = True,
    progress: Callable[[str, int], None] = lambda task, count: None,
    pause: Callable[[bool], bool] = lambda is_working: False,
) -> Evaluation:
    """Score every answerer; a collective call, with the same result on every process.

    Args:
        alpha: None mixes the agents evenly; a number also fits a mixture, see `mixture.dirichlet_weights`.
        with_agents: False scores the base alone.
        progress: called with what has been done, and for how many problems.
        pause: called with True after every forward pass and every few generated tokens. A process that has
            finished its part calls it with False until it returns False: then all have finished, and results
            are exchanged. It may raise on every process alike, which ends the evaluation: see
            `training.signals.StopRequest.pause`.
    """
    counts = [sum(column) for column in zip(*gather_object([list(map(len, rows[:3]))]), strict=True)]
    members: list[Member] = [*([None] if with_base else []), *(agents.agents if with_agents else [])]
    if not counts[0] or not members:
        return Evaluation()
    with _answering(agents):
        answerers = [Answerer("base" if one is None else f"agent_{one}", (one,)) for one in members]
        after_pass = partial(pause, True)
        chunks = _calibration_chunks(agents, members, rows, after_pass)
        _wait_for_others(pause)
        if with_agents:
            answerers += _mixtures(agents, chunks, members, settings, alpha)
        calibrated = calibrate(chunks, members, answerers)
        progress("calibrated", len(rows.calibration))

        asked = (agents, members, calibrated, rows, settings, after_pass)
        scored = _outcomes(*asked, rows.scored, partial(progress, "scored"), with_references=True)
        ood = _outcomes(*asked, rows.ood, partial(progress, "out of distribution"), with_references=False)
        _wait_for_others(pause)
    names = [name for answerer in answerers for name in (answerer.name, f"{answerer.name}/{CALIBRATED}")]
    of_all = dict(zip(names, _joined(scored), strict=True))
    ood_of_all = dict(zip(names, _joined(ood), strict=True))
    asked, asked_ood = _asked(rows.scored, rows), _asked(rows.ood, rows)
    references = [reference for _, reference in asked]
    found = _scored(answerers, of_all, ood_of_all, references, bool(rows.choices))
    found.num_problems, found.num_calibration, found.num_ood = counts
    found.temperatures = dict(zip([one.name for one in answerers], calibrated.temperatures, strict=True))
    found.intervals = intervals_of(of_all, seed, None, found.is_choice)
    if with_agents:
        chosen = next(one for one in answerers if one.name == found.chosen)
        found.mixture = Mixture(chosen.weights, found.temperatures[chosen.name])
        found.differences = intervals_of(of_all, seed, chosen.name, found.is_choice)
    mixtures = {one.name for one in answerers if len(one.members) > 1}
    found.problems = _problems(asked, of_all, mixtures) + _problems(
        asked_ood, ood_of_all, mixtures, is_ood=True
    )
    return found


def _outcomes(
    agents: Agents,
    members: Sequence[Member],
    calibrated: Calibrated,
    rows: EvaluationRows,
    settings: EvaluationSettings,
    after_pass: Callable[[], object],
    own: list[HeldOutRow],
    advance: Callable[[int], None],
    with_references: bool,
) -> Outcomes:
    """The outcomes of every answerer on this process's rows: choices, or generated texts."""
    if rows.choices:
        found = choice_outcomes(agents, members, calibrated, own, rows.choices, rows.text, after_pass)
        advance(len(own))
        return found
    return text_outcomes(
        *(agents, calibrated, own, rows.text),
        end_ids=rows.end_ids,
        max_new_tokens=settings.max_new_tokens_eval,
        prompts_at_a_time=settings.eval_batch_size,
        with_references=with_references,
        advance=advance,
        after_pass=after_pass,
    )


def _wait_for_others(pause: Callable[[bool], bool]) -> None:
    while pause(False):
        pass


@contextmanager
def _answering(agents: Agents) -> Iterator[None]:
    """Evaluation mode, and back."""
    was_training = agents.training
    agents.eval()
    try:
        yield
    finally:
        agents.train(was_training)


def _calibration_chunks(
    agents: Agents, members: Sequence[Member], rows: EvaluationRows, after_pass: Callable[[], object]
) -> Chunks:
    if not rows.choices:
        return token_chunks(agents, members, [row.sample for row in rows.calibration], after_pass)
    names = [rows.text(choice) for choice in rows.choices]
    targets = [names.index(rows.text(row.answer)) for row in rows.calibration]
    prompts = [row.prompt for row in rows.calibration]
    return choice_chunks(agents, members, prompts, rows.choices, targets, after_pass)


def mixture_names(alpha: float | None) -> list[str]:
    """The names of the mixtures that `evaluate` scores."""
    return [UNIFORM] if alpha is None else [UNIFORM, FITTED]


def _mixtures(
    agents: Agents,
    chunks: Chunks,
    members: Sequence[Member],
    settings: EvaluationSettings,
    alpha: float | None,
) -> list[Answerer]:
    own = tuple(agents.agents)
    mixtures = [Answerer(UNIFORM, own, Mixture.uniform(len(own)).weights)]
    if alpha is not None:
        mixtures.append(
            Answerer(FITTED, own, fit_weights(chunks, members, alpha, settings.mixture_observations))
        )
    return mixtures


def _joined(own: Outcomes) -> list[list[Outcome]]:
    """Of every answerer at each temperature: the outcomes of all processes, in the order of the problems."""
    flat = [problems for of_answerer in own for problems in of_answerer]
    parts = gather_object([flat])
    return [_interleaved([part[index] for part in parts]) for index in range(len(flat))]


def _asked(own: Sequence[HeldOutRow], rows: EvaluationRows) -> list[tuple[str, str]]:
    """Prompts and references of all processes, in the order of the problems."""
    texts = [(rows.prompt_text(row.prompt), rows.text(row.answer)) for row in own]
    return _interleaved(gather_object([texts]))


def _interleaved(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Undo the distribution over processes, where each got every `len(parts)`-th item."""
    return [
        parts[process][index]
        for index in range(max(map(len, parts), default=0))
        for process in range(len(parts))
        if index < len(parts[process])
    ]


def _scored(
    answerers: Sequence[Answerer],
    of_all: Mapping[str, list[Outcome]],
    ood_of_all: Mapping[str, list[Outcome]],
    references: Sequence[str],
    is_choice: bool,
) -> Evaluation:
    found = Evaluation(is_choice=is_choice)
    key = "cls/NLL" if is_choice else "token/NLL"
    for answerer in answerers:
        is_mixture = len(answerer.members) > 1
        for name in (answerer.name, f"{answerer.name}/{CALIBRATED}"):
            own = scores_of(of_all[name], ood_of_all[name], is_choice=is_choice, is_mixture=is_mixture)
            if is_mixture:
                agents = [name.replace(answerer.name, f"agent_{member}") for member in answerer.members]
                answers = [_compared(of_all[agent], references) for agent in agents]
                members = [found.scores[agent] for agent in agents]
                own |= ensemble_scores(own, members, answerer.weights, answers, key)
            found.scores[name] = own
    return found


def _compared(outcomes: Sequence[Outcome], references: Sequence[str]) -> list[str]:
    """The answers in the form in which members are compared: the results where the references mark one."""
    pairs = zip(outcomes, references, strict=True)
    return [answer_to(reference, one.answer) or "" for one, reference in pairs]


def _problems(
    asked: Sequence[tuple[str, str]],
    of_all: Mapping[str, list[Outcome]],
    mixtures: set[str],
    is_ood: bool = False,
) -> list[dict[str, Any]]:
    """One object for each problem: prompt, reference, and every answerer's answer."""
    return [
        {
            "prompt": prompt,
            "reference": reference,
            "ood": is_ood,
            "answers": {
                name: _described(own[n], name.split("/")[0] in mixtures, is_ood)
                for name, own in of_all.items()
            },
        }
        for n, (prompt, reference) in enumerate(asked)
    ]


def _described(outcome: Outcome, is_mixture: bool, is_ood: bool) -> dict[str, Any]:
    described = {
        "text": outcome.answer,
        "right": outcome.is_right,
        "probability": outcome.probability,
        "reference_nll": None if is_ood else -float(outcome.log_prob_T.double().sum()),
        "uncertainty": {name: uncertainty(outcome, name) for name in uncertainties(is_mixture)},
    }
    if outcome.tokens is not None:
        described["tokens"] = {
            "text": outcome.tokens.texts,
            "probability": _rounded(outcome.tokens.log_prob_T.exp()),
            "entropy": _rounded(outcome.tokens.entropy_T),
            "mutual_information": _rounded(outcome.tokens.mutual_information_T),
        }
    return described


def _rounded(value_T: Tensor) -> list[float]:
    """To five digits: a file has thousands of them, and people look at the first two."""
    return [float(f"{value:.5g}") for value in value_T.tolist()]
