"""The rows of a run: which are held out, what is said of them, and what is kept of them on disk."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from files_made import GOOD, PROBLEMS, ROWS, write
from launching import ddp
from preloaded import forked
from rows import TOKENIZER, data_config, read_problems, read_rows, samples_of, texts_of
from tokenizers_made import make_tokenizer

from chorus.data import cache
from chorus.data.rows import data_fingerprint
from chorus.data.templates import Problem
from chorus.data.tokenise import tell_unreadable
from chorus.errors import InputError


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_held_out_rows_and_training_rows_partition_the_source_in_its_order(
    source: Path, fraction: float
) -> None:
    train, validation = read_problems(data_config(source, validation_split=fraction))
    assert len(validation) == min(max(1, round(20 * fraction)), 19)
    assert [problem for problem in PROBLEMS if problem in validation] == validation
    assert [problem for problem in PROBLEMS if problem not in validation] == train


def test_the_seed_alone_chooses_the_held_out_rows(source: Path) -> None:
    global_state = random.getstate()
    chosen = [
        read_problems(data_config(source, validation_split=0.3, seed=seed, debug_subset_size=size))[1]
        for seed in (0, 1)
        for size in (None, 5)
    ]
    assert chosen[0] == chosen[1] != chosen[2] == chosen[3]
    assert random.getstate() == global_state


def test_a_single_row_is_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD])
    assert read_problems(data_config(path, validation_split=0.5)) == ([("Q: q\nA:", " a")], [])


def test_the_debug_subset_is_the_first_training_rows(source: Path) -> None:
    everything = read_problems(data_config(source, validation_split=0.3))
    for size in (1, 5, 1000):
        subset = read_problems(data_config(source, validation_split=0.3, debug_subset_size=size))
        assert subset == (everything[0][:size], everything[1])


# ---- what is said of rows, and what is refused ----


LONG = [{"question": "a " * count, "answer": "b c"} for count in (1, 2, 30, 60)]


def test_cut_rows_are_counted_and_the_first_one_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", LONG)
    rows = read_rows(data_config(path, max_seq_length=38))
    rows.log()
    assert [len(sample.ids) for sample in rows.train] == [min(length, 38) for length in rows.train.lengths]
    assert all(sample.num_targets > 0 for sample in rows.train)
    assert (
        f"cut {(rows.chosen.lengths > 38).sum()} of 4 training rows to max_seq_length 38 tokens"
        in caplog.text
    )
    assert (
        f"{4 - len(rows.train)} of them have no target token left and are dropped; first {path}:"
        in caplog.text
    )


def test_rows_that_fit_bring_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 3  # of which transformers would warn
    rows = read_rows(data_config(write(tmp_path / "rows.jsonl", LONG)), tokenizer)
    rows.log()
    assert len(rows.train) == 4
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert not any(capfd.readouterr())


@pytest.mark.parametrize(("limit", "count"), [(20, 3), (7, 4)])
def test_rows_that_mostly_lose_their_answer_to_the_limit_are_refused(
    tmp_path: Path, limit: int, count: int
) -> None:
    path = write(tmp_path / "rows.jsonl", [*LONG[2:], LONG[3], LONG[0]])
    said = rf"'max_seq_length': {limit} leaves no target token of the answer in {count} of 4 training rows"
    with pytest.raises(InputError, match=rf"{said} \(first {path}:1"):
        read_rows(data_config(path, max_seq_length=limit))


def test_rows_that_mostly_lose_their_answer_to_the_prompt_are_refused(tmp_path: Path) -> None:
    """The tokenizer joins b with c: of the answer c nothing is left to learn."""
    path = write(tmp_path / "rows.jsonl", [{"question": q, "answer": "c"} for q in ("a", "b", "b")])
    keys = {"prompt_template": "{question}", "completion_template": "{answer}"}
    with pytest.raises(
        InputError, match=rf"in 2 of 3 training rows no token of the answer carries .*\(first {path}:2\)"
    ):
        read_rows(data_config(path, **keys), make_tokenizer())


def test_characters_that_carry_no_loss_are_counted_and_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": q, "answer": "cd"} for q in ("a", "b", "b")])
    keys = {"prompt_template": "{question}", "completion_template": "{answer}"}
    read_rows(data_config(path, **keys), make_tokenizer()).log()
    assert (
        "2 characters at the beginning of the completion carry no loss, in 2 of 3 training rows"
        in caplog.text
    )
    assert f"first {path}:2, where 'b' ends the prompt and 'cd' begins the completion" in caplog.text


def test_a_row_with_a_token_that_the_base_cannot_read_is_named(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has one for images, which a text may hold by its name."""
    rows = [GOOD, {"question": "q", "answer": "a <image>"}, GOOD]
    config = data_config(write(tmp_path / "rows.jsonl", rows))
    tokenizer = make_tokenizer()
    assert len(read_rows(config, tokenizer).train) == 3
    tell_unreadable(tokenizer, ["<image>"])
    words = r"rows.jsonl:2: it holds '<image>', a token .*; correct the row, or set skip_bad_rows: true"
    with pytest.raises(InputError, match=words):
        read_rows(config, tokenizer)
    assert len(read_rows(config.model_copy(update={"skip_bad_rows": True}), tokenizer).train) == 2


