"""The arithmetic of a run, and the example that is shown of its rows."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chorus.config import Config
from chorus.data.sources import Problem, read_problems
from chorus.errors import InputError
from chorus.planning.run_plan import Rows, place_of, plan, read_rows, sample_tokens

TOKENIZER = AutoTokenizer.from_pretrained("assets/tiny-gemma-2")
PROBLEM = Problem("Question: 1 + 1?\nAnswer:", " 2")


def planned(num_rows: int, num_processes: int, **settings):
    config = Config(**{"max_train_steps": None, **settings})
    rows = read_rows([PROBLEM] * num_rows, TOKENIZER, 128)
    return plan(config, rows, trainable=1000, base_parameters=5, num_processes=num_processes), config


def test_steps_are_those_that_take_every_row_once_an_epoch():
    run, config = planned(50, 2, batch_size=4, gradient_accumulation_steps=3, epochs=2)
    assert (run.rows_of_a_step, run.steps_of_an_epoch, run.steps) == (24, 3, 6)
    told = dict(run.describe(config))
    assert told["a step"].startswith("24 rows = batch_size 4 x accumulation 3 x processes 2")
    assert told["steps"] == "6 (3 an epoch, 2.00 epochs)"
    assert planned(50, 2, batch_size=4, max_train_steps=7)[0].steps == 7


def test_a_checkpoint_takes_twelve_bytes_for_each_trained_number_and_so_many_are_kept():
    run, _ = planned(10, 1, batch_size=1, save_steps=2, save_total_limit=3)
    assert run.checkpoint_bytes == 12 * 1000 + 10**6
    assert run.checkpoints == 3 + 1  # and the one that is being written
    assert planned(10, 1, batch_size=1, save_steps=2, save_total_limit=None)[0].checkpoints == 15 + 1
    assert planned(10, 1, batch_size=1)[0].checkpoints == 1 + 1


def test_the_view_of_a_row_puts_loss_on_the_completion_and_the_end_token():
    (sample,) = read_rows([PROBLEM], TOKENIZER, 128).samples
    tokens = sample_tokens(sample, TOKENIZER)
    assert "".join(token["text"] for token in tokens if token["loss"]) == " 2<eos>"
    assert "".join(token["text"] for token in tokens) == f"<bos>{PROBLEM.prompt} 2<eos>"


def test_rows_are_cut_and_their_whole_lengths_known():
    long = Problem("Question: 1 + 1?\nAnswer:", " 2" * 40)
    rows = read_rows([PROBLEM, long], TOKENIZER, 30)
    assert [len(sample.ids) for sample in rows.samples] == [rows.lengths[0], 30]
    assert rows.lengths[1] > 30 >= rows.lengths[0]
    with pytest.raises(InputError, match="'max_seq_length': 3 leaves no target"):
        read_rows([PROBLEM], TOKENIZER, 3)
    assert isinstance(rows, Rows)


def test_a_row_is_found_where_it_stands(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    rows = [{"question": str(number), "answer": "a"} for number in range(5)]
    rows.insert(2, {"question": None, "answer": "a"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(dataset_name=str(file), skip_bad_rows=True, validation_split=0.0)
    problems = read_problems(config).train
    assert place_of(config, problems[3]) == f"{file}:5"
