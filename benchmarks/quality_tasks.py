"""The tasks of quality.py: their files, and their rows in four shares that no arm mixes.

    train        what every arm is trained on
    tuning       half of the validation rows: rate, rank, steps and strength of every arm are chosen on them
    calibration  the other half: every arm's temperature is fitted to them
    test         scored once, with what was chosen; beside them the rows of another kind

A task is JSON lines with `question` and `answer`, or the built-in one. The rows that are used are drawn once
from a seed and written to a folder, so that the product reads them as it reads a user's files.

Where few different answers occur it is a task of labels. Then each label becomes one token, the longest of
its own words that is one and still free: a question over 150 labels is one row to read and not 150.
"""

import json
import random
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from chorus.config import RunConfig
from chorus.data import arithmetic
from chorus.data.rows import HeldOutRows, read_held_out, read_rows
from chorus.data.samples import Samples
from chorus.ensemble.evaluation_rows import EvaluationRows, divided
from chorus.errors import InputError
from chorus.seeding import derive_seed

Row = dict[str, Any]
SHARES = ("train", "val", "test", "ood")
ROWS_OF_A_LABEL = 5  # on average, in a task of labels
# Of the built-in task: the variant that is learnt, and the one that is of another kind.
BUILT_IN: dict[str, tuple[arithmetic.Variant, arithmetic.Variant | None]] = {
    "arithmetic_hard": ("three_digits", "three_digits_more_steps"),
    "arithmetic_harder": ("three_digits_more_steps", None),
}


class Sizes(NamedTuple):
    """The most rows of each share, and the most tokens of a row: longer ones are left out.

    Training rows are a multiple of `multiple`, so that all batches are of one shape.
    """

    train: int
    val: int
    test: int
    ood: int
    multiple: int
    longest: int


class TaskRows(NamedTuple):
    """The rows of a task under one tokenizer.

    Attributes:
        settings: the keys of a configuration that trains on them.
        tuning, test: to score; both with the calibration share.
    """

    name: str
    settings: dict[str, Any]
    train: Samples
    tuning: EvaluationRows
    test: EvaluationRows
    pad_id: int

    @property
    def score(self) -> str:
        """The name of the NLL that counts: of a question, or of a token of an answer."""
        return "cls/NLL" if self.test.choices else "token/NLL"


def read_task(
    argument: str, folder: Path, sizes: Sizes, base: str, tokenizer: PreTrainedTokenizerBase
) -> TaskRows:
    """Write the files of a task, and read them.

    Args:
        argument: `NAME=train.jsonl[,val.jsonl[,test.jsonl[,ood.jsonl]]]`, where val and test may be left out
            or empty: they come from the training rows then; or the name of a built-in task.
        base: as the key model_name.

    Raises:
        InputError: a file or a row that cannot be used, or too few rows.
    """
    name, _, files = argument.partition("=")
    found = shares_of_files(files.split(","), sizes, tokenizer) if files else built_in(name, sizes)
    if len(found["train"]) < sizes.multiple or len(found["val"]) < 4 or not found["test"]:
        counts = ", ".join(f"{len(rows)} {share}" for share, rows in found.items())
        raise InputError(f"--task {name}: too few rows ({counts}) for batches of {sizes.multiple}")
    is_choice = len({row["answer"] for row in found["train"]}) * ROWS_OF_A_LABEL <= len(found["train"])
    if is_choice:
        found = with_one_token_labels(found, tokenizer)
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    for share, rows in found.items():
        text = "".join(json.dumps({key: row[key] for key in ("question", "answer")}) + "\n" for row in rows)
        (folder / f"{share}.jsonl").write_text(text, encoding="utf-8")
    settings = {
        "model_name": base,
        "dataset_name": str(folder / "train.jsonl"),
        "validation_dataset_name": str(folder / "val.jsonl"),
        "eval_choices": is_choice,
        "max_seq_length": sizes.longest,
        "packing": False,
        "data_cache_dir": str(folder / "tokenised"),
    }
    return _read(name, folder, settings, has_ood=bool(found["ood"]), tokenizer=tokenizer)


