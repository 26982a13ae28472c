"""Sources: which files, folders and data sets are read, and which of their splits."""

from pathlib import Path

import datasets
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from files_made import GOOD, PROBLEMS, ROWS, write
from rows import data_config, read_problems

from chorus.data import sources
from chorus.errors import InputError


def test_a_source_without_training_rows_is_refused(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "folder"))
    with pytest.raises(InputError, match=r"has no split 'train' \(it has 'test'\)"):
        read_problems(data_config(tmp_path / "folder"))


PARTS = [PROBLEMS[:7], PROBLEMS[7:12], PROBLEMS[12:]]


def shards(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [0, 7, 12, 20]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, ROWS[bounds[number] : bounds[number + 1]])


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "train-00002-of-00003.parquet"],
        ["a.jsonl", "b.jsonl.gz", "c.csv"],
        ["2024/part-0.jsonl", "2024/part-1.jsonl", "2025/part-0.jsonl"],
        ["test-0.jsonl", "test-1.jsonl", "test-2.jsonl"],  # the only split that there is: it was named
    ],
)
@pytest.mark.parametrize("is_glob", [False, True])
def test_a_folder_or_a_glob_of_shards_is_one_source_in_the_order_of_names(
    tmp_path: Path, names: list[str], is_glob: bool
) -> None:
    shards(tmp_path / "data", names)
    (tmp_path / "data" / "README.md").write_text("a card")
    (tmp_path / "data" / ".hidden.jsonl").write_text("damaged")
    assert read_problems(data_config(f"{tmp_path}/data" + "/**/*.*" * is_glob))[0] == PROBLEMS


def test_folders_in_a_glob_may_be_wild(tmp_path: Path) -> None:
    shards(tmp_path, ["a/x/part-0.jsonl", "b/x/part-0.jsonl", "c/x/part-0.jsonl"])
    assert read_problems(data_config(f"{tmp_path}/*/x/part-*.jsonl"))[0] == PROBLEMS


@pytest.mark.parametrize("other", ["rows.csv", "rows.jsonl.gz"])
def test_rows_that_lie_there_in_two_formats_are_not_trained_on_twice(tmp_path: Path, other: str) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / other, ROWS)
    write(tmp_path / "data" / "rows.jsonl", ROWS)
    with pytest.raises(
        InputError, match=r"holds the split 'train' twice, as it seems: in .*rows.*remove one"
    ):
        read_problems(data_config(tmp_path / "data"))


def test_what_tools_write_about_data_is_not_data(tmp_path: Path) -> None:
    shards(tmp_path / "data", ["train-0.jsonl", "train-1.jsonl", "train-2.jsonl"])
    (tmp_path / "data" / "dataset_info.json").write_text('{"features": {}}')
    assert read_problems(data_config(tmp_path / "data"))[0] == PROBLEMS


@pytest.mark.parametrize(
    "names", [["train.jsonl", "validation.jsonl", "test.jsonl"], ["train/0.csv", "dev/0.csv", "test/0.csv"]]
)
@pytest.mark.parametrize("is_glob", [False, True])
def test_files_are_split_as_their_names_say(tmp_path: Path, names: list[str], is_glob: bool) -> None:
    shards(tmp_path / "data", names)
    name = f"{tmp_path}/data" + "/**/*.*" * is_glob
    assert read_problems(data_config(name, validation_split=0.3)) == (PARTS[0], PARTS[1])
    keys = {"dataset_split": "validation", "validation_dataset_split": "test"}
    assert read_problems(data_config(name, **keys)) == (PARTS[1], PARTS[2])


@pytest.mark.parametrize("kind", ["folder", "save_to_disk"])
def test_a_test_split_is_held_out_only_if_it_is_named(tmp_path: Path, kind: str) -> None:
    parts = {"train": ROWS[:10], "test": ROWS[10:]}
    if kind == "folder":
        for split, rows in parts.items():
            (tmp_path / "data").mkdir(exist_ok=True)
            write(tmp_path / "data" / f"{split}.jsonl", rows)
    else:
        splits = {split: datasets.Dataset.from_list(rows) for split, rows in parts.items()}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    train, held_out = read_problems(data_config(tmp_path / "data", validation_split=0.2))
    assert sorted(train + held_out) == sorted(PROBLEMS[:10])
    assert len(held_out) == 2
    keys = {"validation_split": 0.2, "validation_dataset_split": "test"}
    assert read_problems(data_config(tmp_path / "data", **keys)) == (PROBLEMS[:10], PROBLEMS[10:])