def test_held_out_rows_are_those_that_training_would_keep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt that fills max_seq_length is left out of NLL and
    of generation alike, and no prompt is longer."""
    train, held_out = write(tmp_path / "train.jsonl", LONG), write(tmp_path / "other.jsonl", LONG)
    config = data_config(train, validation_dataset_name=str(held_out), max_seq_length=38)
    rows = read_rows(config)
    scored = rows.held_out(TOKENIZER, 10)
    assert [row.sample.ids.tolist() for row in scored.rows] == [sample.ids.tolist() for sample in rows.train]
    assert all(row.prompt == row.sample.ids[: len(row.prompt)].tolist() for row in scored.rows)
    assert all(TOKENIZER.decode(row.answer) == " b c<eos>" for row in scored.rows)
    assert max(len(row.prompt) for row in scored.rows) < 38
    assert (
        f"{4 - len(scored.rows)} of them have no target token left and are dropped; first {held_out}:"
        in caplog.text
    )
    assert len(rows.held_out(TOKENIZER, 1).rows) == 1


def test_a_conversation_whose_last_answer_is_cut_off_is_not_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its earlier answers are trained; asked after the cut, agents would read more than training shows."""
    short = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2"}]
    rows = [
        {"messages": turns} for turns in (short, [*short, {"role": "user", "content": "a " * 60}, short[1]])
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    read = read_rows(data_config(path, validation_dataset_name=str(path), max_seq_length=40))
    scored = read.held_out(TOKENIZER, 10)
    assert (len(read.train), len(scored.rows)) == (2, 1)
    assert len(scored.rows[0].prompt) < 40
    assert "left 1 of 2 held-out rows out: what stands before their last answer has more than" in caplog.text


def test_held_out_rows_that_are_the_training_rows_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, other = write(tmp_path / "a.jsonl", LONG[:1]), write(tmp_path / "b.jsonl", LONG[:1])
    read_problems(data_config(path, validation_dataset_name=str(other)))
    assert "held-out rows are the training rows" not in caplog.text
    same = f"{tmp_path}/../{tmp_path.name}/a.jsonl"
    read_problems(data_config(path, validation_dataset_name=same))
    assert "held-out rows are the training rows" in caplog.text


def test_stray_beginnings_and_a_backslash_for_a_line_break_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "q", "answer": "a"}, {"question": "<bos>q", "answer": "a"}]
    path = write(tmp_path / "rows.jsonl", rows)
    read_problems(data_config(path, prompt_template="Q: {question}\\nA:"))
    assert (
        f"1 beginning tokens are not at the beginning, in 1 of 2 training rows, first {path}:2" in caplog.text
    )
    assert "key 'prompt_template' holds a backslash and an n, and no line break" in caplog.text


# ---- what is kept on disk ----


