"""The rows of an evaluation, divided between processes: to score, to calibrate on, out of distribution."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from chorus.config import Config
from chorus.config.evaluation import EvaluationSettings
from chorus.data.rows import HeldOutRow, HeldOutRows, read_held_out
from chorus.ensemble.answers import answer_text, warn_of_long_references
from chorus.progress import announced
from chorus.seeding import derive_seed

MOST_CHOICES = 32  # that eval_choices auto treats as a classification task
ROWS_OF_A_CHOICE = 5
HARDER = {"arithmetic_hard": "arithmetic_harder"}  # what ood_dataset_name auto means for a built-in data set


class EvaluationRows(NamedTuple):
    """This process's part of the rows of an evaluation: every N-th row of each kind, for N processes.

    Attributes:
        scored: held-out rows to score.
        calibration: held-out rows to fit to.
        ood: rows of the second data set.
        choices: token ids of each choice with its end token; empty where answers are generated.
        end_ids: tokens that end an answer, the end token first.
    """

    scored: list[HeldOutRow]
    calibration: list[HeldOutRow]
    ood: list[HeldOutRow]
    choices: list[list[int]]
    end_ids: list[int]
    tokenizer: PreTrainedTokenizerBase

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        return answer_text(ids, self.tokenizer, self.end_ids)

    def prompt_text(self, ids: Sequence[int]) -> str:
        """The text of a prompt, with all of its turns."""
        return answer_text(ids, self.tokenizer, ())


@announced("reading the rows of the evaluation")
def read_evaluation_rows(
    held_out: HeldOutRows, config: Config, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> EvaluationRows:
    """Divide a run's held-out rows, and read those of `ood_dataset_name`. A collective call.

    Raises:
        InputError: on every process alike: the second data set cannot be used.
    """
    ood: Sequence[HeldOutRow] = ()
    if held_out.rows and (name := ood_name(config)) is not None:
        found = read_held_out(config, name, "ood_dataset_name", config.ood_samples, tokenizer, accelerator)
        ood = found.rows
    return divided(
        held_out, ood, tokenizer, config, config.seed, accelerator.process_index, accelerator.num_processes
    )


def ood_name(config: Config) -> str | None:
    """The data set that `ood_dataset_name` means."""
    return HARDER.get(config.dataset_name) if config.ood_dataset_name == "auto" else config.ood_dataset_name


def divided(
    held_out: HeldOutRows,
    ood: Sequence[HeldOutRow],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    seed: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> EvaluationRows:
    """Held-out rows divided by the seed into calibration rows and at least one row to score."""
    rows, end_ids = held_out
    count = min(round(settings.calibration_split * len(rows)), max(len(rows) - 1, 0))
    fitted_to = set(random.Random(derive_seed(seed, "calibration")).sample(range(len(rows)), count))
    scored = [row for index, row in enumerate(rows) if index not in fitted_to]
    calibration = [row for index, row in enumerate(rows) if index in fitted_to]
    part = slice(process_index, None, num_processes)
    found = EvaluationRows(scored[part], calibration[part], list(ood)[part], [], end_ids, tokenizer)
    choices = _choices(rows, settings, found)
    if not choices:
        warn_of_long_references([row.answer for row in scored], end_ids, settings.max_new_tokens_eval)
    return found._replace(choices=choices)


def _choices(
    rows: Sequence[HeldOutRow], settings: EvaluationSettings, found: EvaluationRows
) -> list[list[int]]:
    """The distinct answers of all rows, each up to its first end token, in a fixed order; empty where answers
    are to be generated.
    """
    answers = {found.text(row.answer): row.answer for row in rows}
    is_task_of_labels = 2 <= len(answers) <= min(MOST_CHOICES, len(rows) // ROWS_OF_A_CHOICE)
    if settings.eval_choices is False or (settings.eval_choices == "auto" and not is_task_of_labels):
        return []
    return [_through_end(answers[name], found.end_ids) for name in sorted(answers)]


def _through_end(ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    return [*ids, end_ids[0]] if end is None else list(ids[: end + 1])
