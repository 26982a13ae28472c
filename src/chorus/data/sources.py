"""Where rows come from: the built-in task, a file, a glob or folder of files, a folder of save_to_disk, the
hub.

Nothing here needs torch, a model or a tokenizer.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from chorus.config.data import DataSettings
from chorus.data import arithmetic
from chorus.data.files import (
    Row,
    check_columns,
    kind_of,
    listed,
    readable_suffixes,
    rows_of_file,
    without_filled,
)
from chorus.errors import InputError


class BuiltIn(NamedTuple):
    """A built-in data set: how a split's rows are made, and for each split where they are drawn from and how
    many.

    make: `arithmetic.problems`, or the same rows in another form.
    """

    make: Callable[..., list[dict[str, Any]]]
    variant: arithmetic.Variant
    splits: Mapping[str, tuple[arithmetic.Split, int]]


# Enough for the tiny base to learn the form of an answer in minutes on a CPU; 500 put 2 % of error on an
# exact match.
STANDARD: dict[str, tuple[arithmetic.Split, int]] = {
    "train": ("train", 4_000),
    "validation": ("validation", 500),
}
# Few rows, so that agents differ in what they learn. The defaults of a run were tuned on the validation split
# of this task, so held-out rows come from its test split.
HARD: dict[str, tuple[arithmetic.Split, int]] = {"train": ("train", 300), "validation": ("test", 500)}
BUILT_IN = {
    "arithmetic": BuiltIn(arithmetic.problems, "standard", STANDARD),
    "arithmetic_chat": BuiltIn(arithmetic.conversations, "standard", STANDARD),
    "arithmetic_hard": BuiltIn(arithmetic.problems, "three_digits", HARD),
    "arithmetic_harder": BuiltIn(arithmetic.problems, "three_digits_more_steps", HARD),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# How file names tell their split, as in `train-00000-of-00002.parquet`, `data/dev.jsonl` or `test/0.csv`.
SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
SPLIT_WORDS |= {"val": "validation", "dev": "validation", "test": "test", "testing": "test"}
# Metadata files that other tools write beside data.
ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
READ_AT_A_TIME = 1_000


class Split(NamedTuple):
    """The rows of one split.

    Attributes:
        name: for messages, such as `data.jsonl (train)`.
        rows: reads them, `rows(columns, optional)`; see `files.rows_of_file`.
        identity: changes whenever the rows do, as far as file sizes and times tell.
    """

    name: str
    rows: Callable[[Sequence[str] | None, Sequence[str]], Iterator[Row]]
    identity: str


class Splits(NamedTuple):
    """The split to train on, and the one that is held out; None
    where the training split gives up some rows."""

    train: Split
    validation: Split | None


def open_splits(settings: DataSettings) -> Splits:
    """The splits that the settings name. No row is read yet.

    Raises:
        InputError: a source or split that does not exist.
    """
    name, wanted = settings.dataset_name, settings.validation_dataset_split
    splits = open_source(name, settings.dataset_subset)
    train = _split_of(splits, settings.dataset_split, name, "dataset_split")
    if settings.validation_dataset_name is None:
        if wanted is None:
            wanted = (
                "validation" if "validation" in splits and settings.dataset_split != "validation" else None
            )
        return Splits(
            train, None if wanted is None else _split_of(splits, wanted, name, "validation_dataset_split")
        )
    return Splits(
        train,
        open_split(
            settings.validation_dataset_name, wanted, "validation_dataset_name", "validation_dataset_split"
        ),
    )


def open_split(name: str, split: str | None, key: str, split_key: str | None = None) -> Split:
    """A split of a source other than the run's; None: its only one, or `validation`.

    Raises:
        InputError: the source does not exist, cannot be read or has no such split. It names `key`, or
            `split_key` for a split.
    """
    splits = open_source(name, None, key)
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "validation"
    return _split_of(splits, split, name, split_key or key)


def _split_of(splits: Mapping[str, Split], split: str, source: str, key: str) -> Split:
    if split not in splits:
        raise InputError(
            f"key '{key}': {source!r} has no split {split!r} (it has {listed(splits)}); name one of these"
        )
    return splits[split]


def open_source(name: str, subset: str | None, key: str = "dataset_name") -> dict[str, Split]:
    """The splits of a source by name. A name that looks like a path is never asked of the hub.

    Raises:
        InputError: it does not exist, or is not of a kind that can be read.
    """
    path = Path(name)
    from_hub = name not in BUILT_IN and not path.exists() and not has_magic(name)
    if from_hub and (not HUB_ID.fullmatch(name) or kind_of(path) or _is_in_a_folder(path)):
        raise InputError(f"key '{key}': {name!r} does not exist; correct the path")
    if subset is not None and not from_hub:
        raise InputError(
            f"key 'dataset_subset': {subset!r} is for datasets of the hub, not for {name!r}; set it to null"
        )
    if name in BUILT_IN:
        return {split: _built_in(name, split) for split in BUILT_IN[name].splits}
    if path.is_file():
        if kind_of(path) is None:
            raise InputError(
                f"key '{key}': {name!r} must be a file ending in {readable_suffixes()}, or a folder; "
                "convert it"
            )
        return _files_by_split(name, path.parent, [path], key)
    if path.is_dir():
        if any((path / marker).exists() for marker in ("state.json", "dataset_dict.json")):
            return _datasets_by_split(name, _load_folder(path, key))
        return _files_by_split(name, path, _files_in(name, path, key), key)
    if from_hub:
        return _datasets_by_split(name, _load_from_hub(name, subset, key))
    found = sorted(Path(one) for one in glob(name, recursive=True) if Path(one).is_file())
    readable = [one for one in found if kind_of(one)]
    if not readable:
        what = f"only {listed(one.name for one in found[:3])}" if found else "no file"
        raise InputError(
            f"key '{key}': {name!r} matches {what}; give a glob of files ending in {readable_suffixes()}"
        )
    fixed = Path(*takewhile(lambda part: not has_magic(part), path.parts))
    return _files_by_split(name, fixed, readable, key)


def _built_in(name: str, split: str) -> Split:
    """A built-in data set. Like a file it does not depend on the seed of a run."""
    make, variant, splits = BUILT_IN[name]
    drawn_from, count = splits[split]

    def rows(columns: Sequence[str] | None, optional: Sequence[str]) -> Iterator[Row]:
        for number, problem in enumerate(make(drawn_from, count, 0, variant), start=1):
            yield Row(f"{name} ({split}) row {number}", problem)

    code = hashlib.sha256(Path(arithmetic.__file__).read_bytes()).hexdigest()
    return Split(f"{name} ({split})", rows, f"{name} {drawn_from} {count} {code}")


def _files_in(name: str, folder: Path, key: str) -> list[Path]:
    """The files of a folder and the folders in it that can be read, sorted; hidden ones are left out."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and kind_of(path)
        and path.name not in ABOUT_DATA
        and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(
            f"key '{key}': the folder {name!r} holds no data: neither files ending in "
            f"{readable_suffixes()}, nor what save_to_disk writes (state.json or dataset_dict.json); name a "
            "folder that does"
        )
    return files