def test_a_second_start_reads_no_row_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_config(
        write(tmp_path / "rows.jsonl", ROWS), validation_split=0.3, data_cache_dir=str(tmp_path / "kept")
    )
    first = read_rows(config)
    monkeypatch.setattr(cache, "_write", lambda *_: pytest.fail("tokenised again"))
    again = read_rows(config)
    assert again.fingerprint == first.fingerprint
    for one, other in zip(first.train, again.train, strict=True):
        assert all(map(torch.equal, one, other))
    assert texts_of(again.held_out_samples) == texts_of(first.held_out_samples)
    other_seed = read_rows(config.model_copy(update={"seed": 1}))  # other rows of the same file
    assert other_seed.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt_template": "{question}"}, {"completion_template": "{answer}"}, {"max_seq_length": 50},
        {"skip_bad_rows": True}, {"optional_columns": []}, {"row_format": "chat"},
    ],
)  # fmt: skip
def test_whatever_changes_rows_makes_another_cache(tmp_path: Path, changed: dict) -> None:
    config = data_config(write(tmp_path / "rows.jsonl", ROWS), data_cache_dir=str(tmp_path / "kept"))
    read_rows(config)
    read_rows(data_config(config.dataset_name, data_cache_dir=config.data_cache_dir, **changed))
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_another_file_or_tokenizer_makes_another_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    config = data_config(path, data_cache_dir=str(tmp_path / "kept"))
    before = read_rows(config)
    write(path, ROWS[::-1])
    assert read_rows(config).fingerprint != before.fingerprint
    other = read_rows(config, make_tokenizer())
    assert other.train[0].ids.tolist() != before.train[0].ids.tolist()


def test_a_cache_left_half_written_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_config(write(tmp_path / "rows.jsonl", ROWS), data_cache_dir=str(tmp_path / "kept"))
    with monkeypatch.context() as broken:
        broken.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(
            InputError, match=r"key 'data_cache_dir': cannot write tokenised rows .*No space left"
        ):
            read_rows(config)
    assert not list((tmp_path / "kept").iterdir())
    assert len(read_rows(config).train) == 20


def test_samples_travel_to_a_worker_as_the_path_of_their_file(tmp_path: Path) -> None:
    samples = read_rows(data_config(write(tmp_path / "rows.jsonl", ROWS))).train
    sent = pickle.dumps(samples)
    assert len(sent) < 1_000 + 8 * len(samples)
    for one, other in zip(samples, pickle.loads(sent), strict=True):
        assert all(map(torch.equal, one, other))


def test_more_rows_than_a_batch_of_the_file_are_each_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BATCH", 3)
    config = data_config(write(tmp_path / "rows.jsonl", ROWS), data_cache_dir=str(tmp_path / "kept"))
    rows = read_rows(config)
    assert texts_of(rows.train) == PROBLEMS
    assert [rows.train.place(n) for n in (0, 2, 3, 19)] == [
        f"{config.dataset_name}:{n}" for n in (1, 3, 4, 20)
    ]
    expected = samples_of([Problem(*problem) for problem in PROBLEMS], TOKENIZER)
    for one, other in zip(rows.train, expected, strict=True):
        assert all(map(torch.equal, one, other))
    assert rows.train.num_targets.tolist() == [sample.num_targets for sample in expected]
    assert rows.fingerprint == data_fingerprint(Problem(*problem) for problem in PROBLEMS)


# ---- several processes ----


WORKER = """
import sys, json
from pathlib import Path
from accelerate import Accelerator
from rows import data_config
from transformers import AutoTokenizer
from chorus.data import cache
from chorus.data.rows import read_rows
from chorus.errors import InputError

accelerator = Accelerator(cpu=True)
written, write = [], cache._write
cache._write = lambda *a: (written.append(1), write(*a))
config = data_config(sys.argv[1], data_cache_dir=sys.argv[2])
try:
    rows = read_rows(config, 0, AutoTokenizer.from_pretrained("assets/tiny-gemma-2"), accelerator)
    said = [len(rows.train), rows.fingerprint, rows.train[3].ids.tolist()]
except InputError as error:
    said = str(error)
told = [accelerator.process_index, len(written), said]
Path(sys.argv[2], f"told-{accelerator.process_index}.json").write_text(json.dumps(told))
accelerator.end_training()
"""


@pytest.mark.launch
def test_one_process_of_a_host_tokenises_and_all_read_or_all_fail(tmp_path: Path) -> None:
    def of_two(path: Path) -> list:
        script = tmp_path / "worker.py"
        script.write_text(WORKER)
        command = [*ddp(2)[:-1], str(script)]
        result = forked(command, str(path), str(tmp_path / "kept"))
        assert result.returncode == 0, result.stderr[-3000:]
        return [json.loads((tmp_path / "kept" / f"told-{rank}.json").read_text()) for rank in (0, 1)]

    first, second = of_two(write(tmp_path / "rows.jsonl", ROWS))
    assert (first[:2], second[:2]) == ([0, 1], [1, 0])
    assert first[2] == second[2]
    first, second = of_two(write(tmp_path / "bad.jsonl", [*ROWS, {"question": "q"}]))
    assert first[2] == second[2]
    assert "bad.jsonl:21: field 'answer' is missing" in first[2]
