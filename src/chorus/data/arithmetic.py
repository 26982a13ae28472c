"""The built-in task: word problems in the form of GSM8K, written from a seed.

A row is `{"question": ..., "answer": ...}`; the answer is one worked step a line, then `#### ` and the
result, as in Cobbe et al. 2021 (https://arxiv.org/abs/2110.14168).

The splits are disjoint in the computations, not only in their wording. A problem's identity is its
computation (the operators and the numbers, without the story, the names and the things), and a hash of that
identity names the one split in which the problem may appear, whatever the seed of the caller.
"""

import random
from collections.abc import Iterator
from operator import add, mul, sub
from typing import Literal, NamedTuple, get_args

import numpy as np

from chorus.errors import InputError
from chorus.seeding import derive_seed

Split = Literal["train", "validation", "test"]
Variant = Literal["standard", "larger_numbers", "more_steps", "three_digits", "three_digits_more_steps"]


class Story(NamedTuple):
    """One way to tell a computation, evaluated from left to right; `*` can only be the first operator."""

    operators: str
    situation: str
    question: str


class Ranges(NamedTuple):
    """The numbers that a computation of one variant and length may hold."""

    first: range  # the number that is added to or taken from
    later: range  # each number added or taken away
    factor: range  # both factors of a product
    largest: range  # the largest of all numbers and results


OPERATIONS = {"+": add, "-": sub, "*": mul}

# Each variant's ranges by number of steps. A standard problem has at most two steps and no number above 99;
# each harder variant has either a number above 99 or a third step, so that it cannot meet a standard problem.
# The tiny base was pretrained on the first three; of numbers from 200 on it has seen nothing.
RANGES: dict[str, dict[int, Ranges]] = {
    "standard": {
        1: Ranges(range(2, 98), range(2, 98), range(2, 13), range(100)),
        2: Ranges(range(2, 60), range(2, 20), range(2, 13), range(100)),
    },
    "larger_numbers": {
        1: Ranges(range(2, 198), range(2, 198), range(2, 21), range(100, 200)),
        2: Ranges(range(60, 180), range(2, 20), range(2, 21), range(100, 200)),
    },
    "more_steps": {3: Ranges(range(2, 40), range(2, 12), range(2, 10), range(100))},
    "three_digits": {
        1: Ranges(range(2, 300), range(2, 300), range(2, 15), range(200, 300)),
        2: Ranges(range(150, 290), range(2, 32), range(2, 15), range(200, 300)),
    },
    "three_digits_more_steps": {3: Ranges(range(180, 290), range(2, 12), range(2, 15), range(200, 300))},
}