def test_held_out_rows_may_be_of_another_source(tmp_path: Path) -> None:
    ours, theirs = write(tmp_path / "ours.jsonl", ROWS[:10]), write(tmp_path / "test.csv", ROWS[10:])
    config = data_config(ours, validation_dataset_name=str(theirs), validation_split=0.5)
    assert read_problems(config) == (PROBLEMS[:10], PROBLEMS[10:])
    config = data_config(ours, validation_dataset_name="arithmetic", validation_split=0.5)
    assert len(read_problems(config)[1]) == sources.STANDARD["validation"][1]
    with pytest.raises(InputError, match=r"key 'validation_dataset_name': 'nowhere.csv' does not exist"):
        read_problems(data_config(ours, validation_dataset_name="nowhere.csv"))
    config = data_config(ours, validation_dataset_name="arithmetic", validation_dataset_split="test")
    with pytest.raises(
        InputError, match=r"key 'validation_dataset_split': 'arithmetic' has no split 'test' \(it has"
    ):
        read_problems(config)


def test_a_class_label_is_read_by_its_name(tmp_path: Path) -> None:
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    datasets.Dataset.from_dict({"question": ["q", "r"], "answer": [1, 0]}, features).save_to_disk(
        str(tmp_path / "data")
    )
    assert [answer for _, answer in read_problems(data_config(tmp_path / "data"))[0]] == [" yes", " no"]


def test_a_folder_or_a_glob_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        InputError, match=r"'dataset_name': the folder .* holds no data: .*what save_to_disk writes"
    ):
        read_problems(data_config(tmp_path))
    with pytest.raises(
        InputError, match=r"'dataset_name': .* matches only 'notes.txt'; give a glob of files"
    ):
        read_problems(data_config(tmp_path / "*"))
    with pytest.raises(InputError, match=r"key 'dataset_name': .* matches no file"):
        read_problems(data_config(tmp_path / "*.csv"))


@pytest.mark.parametrize("name", ["sources.txt", "rows.parquet.gz", "rows.gz"])
def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("hello")
    with pytest.raises(
        InputError, match=r"must be a file ending in '\.jsonl', .*'\.parquet' \(text files also"
    ):
        read_problems(data_config(tmp_path / name))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "rows.jsonl",
            "nowhere/rows.json",
            "../rows",
            "./rows",
            "/nowhere/rows",
            "a/b/c",
            "folder\\rows",
            "~/rows",
        ),
        *("here/rows", "two words", "http://example.org/rows"),
    ],
)
def test_a_missing_path_is_never_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *arguments: pytest.fail(f"the hub was asked for {arguments}")
    )
    with pytest.raises(InputError, match=r"key 'dataset_name': .* does not exist; correct the path"):
        read_problems(data_config(name))


@pytest.mark.parametrize("name", ["gsm8k", "openai/gsm8k", "user-1/a_b.c-d"])
def test_a_hub_id_is_loaded_with_its_subset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: object) -> datasets.DatasetDict:
        asked.append(arguments)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_problems(data_config(name, dataset_subset="main"))[0] == PROBLEMS
    assert asked == [(name, "main")]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it"),
        ValueError("BuilderConfig 'x' not found.\nAvailable: ['main']"),
        DatasetNotFoundError("Dataset doesn't exist"),
        DatasetGenerationError("An error occurred"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_does_not_answer_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as refused:
        read_problems(data_config("openai/gsm8k", dataset_subset="x"))
    message = str(refused.value)
    assert message.startswith(
        "key 'dataset_name': cannot load 'openai/gsm8k' (dataset_subset: 'x') from the hub: "
    )
    assert message.endswith("; correct the name or subset, or download it and name a local file")
    assert "\n" not in message


def test_a_subset_of_something_local_is_refused(source: Path) -> None:
    for name in (source, "arithmetic"):
        with pytest.raises(InputError, match="key 'dataset_subset': 'main' is for datasets of the hub"):
            read_problems(data_config(name, dataset_subset="main"))


def test_the_built_in_rows_do_not_depend_on_the_seed() -> None:
    train, validation = read_problems(data_config("arithmetic", seed=0))
    assert (len(train), len(validation)) == tuple(
        sources.STANDARD[split][1] for split in ("train", "validation")
    )
    assert (train, validation) == read_problems(data_config("arithmetic", seed=1))
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in validation}
