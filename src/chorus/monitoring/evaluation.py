"""The scores of a run before, during and after training, the best step so far, and early stopping."""

import logging
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

from accelerate.utils import gather_object

from chorus.checkpoint.resume import has_stopped_early
from chorus.checkpoint.state_file import BestStep, StateFile
from chorus.config import RunConfig
from chorus.config.evaluation import EvaluationSettings
from chorus.ensemble.evaluate import CALIBRATED, Evaluation, evaluate, mixture_names
from chorus.ensemble.evaluation_rows import EvaluationRows
from chorus.ensemble.scores import is_lower_better, score_names
from chorus.errors import InputError, Preempted
from chorus.monitoring.run_log import RunLog
from chorus.spans import span
from chorus.training.engine import Engine
from chorus.training.signals import StopRequest, stopped_after
from chorus.training.step import StepDone

logger = logging.getLogger(__name__)


def check_evaluation(config: RunConfig) -> None:
    """Refuse incompatible keys, before anything is loaded.

    Raises:
        InputError: a best step is asked for without a metric, or by a metric that does not exist.
    """
    metric = config.metric_for_best_model
    if metric is None:
        for key in ("early_stopping_patience", "load_best_model_at_end"):
            if getattr(config, key):
                raise InputError(f"key '{key}': no score says which step is best; set metric_for_best_model")
        return
    for key in ("eval_steps", "eval_samples"):
        if getattr(config, key) == 0:
            raise InputError(
                f"key 'metric_for_best_model': nothing is scored while training, as {key} is 0; set it"
            )
    mixtures = mixture_names(config.dirichlet_alpha_aggregator)
    answerers = [*mixtures, *(f"agent_{agent}" for agent in range(config.num_agents))]
    known = [
        f"{answerer}{more}/{score}"
        for answerer in answerers
        for more in ("", f"/{CALIBRATED}")
        for score in score_names(answerer in mixtures)
    ]
    if metric not in known:
        _refuse(metric, known)


def _refuse(metric: str, known: Iterable[str]) -> NoReturn:
    nearest = get_close_matches(metric, known, n=1, cutoff=0)[0]
    raise InputError(f"key 'metric_for_best_model': {metric!r} is not scored; did you mean {nearest!r}?")