STORIES = (
    Story(
        "+",
        "{name} has {a} {things}. {other} gives {name} {b} more.",
        "How many {things} does {name} have now?",
    ),
    Story(
        "+",
        "There are {a} {things} on the table and {b} in the box.",
        "How many {things} are there altogether?",
    ),
    Story(
        "+",
        "{name} collected {a} {things} in the morning and {b} in the afternoon.",
        "How many {things} did {name} collect that day?",
    ),
    Story(
        "+",
        "{name} read {a} pages on Monday and {b} pages on Tuesday.",
        "How many pages did {name} read on both days?",
    ),
    Story(
        "+",
        "A bus carries {a} passengers. At the next stop {b} people get on.",
        "How many passengers are on the bus now?",
    ),
    Story(
        "-",
        "{name} had {a} {things} and gave {b} of them to {other}.",
        "How many {things} does {name} have left?",
    ),
    Story(
        "-",
        "{name} has {a} {things} and {other} has {b}.",
        "How many more {things} does {name} have than {other}?",
    ),
    Story("-", "A book has {a} pages. {name} has read {b} of them.", "How many pages are left to read?"),
    Story(
        "-",
        "{name} wants to collect {a} {things} and has found {b} so far.",
        "How many {things} are still missing?",
    ),
    Story("-", "A shop had {a} {things} and sold {b} of them.", "How many {things} were not sold?"),
    Story("*", "{name} has {a} bags with {b} {things} in each.", "How many {things} are in the bags?"),
    Story(
        "*",
        "There are {a} shelves, and each shelf holds {b} {things}.",
        "How many {things} are on the shelves?",
    ),
    Story("*", "{name} buys {a} tickets at {b} euros each.", "How many euros does {name} pay?"),
    Story(
        "++",
        "{name} found {a} {things} on Friday, {b} on Saturday and {c} on Sunday.",
        "How many {things} did {name} find altogether?",
    ),
    Story(
        "+-",
        "{name} had {a} {things}, bought {b} more and then gave {c} to {other}.",
        "How many {things} does {name} have now?",
    ),
    Story(
        "+-",
        "A bus carries {a} passengers. At the first stop {b} people get on, and at the second stop {c} "
        "get off.",
        "How many passengers are on the bus now?",
    ),
    Story(
        "-+",
        "{name} had {a} {things}, lost {b} of them and later found {c} new ones.",
        "How many {things} does {name} have now?",
    ),
    Story(
        "-+",
        "A shelf held {a} books. {name} borrowed {b} of them and {other} brought {c} back.",
        "How many books are on the shelf now?",
    ),
    Story(
        "--",
        "{name} picked {a} {things}. {other} took {b} of them, and {c} went bad.",
        "How many good {things} does {name} have left?",
    ),
    Story(
        "--",
        "A rope is {a} meters long. {name} cuts off {b} meters and then {c} meters.",
        "How many meters of rope are left?",
    ),
    Story(
        "*+",
        "{name} has {a} boxes with {b} {things} in each and {c} loose {things}.",
        "How many {things} does {name} have altogether?",
    ),
    Story(
        "*+",
        "{name} buys {a} tickets at {b} euros each and a drink for {c} euros.",
        "How many euros does {name} pay?",
    ),
    Story(
        "*-",
        "{name} baked {a} trays of {b} cookies each. The guests ate {c} of them.",
        "How many cookies are left?",
    ),
    Story(
        "*-",
        "{name} filled {a} bags with {b} {things} each and gave {c} {things} away.",
        "How many {things} does {name} have left?",
    ),
    Story(
        "++-",
        "{name} found {a} {things} on Friday, {b} on Saturday and {c} on Sunday, and then lost {d} of them.",
        "How many {things} does {name} have now?",
    ),
    Story(
        "+-+",
        "{name} had {a} {things}, bought {b} more, gave {c} to {other} and later found {d} new ones.",
        "How many {things} does {name} have now?",
    ),
    Story(
        "+--",
        "A bus carries {a} passengers. At the first stop {b} people get on, at the second stop {c} get off, "
        "and at the third stop {d} get off.",
        "How many passengers are on the bus now?",
    ),
    Story(
        "*+-",
        "{name} has {a} boxes with {b} {things} in each and {c} loose {things}. {other} takes {d} of them.",
        "How many {things} does {name} have left?",
    ),
)