def shares_of_files(
    files: Sequence[str], sizes: Sizes, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Row]]:
    """The rows of each share, drawn from the rows of its file. Those of a share without a file come from what
    training leaves over."""
    read = {
        share: _no_longer(_rows_of(Path(file)), sizes.longest, tokenizer)
        for share, file in zip(SHARES, files, strict=False)
        if file
    }
    rng = random.Random(derive_seed(0, "quality rows"))
    for rows in read.values():
        rng.shuffle(rows)
    pool = read["train"]
    found: dict[str, list[Row]] = {}
    for share in ("test", "val"):
        size = getattr(sizes, share)
        if share in read:
            found[share] = read[share][:size]
        else:  # a fifth of what there is at most
            size = min(size, len(pool) // 5)
            found[share], pool = pool[:size], pool[size:]
    count = min(sizes.train, len(pool)) // sizes.multiple * sizes.multiple
    found |= {"train": pool[:count], "ood": read.get("ood", [])[: sizes.ood]}
    return {share: found[share] for share in SHARES}


def built_in(name: str, sizes: Sizes) -> dict[str, list[Row]]:
    """The same of a built-in task."""
    if name not in BUILT_IN:
        raise InputError(f"--task {name}: name its files, or one of {', '.join(BUILT_IN)}")
    variant, other = BUILT_IN[name]
    count = sizes.train // sizes.multiple * sizes.multiple
    return {
        "train": list(arithmetic.problems("train", count, 0, variant)),
        "val": list(arithmetic.problems("validation", sizes.val, 0, variant)),
        "test": list(arithmetic.problems("test", sizes.test, 0, variant)),
        "ood": [] if other is None else list(arithmetic.problems("test", sizes.ood, 0, other)),
    }


def with_one_token_labels(
    found: dict[str, list[Row]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Row]]:
    """The rows with each label replaced by a word that is one token after the prompt. Rows of another kind
    keep theirs, which nothing reads.

    Raises:
        InputError: the vocabulary has too few words.
    """
    labels = sorted({row["answer"] for share in ("train", "val", "test") for row in found[share]})
    vocabulary = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    others = (text[1:] for text in vocabulary if text[:1] == " " and text[1:].isalpha())
    taken: dict[str, str] = {}
    for label in labels:
        words = sorted(label.split(), key=len, reverse=True)
        own = (word for word in words if _is_one_token(word, tokenizer))
        word = next((word for word in own if word not in taken.values()), None)
        while word is None:
            other = next(others, None)
            if other is None:
                raise InputError(f"the base's vocabulary has no word of one token left for {label!r}")
            if other not in taken.values() and _is_one_token(other, tokenizer):
                word = other
        taken[label] = word
    return {
        share: [{**row, "answer": taken.get(row["answer"], row["answer"])} for row in rows]
        for share, rows in found.items()
    }


def _is_one_token(word: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1


def _no_longer(rows: list[Row], longest: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows that the template, some ten tokens, does not make longer than that."""
    return [
        row for row in rows if len(tokenizer.encode(f"{row['question']} {row['answer']}")) + 10 <= longest
    ]


def _rows_of(file: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"--task: {file}: {error}; give JSON lines with question and answer") from error


def _read(
    name: str, folder: Path, settings: dict[str, Any], *, has_ood: bool, tokenizer: PreTrainedTokenizerBase
) -> TaskRows:
    config = RunConfig(**settings)
    rows = read_rows(config, config.seed, tokenizer)
    held_out = {
        share: read_held_out(config, str(folder / f"{share}.jsonl"), "--task", None, tokenizer)
        for share in ("val", "test", *(["ood"] if has_ood else []))
    }
    val, test = held_out["val"].rows, held_out["test"].rows
    ood = held_out["ood"].rows if has_ood else []
    together = HeldOutRows([*val, *test], held_out["val"].end_ids)
    of_all = divided(together, ood, tokenizer, config.model_copy(update={"calibration_split": 0.0}), seed=0)
    if of_all.choices and all(len(choice) == 2 for choice in of_all.choices):
        # One token tells a choice from the others. With the end token each would be a row of its own to read.
        of_all = of_all._replace(choices=[choice[:1] for choice in of_all.choices])
    # Rows of one length: one shape to compile and to capture for each number of agents.
    length = max(len(sample.ids) - 1 for sample in rows.train)
    padded = min(settings["max_seq_length"], 8 * ceil(length / 8))
    return TaskRows(
        name,
        settings | {"max_seq_length": padded + 1, "pad_to_multiple_of": padded},
        rows.train,
        tuning=of_all._replace(scored=val[1::2], calibration=val[::2], ood=[]),
        test=of_all._replace(scored=test, calibration=val[::2]),
        pad_id=int(tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
    )
