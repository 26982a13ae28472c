"""Which held-out rows are scored, which are fitted to, and which process answers which."""

from typing import Any

import pytest
from rows import held_out_of
from stock_answers import BASE, PROMPTS, held_out
from transformers import PreTrainedTokenizerBase

from chorus.config import Config
from chorus.data.templates import Problem
from chorus.ensemble.evaluation_rows import EvaluationRows, divided, ood_name
from chorus.model.base import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [Problem(prompt, f" {number} apples") for number, prompt in enumerate(PROMPTS)]


def settings(**keys: Any) -> Config:
    return Config(**{"calibration_split": 0.0, "eval_choices": False, **keys})


def test_rows_to_fit_to_are_a_choice_by_the_seed_that_no_score_has_seen(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    whole = held_out(problems * 4, tokenizer)

    def shares(seed: int, split: float) -> EvaluationRows:
        return divided(whole, [], tokenizer, settings(calibration_split=split), seed)

    one = shares(0, 0.3)
    assert len(one.calibration) == 6
    assert sorted(map(id, one.scored + one.calibration)) == sorted(map(id, whole.rows))
    assert list(map(id, one.calibration)) == list(map(id, shares(0, 0.3).calibration))
    assert list(map(id, one.calibration)) != list(map(id, shares(1, 0.3).calibration))
    assert len(shares(0, 0.99).scored) == 1


def test_few_answers_to_many_rows_are_choices(problems: list[Problem], tokenizer: PreTrainedTokenizerBase):
    def choices(count: int, **keys: Any) -> int:
        rows = held_out([Problem(f"row {n}:", f" label {n % count}") for n in range(20)], tokenizer)
        return len(divided(rows, [], tokenizer, settings(**keys), 0).choices)

    assert choices(4, eval_choices="auto") == 4
    assert choices(5, eval_choices="auto") == choices(1, eval_choices="auto") == 0
    assert choices(20, eval_choices=True) == 20
    assert choices(4, eval_choices=False) == 0


@pytest.mark.parametrize("end", ["", "<eos>", "<eos>\n"])
@pytest.mark.parametrize("space", [("A:", " "), ("A: ", "")])
def test_choices_are_the_tokens_that_training_has_through_the_first_end(
    space: tuple[str, str], end: str, tokenizer: PreTrainedTokenizerBase
):
    (prompt, begin), names = space, ("apples", "eggs")
    problems = [Problem(f"row {n}\n{prompt}", begin + names[n % 2] + end) for n in range(4)]
    rows = held_out_of(problems, tokenizer)
    found = divided(rows, [], tokenizer, settings(eval_choices=True), 0)
    assert [tokenizer.decode(ids) for ids in found.choices] == [" apples<eos>", " eggs<eos>"]
    for row, ids in zip(rows.rows, found.choices * 2, strict=True):
        assert row.sample.ids[len(row.prompt) :][: len(ids)].tolist() == ids


@pytest.mark.parametrize(
    ("dataset", "ood", "expected"),
    [
        ("arithmetic_hard", "auto", "arithmetic_harder"),
        ("arithmetic", "auto", None),
        ("arithmetic_hard", None, None),
        ("rows.jsonl", "others.jsonl", "others.jsonl"),
    ],
)
def test_the_second_data_set_of_a_run(dataset: str, ood: str | None, expected: str | None):
    assert ood_name(Config(dataset_name=dataset, ood_dataset_name=ood)) == expected


@pytest.mark.parametrize("num_processes", [1, 2, 4, 9])
def test_the_processes_share_the_rows_without_overlap(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, num_processes: int
):
    whole = held_out(problems * 2, tokenizer)
    config = settings(calibration_split=0.3)
    parts = [
        divided(whole, whole.rows[:3], tokenizer, config, 0, index, num_processes)
        for index in range(num_processes)
    ]
    alone = divided(whole, whole.rows[:3], tokenizer, config, 0)
    for kind in ("scored", "calibration", "ood"):
        shared = sorted(id(row) for part in parts for row in getattr(part, kind))
        assert shared == sorted(id(row) for row in getattr(alone, kind))