NAMES = (
    *("Ada", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Kira", "Leo"),
    *("Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Yusuf"),
)
THINGS = (
    *(
        "apples",
        "balloons",
        "beads",
        "buttons",
        "cards",
        "coins",
        "eggs",
        "flowers",
        "lemons",
        "marbles",
        "nuts",
    ),
    *("pears", "pencils", "plums", "ribbons", "shells", "stamps", "stickers", "stones", "tomatoes"),
)


def work(operators: str, numbers: tuple[int, ...]) -> list[tuple[int, str, int, int]]:
    """The steps of a computation from left to right, each (left, operator, right, result).

    >>> work("+-", (12, 7, 4))
    [(12, '+', 7, 19), (19, '-', 4, 15)]
    """
    steps = []
    left = numbers[0]
    for operator, right in zip(operators, numbers[1:], strict=True):
        result = OPERATIONS[operator](left, right)
        steps.append((left, operator, right, result))
        left = result
    return steps


def split_of(operators: str, numbers: tuple[int, ...]) -> Split:
    """The one split that may hold this computation: 80 % train, 10 % validation, 10 % test.

    The order of the first two numbers counts only where it changes the result: 7 + 12 goes where 12 + 7 goes.
    """
    if operators[0] in "+*":
        numbers = (*sorted(numbers[:2]), *numbers[2:])
    bucket = derive_seed(0, "arithmetic split", operators, *numbers) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def computations(operators: str, variant: Variant = "standard") -> np.ndarray:
    """The numbers of every computation with these operators, of all splits: a row each, [computations,
    numbers]. No number or result is below 2.

    In arrays: as tuples they would take half a second of every start on the default task.
    """
    ranges = RANGES[variant][len(operators)]
    numbers_NS = np.array(ranges.factor if operators[0] == "*" else ranges.first)[:, None]
    result_N = largest_N = numbers_NS[:, 0]  # the result so far, and the largest of all numbers and results
    for operator in operators:
        rights = np.array(ranges.factor if operator == "*" else ranges.later)
        before = np.repeat(np.arange(len(result_N)), len(rights))
        right_N = np.tile(rights, len(result_N))
        result_N = OPERATIONS[operator](result_N[before], right_N)
        largest_N = np.maximum(largest_N[before], np.maximum(right_N, result_N))
        kept = (result_N >= 2) & (result_N < ranges.largest.stop)
        numbers_NS = np.column_stack([numbers_NS[before], right_N])[kept]
        result_N, largest_N = result_N[kept], largest_N[kept]
    is_in_range = (largest_N >= ranges.largest.start) & (largest_N < ranges.largest.stop)
    return numbers_NS[is_in_range]


def tell(story: Story, numbers: tuple[int, ...], rng: random.Random) -> tuple[str, str]:
    """The situation and the question of a story about these
    numbers, with names and things drawn from `rng`."""
    name, other = rng.sample(NAMES, 2)
    words = {
        "name": name,
        "other": other,
        "things": rng.choice(THINGS),
        **dict(zip("abcd", numbers, strict=False)),
    }
    return story.situation.format(**words), story.question.format(**words)


def problems(split: Split, count: int, seed: int, variant: Variant = "standard") -> list[dict[str, str]]:
    """`count` rows {"question", "answer"} of one split; no story is told twice with the same numbers.

    The rows of a smaller `count` are the first rows of a larger one. Every story of the variant is equally
    likely, as long as it has computations left.

    Raises:
        InputError: the split or variant does not exist, or the split holds fewer than `count` problems.
    """
    for key, value, known in (("split", split, get_args(Split)), ("variant", variant, get_args(Variant))):
        if value not in known:
            raise InputError(f"arithmetic: {key} {value!r} does not exist; choose one of {', '.join(known)}")
    rng = random.Random(derive_seed(seed, "arithmetic", variant, split))
    stories = [story for story in STORIES if len(story.operators) in RANGES[variant]]
    numbers_by_operators = {
        o: computations(o, variant) for o in dict.fromkeys(story.operators for story in stories)
    }
    decks = [
        (story, _shuffled(numbers_by_operators[story.operators], story, split, rng)) for story in stories
    ]
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        if not decks:
            raise InputError(
                f"arithmetic: {count} problems asked for, but split {split!r} of variant {variant!r} holds "
                f"only {len(rows)}; ask for at most {len(rows)}"
            )
        story, deck = choice = rng.choice(decks)
        numbers = next(deck, None)
        if numbers is None:
            decks.remove(choice)
            continue
        situation, question = tell(story, numbers, rng)
        steps = work(story.operators, numbers)
        lines = [f"{left} {operator} {right} = {result}" for left, operator, right, result in steps]
        answer = "\n".join([*lines, f"#### {steps[-1][-1]}"])
        rows.append({"question": f"{situation} {question}", "answer": answer})
    return rows


def _shuffled(
    numbers_NS: np.ndarray, story: Story, split: Split, rng: random.Random
) -> Iterator[tuple[int, ...]]:
    """The computations of one split in random order. Drawn one by one: to shuffle and hash them all takes a
    second."""
    order_N = np.arange(len(numbers_NS))
    for last in range(len(order_N) - 1, -1, -1):
        drawn = rng.randrange(last + 1)
        order_N[drawn], order_N[last] = order_N[last], order_N[drawn]
        numbers = tuple(numbers_NS[order_N[last]].tolist())
        if split_of(story.operators, numbers) == split:
            yield numbers


def conversations(
    split: Split, count: int, seed: int, variant: Variant = "standard"
) -> list[dict[str, list]]:
    """`problems` as turns: the question is the user's, the
    answer the assistant's. Raises as `problems` does."""
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in (row.values() for row in problems(split, count, seed, variant))
    ]