def _files_by_split(name: str, folder: Path, files: Sequence[Path], key: str) -> dict[str, Split]:
    """Files by the split in their names. A file without a split in its name, or the only split, is for
    training.

    Raises:
        InputError: a file is there in two formats.
    """
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^A-Za-z]+", str(file.relative_to(folder)).lower())
        by_split.setdefault(
            next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train"), []
        ).append(file)
    if len(by_split) == 1:
        by_split = {"train": list(files)}
    for split, parts in by_split.items():
        _refuse_doubles(f"key '{key}': {name!r} holds the split {split!r}", folder, parts)
    return {split: _split_of_files(f"{name} ({split})", parts) for split, parts in by_split.items()}


def _refuse_doubles(place: str, folder: Path, files: Sequence[Path]) -> None:
    """Refuse two files that are likely the same rows, in two formats or compressed."""
    seen: dict[Path, Path] = {}
    for file in files:
        name = (file.with_suffix("") if file.suffix.lower() == ".gz" else file).with_suffix("")
        if name in seen:
            raise InputError(
                f"{place} twice, as it seems: in {seen[name]} and {file.name}; remove one of them, or name "
                f"one kind by a glob, such as '{folder / '**' / '*'}{''.join(file.suffixes)}'"
            )
        seen[name] = file


def _split_of_files(name: str, files: Sequence[Path]) -> Split:
    def rows(columns: Sequence[str] | None, optional: Sequence[str]) -> Iterator[Row]:
        for file in files:
            yield from rows_of_file(file, columns, optional)

    states = [(str(file.resolve()), file.stat()) for file in files]
    identity = "\n".join(f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states)
    return Split(name if len(files) == 1 else f"{name}, {len(files)} files", rows, identity)


def _is_in_a_folder(path: Path) -> bool:
    return path.parent != Path(".") and path.parent.is_dir()


def _load_folder(path: Path, key: str) -> Mapping[Any, Any]:
    import datasets

    with _loading_errors_named(
        f"key '{key}': cannot load the folder '{path}'", "write it again with save_to_disk"
    ):
        loaded = datasets.load_from_disk(str(path))
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _load_from_hub(name: str, subset: str | None, key: str) -> Mapping[Any, Any]:
    import datasets

    place = f"key '{key}': cannot load {name!r} (dataset_subset: {subset!r}) from the hub"
    with _loading_errors_named(place, "correct the name or subset, or download it and name a local file"):
        return datasets.load_dataset(name, subset)


@contextmanager
def _loading_errors_named(place: str, remedy: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"{place}: {why}; {remedy}") from error


def _datasets_by_split(name: str, datasets: Mapping[Any, Any]) -> dict[str, Split]:
    return {
        str(split): _split_of_dataset(f"{name} ({split})", dataset) for split, dataset in datasets.items()
    }


def _split_of_dataset(name: str, dataset: Any) -> Split:
    """A split of the `datasets` library. A class label is read as its name, not as its number."""
    import datasets

    labels = {key: one for key, one in dataset.features.items() if isinstance(one, datasets.ClassLabel)}

    def rows(columns: Sequence[str] | None, optional: Sequence[str]) -> Iterator[Row]:
        found = dataset.column_names
        check_columns(name, found, columns, optional)
        taken = (
            dataset if columns is None else dataset.select_columns([one for one in columns if one in found])
        )
        number = 0
        for batch in taken.iter(READ_AT_A_TIME):
            for values in zip(*batch.values(), strict=True):
                number += 1
                row = without_filled(dict(zip(batch, values, strict=True)))
                for key in labels.keys() & row.keys():
                    row[key] = None if row[key] is None or row[key] < 0 else labels[key].int2str(row[key])
                yield Row(f"{name} row {number}", row)

    return Split(name, rows, f"{name} {dataset._fingerprint} {len(dataset)}")
