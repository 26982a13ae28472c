"""The arithmetic of a run, and the example that is shown of its rows."""

from pathlib import Path

from rows import TOKENIZER, data_config, read_rows, write_lines
from tokenizers_made import make_tokenizer

from chorus.config import RunConfig
from chorus.data.samples import Samples
from chorus.planning.forecast import Machine
from chorus.planning.run_plan import plan, sample_tokens

ROW = {"question": "1 + 1?", "answer": "2"}


def samples(folder: Path, num_rows: int) -> Samples:
    return read_rows(data_config(write_lines(folder / "rows.jsonl", [ROW] * num_rows))).train


def planned(folder: Path, num_rows: int, num_processes: int, **settings):
    config = RunConfig(**{"max_train_steps": None, **settings})
    machine = Machine("cpu", num_processes, agent_size=config.agent_parallel_size)
    rows = samples(folder, num_rows)
    return plan(config, rows, trainable=1000, base_parameters=5, machine=machine), config


def test_steps_are_those_that_take_every_row_once_an_epoch(tmp_path: Path):
    run, config = planned(tmp_path, 50, 2, batch_size=4, gradient_accumulation_steps=3, epochs=2)
    assert (run.rows_of_a_step, run.steps_of_an_epoch, run.steps) == (24, 3, 6)
    told = dict(run.describe(config))
    assert told["a step"].startswith("24 rows = batch_size 4 x accumulation 3 x processes 2")
    assert told["steps"] == "6 (3 an epoch, 2.00 epochs)"
    assert planned(tmp_path, 50, 2, batch_size=4, max_train_steps=7)[0].steps == 7


def test_it_says_in_what_the_agents_rows_differ(tmp_path: Path):
    told = []
    for settings in ({}, {"bootstrap": "poisson"}, {"per_agent_batches": True, "lambda_sw": 0}):
        run, config = planned(tmp_path, 50, 1, **settings)
        told.append(dict(run.describe(config))["a step"].partition("; ")[2])
    assert told == [
        "every agent sees all",
        "every agent sees all, weighted (bootstrap poisson)",
        "every agent has its own",
    ]


def test_it_says_who_holds_which_agents_and_what_each_process_sends(tmp_path: Path):
    batch = {"batch_size": 4, "lambda_sw": 0.01, "swd_points_per_row": 2, "swd_num_projections": 5}
    run, config = planned(tmp_path, 50, 4, num_agents=4, agent_parallel_size=2, **batch)
    told = dict(run.describe(config))
    assert told["a step"].startswith(
        "8 rows = batch_size 4 x accumulation 1 x processes 4 / agent_parallel_size 2"
    )
    assert told["processes"] == "0 to 1: agents 0 to 1; 2 to 3: agents 2 to 3"
    projected = 4 * 2 * (4 * 2) * 5  # fp32, 2 agents, 4 rows of 2 points, 5 projections
    assert run.sent == (2 * 4 * 500 // 2, 0, projected, 2 * projected)
    assert told["sent"] == "0.00 MB gradients, 0.00 MB projections, by each process in a step"
    assert "processes" not in dict(planned(tmp_path, 50, 1, **batch)[0].describe(config))


def test_a_checkpoint_takes_twelve_bytes_for_each_trained_number_and_so_many_are_kept(tmp_path: Path):
    run, _ = planned(tmp_path, 10, 1, batch_size=1, save_steps=2, save_total_limit=3)
    assert run.checkpoint_bytes == 12 * 1000 + 10**6
    assert run.checkpoints == 3 + 1  # and the one that is being written
    assert (
        planned(tmp_path, 10, 1, batch_size=1, save_steps=2, save_total_limit=None)[0].checkpoints == 15 + 1
    )
    assert planned(tmp_path, 10, 1, batch_size=1)[0].checkpoints == 1 + 1


def test_the_view_of_a_row_puts_loss_on_the_completion_and_the_end_token(tmp_path: Path):
    tokens = sample_tokens(samples(tmp_path, 1), 0, TOKENIZER)
    assert "".join(token["text"] for token in tokens if token["loss"]) == " 2<eos>"
    assert "".join(token["text"] for token in tokens) == "<bos>Q: 1 + 1?\nA: 2<eos>"
    assert not any(token["unlearnt"] for token in tokens)


def test_the_view_of_a_row_marks_a_token_that_takes_a_part_of_the_completion_out_of_the_loss(tmp_path: Path):
    """The tokenizer joins b with c."""
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "ab", "answer": "cd"}])
    config = data_config(path, prompt_template="{question}", completion_template="{answer}")
    tokenizer = make_tokenizer()
    tokens = sample_tokens(read_rows(config, tokenizer).train, 0, tokenizer)
    assert [token["text"] for token in tokens if token["unlearnt"]] == ["bc"]
    assert [token["text"] for token in tokens if token["loss"]] == ["d", "<eos>"]