class RunEvaluation:
    """Scores every `eval_steps` steps, and remembers the best step by `metric_for_best_model`.

    Attributes:
        initial: scores before the first step; empty where they were not asked for.
        best: the best step so far; None before the first comparison.
        stopped_early: early stopping has ended training.
        is_due: a signal interrupted the evaluation of the last step.
    """

    def __init__(self, engine: Engine, rows: EvaluationRows, config: RunConfig, run_log: RunLog) -> None:
        self.engine, self.rows, self.config, self.run_log = engine, rows, config, run_log
        self.initial = Evaluation()
        self.best: BestStep | None = None
        self.stopped_early = self.is_due = False

    def entries(self) -> dict[str, Any]:
        """The entries of `state.json` about evaluation."""
        best = None if self.best is None else self.best.model_dump()
        initial = {"asked": self._asked(), "report": self.initial.report()}
        ends = {"stopped_early": self.stopped_early, "evaluation_due": self.is_due}
        return {"best": best, "initial_scores": initial, **ends}

    def _asked(self) -> dict[str, Any]:
        """The keys on which the initial scores depend."""
        return self.config.model_dump(include=set(EvaluationSettings.model_fields) | {"dataset_name", "seed"})

    def start(self, saved: StateFile | None) -> None:
        """Score the initial adapters, unless a checkpoint holds their scores for the same evaluation.
        Collective.

        Adapters that add nothing are the base: it alone is scored.

        Args:
            saved: `state.json` of the checkpoint; None at a fresh start.
        """
        known = None if saved is None else saved.initial_scores
        self.best = None if saved is None else saved.best
        self.stopped_early = has_stopped_early(saved, self.config)
        if known is not None and known.asked == self._asked():
            self.initial = Evaluation.from_report(known.report)
        elif self.config.eval_on_start:
            adapters = self.engine.agents.adapter_tensors()
            own = any(bool(tensor.any()) for identity, tensor in adapters.items() if identity.matrix == "B")
            with_agents = any(gather_object([own]))  # the agents of other processes may differ
            self.initial = self._evaluate(with_base=True, with_agents=with_agents)
            if self.initial.num_problems:
                self.run_log.scores(0, self.initial.flat())

    def make_up(self, saved: StateFile | None) -> None:
        """Repeat the evaluation that a signal interrupted, after a resume. A collective call."""
        if saved is not None and saved.evaluation_due and self.config.eval_steps:
            self._score(saved.step, saved.num_steps)

    def after_step(self, step: StepDone, stop: StopRequest) -> None:
        """Score if it is due; request a checkpoint of a best step, and the end of training on early stopping.

        A signal to any process ends the evaluation between two batches, and training with it: the step is
        saved, and the resumed run scores it first.
        """
        metric = self.config.metric_for_best_model
        is_last = step.number == step.num_steps
        if (
            not self.config.eval_steps
            or not step.is_due(self.config.eval_steps)
            or (is_last and metric is None)
        ):
            return
        if step.error is not None:  # the signal came before the evaluation
            self.is_due = True
            return
        try:
            self._score(step.number, step.num_steps, stop.pause)
        except Preempted:
            self.is_due = True
            step.end(stopped_after(step, " and before its evaluation"))
            return
        step.must_save |= self.best is not None and self.best.step == step.number
        if self.stopped_early:
            step.end()

    def _score(
        self, step: int, num_steps: int, pause: Callable[[bool], bool] = lambda is_working: False
    ) -> None:
        """Score the agents as they are, and compare the step with the best one."""
        metric = self.config.metric_for_best_model
        found = self._evaluate(with_base=False, pause=pause)
        self.run_log.scores(step, found.flat())
        if metric is not None and found.num_problems:
            self._compare(step, step == num_steps, metric, found.flat())

    def _compare(self, step: int, is_last: bool, metric: str, scores: Mapping[str, float]) -> None:
        if metric not in scores:
            _refuse(metric, scores)  # in a task of choices there are no scores of tokens
        value, best = scores[metric], self.best
        sign = -1 if is_lower_better(metric) else 1
        if best is None or best.metric != metric or not sign * value <= sign * best.value:
            self.best = BestStep(step=step, metric=metric, value=value)
            return
        self.best = best.model_copy(update={"scorings_since": best.scorings_since + 1})
        is_over = 0 < self.config.early_stopping_patience <= self.best.scorings_since
        if is_over and not is_last:
            self.stopped_early = True
            logger.info(
                "stopping after step %d: %s was best after step %d (%.4g)",
                *(step, metric, best.step, best.value),
            )

    def final(self, num_steps: int) -> Evaluation:
        """Scores of the agents as they are now, and of the base. A collective call."""
        found = self._evaluate(with_base="base" not in self.initial.scores)
        of_base = {name: own for name, own in self.initial.scores.items() if name.split("/")[0] == "base"}
        found.scores = of_base | found.scores
        # Otherwise metrics.jsonl already has the row of this step.
        if found.num_problems and self.config.metric_for_best_model is None:
            self.run_log.scores(num_steps, found.flat())
        if found.num_problems:
            self.run_log.problems(found.problems)
        return found

    def _evaluate(
        self,
        *,
        with_base: bool,
        with_agents: bool = True,
        pause: Callable[[bool], bool] = lambda is_working: False,
    ) -> Evaluation:
        who = "the base" if not with_agents else f"{self.config.num_agents} agents and their mixture"
        logger.info("scoring %s on held-out problems", who)
        own = sum(map(len, self.rows[:3]))
        with span("evaluation"), self.engine.unsharded(), self.run_log.scoring(own) as progress:
            try:
                return evaluate(
                    self.engine.agents,
                    self.rows,
                    self.config,
                    self.config.seed,
                    alpha=self.config.dirichlet_alpha_aggregator,
                    with_base=with_base,
                    with_agents=with_agents,
                    progress=progress,
                    pause=pause,
                )
            except Preempted as error:  # on every process: leaving the context is a collective call
                preempted = error
        raise preempted
