"""Every answerer of an ensemble on tasks of lm-evaluation-harness."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from chorus.ensemble.load import Ensemble
from chorus.ensemble.next_token import Answerer
from chorus.errors import InputError, first_line
from chorus.harness.choices import choice_scores
from chorus.harness.model import AnswererLM
from chorus.harness.passes import SharedPasses

MIXTURE = "mixture"


class HarnessResults(NamedTuple):
    """By answerer: by task its metrics, and the samples that the harness has logged."""

    results: dict[str, dict[str, dict[str, Any]]]
    samples: dict[str, dict[str, list[Any]]]


def load_tasks(names: Sequence[str], include_path: Path | None) -> tuple[TaskManager, dict[str, Any]]:
    """The harness's task manager, and the tasks of these names, with their data.

    Raises:
        InputError: there is no such task, or its data cannot be had.
    """
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include_path {include_path}: no such folder; name one with task files (*.yaml)")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if not manager.match_tasks([name]):
            raise InputError(f"--tasks {name}: the harness has no such task; lm-eval ls tasks lists them")
    try:
        return manager, manager.load(list(names))["tasks"]
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        first = first_line(error)
        raise InputError(
            f"--tasks {','.join(names)}: a task cannot be loaded ({first}); without a network, name tasks "
            "whose data is on this machine"
        ) from error


def answerers_of(ensemble: Ensemble) -> list[Answerer]:
    """The base, every agent, and the mixture with its weights and temperature."""
    agents = tuple(ensemble.agents.agents)
    return [
        Answerer("base", (None,)),
        *(Answerer(f"agent_{agent}", (agent,)) for agent in agents),
        Answerer(MIXTURE, agents, ensemble.weights, ensemble.temperature),
    ]


def run_harness(
    ensemble: Ensemble,
    manager: TaskManager,
    tasks: Mapping[str, Any],
    names: Sequence[str],
    *,
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
    **how: Any,
) -> HarnessResults:
    """Evaluate the answerers one after the other; all passes are made while the first one is evaluated.

    Args:
        tasks: of `load_tasks`; the right choices are read from them.
        how: options of `lm_eval.simple_evaluate`, such as limit, num_fewshot and apply_chat_template.
    """
    answerers = answerers_of(ensemble)
    end_id = ensemble.tokenizer.eos_token_id
    assert isinstance(end_id, int)
    passes = SharedPasses(ensemble, answerers, end_id, batch_size, progress)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its log lines would repeat for every answerer
    found = HarnessResults({}, {})
    for index, answerer in enumerate(answerers):
        evaluated: Any = simple_evaluate(
            AnswererLM(passes, index), tasks=list(names), task_manager=manager, log_samples=True, **how
        )
        found.samples[answerer.name] = evaluated["samples"]
        found.results[answerer.name] = {
            name: {**_metrics(own), **_choices(tasks, evaluated["samples"], name)}
            for name, own in {**evaluated["results"], **(evaluated.get("groups") or {})}.items()
        }
    return found


def _metrics(own: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a task's entries. `acc,none` is the metric acc without a filter."""
    numbers = {key: value for key, value in own.items() if isinstance(value, (int, float))}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items() if key != "sample_len"}


def _choices(
    tasks: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]], name: str
) -> dict[str, float]:
    return choice_scores(tasks[name], samples[name]) if name in tasks and name in samples else {}
