import itertools
import json
import re
import subprocess
import sys
from typing import get_args

import pytest

from chorus.data.arithmetic import RANGES, STORIES, Split, Variant, computations, problems, split_of, work
from chorus.errors import InputError

SPLITS, VARIANTS = get_args(Split), get_args(Variant)


def computation(row: dict[str, str]) -> str:
    """What a row computes, read back from its worked steps; the
    first two numbers ascend where they commute."""
    *steps, _ = row["answer"].split("\n")
    left, operator, right = steps[0].split(" = ")[0].split(" ")
    if operator in "+*":
        left, right = sorted((left, right), key=int)
    return " ".join([left, operator, right, *(step.split(" ", 1)[1].split(" =")[0] for step in steps[1:])])


def test_no_computation_is_in_two_splits_or_variants_whatever_the_seeds():
    """A split that came from the caller's seed, from the story or
    by luck would meet another one in so many rows."""
    seen = {
        (split, variant): {computation(row) for row in problems(split, 3000, seed, variant)}
        for (seed, split), variant in itertools.product(enumerate(SPLITS), VARIANTS)
    }
    for (one, rows), (other, others) in itertools.combinations(seen.items(), 2):
        assert not rows & others, (one, other)


def test_a_computation_has_the_same_split_in_either_order_where_the_order_does_not_count():
    assert all(
        split_of("+", (a, b)) == split_of("+", (b, a)) for a, b in itertools.product(range(2, 40), repeat=2)
    )
    assert all(
        split_of("*-", (a, b, 5)) == split_of("*-", (b, a, 5))
        for a, b in itertools.product(range(2, 13), repeat=2)
    )
    assert any(
        split_of("-+", (a, b, 5)) != split_of("-+", (b, a, 5))
        for a, b in itertools.product(range(2, 40), repeat=2)
    )


@pytest.mark.parametrize(
    ("operators", "variant"),
    [("-+", "standard"), ("*-", "larger_numbers"), ("+", "three_digits"), ("*+-", "three_digits_more_steps")],
)
def test_the_computations_are_all_whose_numbers_and_results_are_in_range_in_order(operators, variant):
    ranges = RANGES[variant][len(operators)]
    of_places = [ranges.factor if operators[0] == "*" else ranges.first]
    of_places += [ranges.factor if operator == "*" else ranges.later for operator in operators]
    expected = []
    for numbers in itertools.product(*of_places):
        results = [result for *_, result in work(operators, numbers)]
        if min(results) >= 2 and max(*numbers, *results) in ranges.largest:
            expected.append([*numbers])
    assert computations(operators, variant).tolist() == expected


def test_the_splits_of_every_kind_of_problem_are_near_80_10_10_percent():
    for operators in ("+", "-", "++", "+-", "-+", "--", "*+", "*-"):
        splits = [split_of(operators, numbers) for numbers in computations(operators).tolist()]
        assert splits.count("train") / len(splits) == pytest.approx(0.8, abs=0.04)
        assert splits.count("test") / len(splits) == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_answer_is_right_by_pythons_own_arithmetic(variant):
    for row in problems("train", 1500, 0, variant):
        *steps, final = row["answer"].split("\n")
        for step in steps:
            assert re.fullmatch(r"\d+ [-+*] \d+ = \d+", step)
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        for before, after in itertools.pairwise(steps):
            assert after.split(" ")[0] == before.split(" = ")[1]
        assert final == "#### " + steps[-1].split(" = ")[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_question_gives_the_numbers_of_the_computation_in_order_and_nothing_of_the_answer(variant):
    for row in problems("validation", 500, 0, variant):
        numbers = re.findall(r"\d+", computation(row))
        assert sorted(re.findall(r"\d+", row["question"])) == sorted(numbers)
        assert row["question"].endswith("?")
        assert not set("{}#=\n") & set(row["question"])


def test_standard_problems_are_small_and_the_variants_are_harder():
    def sizes(variant: Variant) -> tuple[set[int], int, int]:
        rows = problems("test", 1500, 0, variant)
        largest = [max(map(int, re.findall(r"\d+", row["answer"]))) for row in rows]
        return {row["answer"].count("\n") for row in rows}, min(largest), max(largest)

    steps, _, largest = sizes("standard")
    assert (steps, largest) <= ({1, 2}, 99)
    steps, smallest, largest = sizes("larger_numbers")
    assert steps == {1, 2}
    assert smallest >= 100
    assert largest <= 199
    steps, _, largest = sizes("more_steps")
    assert steps == {3}
    assert largest <= 99
    for variant, expected in (("three_digits", {1, 2}), ("three_digits_more_steps", {3})):
        steps, smallest, largest = sizes(variant)
        assert steps == expected
        assert (smallest, largest) >= (200, 200)
        assert largest <= 299


def test_no_question_comes_twice():
    rows = problems("train", 4000, 0)
    assert len({row["question"] for row in rows}) == len(rows)


def test_a_smaller_count_gives_the_first_rows_of_a_larger_one():
    assert problems("train", 300, 7)[:100] == problems("train", 100, 7)


def test_the_seed_decides_the_rows_in_another_process_too():
    call = (
        "import json; from chorus.data.arithmetic import problems; print(json.dumps(problems('test', 50, 3)))"
    )
    assert json.loads(subprocess.check_output([sys.executable, "-c", call], text=True)) == problems(
        "test", 50, 3
    )
    assert problems("test", 50, 3) != problems("test", 50, 4)


def test_every_story_is_told():
    texts = [row["question"] for variant in VARIANTS for row in problems("train", 1500, 0, variant)]
    for story in STORIES:
        pattern = re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(f"{story.situation} {story.question}"))
        assert any(re.fullmatch(pattern, text) for text in texts), story


def test_more_problems_than_exist_are_refused_with_the_number_that_exists():
    with pytest.raises(
        InputError, match=r"200000 problems asked for.* 'test' .* holds only (\d+); ask for"
    ) as refused:
        problems("test", 200_000, 0)
    [existing] = re.findall(r"holds only (\d+)", str(refused.value))
    rows = problems("test", int(existing), 1)
    told = {(re.sub(r"\b[A-Z]\w+|\d+", "", row["question"]), row["answer"]) for row in rows}
    assert len(rows) == int(existing)
    assert len(told) > 0.99 * len(rows)  # things are words of the story here, so a few rows may read alike


@pytest.mark.parametrize(("split", "variant"), [("dev", "standard"), ("test", "harder")])
def test_an_unknown_split_or_variant_is_refused_with_the_known_ones(split, variant):
    with pytest.raises(
        InputError, match=r"does not exist; choose one of (train, validation, test|standard, larger)"
    ):
        problems(split, 1, 0, variant)


def test_the_steps_of_a_computation_go_from_left_to_right():
    assert work("*+-", (3, 4, 5, 6)) == [(3, "*", 4, 12), (12, "+", 5, 17), (17, "-", 6, 11)]
