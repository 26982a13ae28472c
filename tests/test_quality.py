"""The study of what an ensemble is worth runs anywhere, and compares what it says that it compares."""

import json
import random
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from preloaded import forked

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import quality  # noqa: E402
import quality_arms  # noqa: E402
import quality_page  # noqa: E402
import quality_runs  # noqa: E402
import quality_tasks  # noqa: E402

from chorus.model.base import load_tokenizer  # noqa: E402

WORDS = {"warm red": ("fire", "blood", "rose"), "cold blue": ("sky", "sea", "ice")}
TINY = "assets/tiny-gemma-2"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task of two labels, as `--task` takes it."""
    folder, rng = tmp_path_factory.mktemp("task"), random.Random(0)
    for share, count in (("train", 40), ("val", 16), ("test", 12)):
        rows = [
            {"question": f"{rng.choice(WORDS[label])} {number}", "answer": label}
            for number, label in enumerate(rng.choices(list(WORDS), k=count))
        ]
        (folder / f"{share}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ood.jsonl").write_text('{"question": "zzz", "answer": "?"}\n' * 6)
    return "toy=" + ",".join(str(folder / f"{share}.jsonl") for share in ("train", "val", "test", "ood"))


def options(task: str, **more: object) -> Namespace:
    counts = {"train_rows": 16, "val_rows": 16, "test_rows": 12, "batch_size": 8}
    return Namespace(
        **{"model": TINY, "task": [task], "rank": 2, "new_tokens": 4, "longest": 512, **counts, **more}
    )


@pytest.fixture(scope="module")
def bench(task: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[quality_runs.Bench]:
    # The study sets it. Not by monkeypatch, which deletes it at the end: no later test could compile.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True):
        yield next(quality.benches(options(task), tmp_path_factory.mktemp("rows")))


def test_the_seeds_of_independent_loras_in_one_run_are_runs_of_their_own(bench: quality_runs.Bench):
    settings = {"per_agent_batches": True, "lambda_sw": 0.0, "lr": 4e-3, "seed": 3}
    alone = quality_runs.train_agents(bench, {**settings, "num_agents": 1}, 4)
    beside = quality_runs.train_agents(bench, {**settings, "num_agents": 2, "lr": [4e-3, 8e-3]}, 4)
    torch.testing.assert_close(beside.members[0], alone.members[0], rtol=1e-4, atol=1e-6)
    assert not torch.equal(beside.members[0], beside.members[1])


def test_members_in_their_seats_answer_as_the_run_left_them(bench: quality_runs.Bench):
    members = quality_runs.train_agents(bench, {"num_agents": 2, "lambda_sw": 0.0, "lr": 4e-3}, 4).members
    nll = quality_runs.calibrated_nll(bench, members, 2)[0]
    other = quality_runs.calibrated_nll(bench, [torch.zeros_like(own_F) for own_F in members], 2)[0]
    assert nll < other  # zeros are the base
    scores, drawn = quality_runs.scored(bench, members, 2)
    assert {"nll", "auroc_errors", "auroc_ood", "accuracy"} <= drawn.keys()
    mean = sum(drawn["nll"]) / len(drawn["nll"])
    assert mean == pytest.approx(scores["nll"], rel=0.1)


def test_no_row_is_in_two_shares_and_shares_without_a_file_come_from_training(tmp_path: Path):
    file = tmp_path / "all.jsonl"
    asked = [*(str(n) for n in range(100)), "too long " * 50]
    file.write_text("".join(json.dumps({"question": one, "answer": one[:3]}) + "\n" for one in asked))
    sizes = quality_tasks.Sizes(train=50, val=10, test=15, ood=5, multiple=8, longest=60)
    found = quality_tasks.shares_of_files([str(file)], sizes, load_tokenizer(TINY))
    assert {share: len(rows) for share, rows in found.items()} == {
        "train": 48,
        "val": 10,
        "test": 15,
        "ood": 0,
    }
    asked = [row["question"] for rows in found.values() for row in rows]
    assert len(set(asked)) == len(asked)
    assert not any(one.startswith("too long") for one in asked)


def test_every_label_is_a_token_of_its_own():
    tokenizer = load_tokenizer(TINY)
    labels = ["has", "Ada has", "has Ada", "qqq"]
    rows = {share: [{"answer": label} for label in labels] for share in ("train", "val", "test", "ood")}
    words = [row["answer"] for row in quality_tasks.with_one_token_labels(rows, tokenizer)["train"]]
    tokens = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
    assert [len(own) for own in tokens] == [1, 1, 1, 1]
    assert len({own[0] for own in tokens}) == 4


def test_the_combination_takes_what_helps_and_goes_together():
    sources = [arm for arm in quality_arms.arms(4, 8, []) if arm.is_source]
    found = {
        quality_arms.SHARED: (1.0, {}),
        quality_arms.APART: (0.9, {}),
        "Chorus, SWD of hidden states": (0.8, {"lambda_sw": 0.1}),
        "Chorus, DropConnect": (0.95, {"dropconnect_p": 0.2}),
        "Chorus, bootstrap": (1.1, {"bootstrap": "poisson"}),
    }
    (arm,) = quality_arms.combined_arms(4, 8, [], found, sources)
    # The distance helps more than batches of each agent's own, and excludes them.
    assert dict(arm.settings) == {"lambda_sw": 0.1, "dropconnect_p": 0.2}
    del found["Chorus, DropConnect"]
    assert quality_arms.combined_arms(4, 8, [], found, sources) == []


def test_a_difference_is_paired_draw_by_draw():
    hard = [0.1 * n for n in range(40)]  # draws that are hard for both
    rows = [
        {"seeds": [{"nll": mean}], "draws": {"nll": " ".join(str(mean + more) for more in hard)}}
        for mean in (1.0, 1.25)
    ]
    assert quality_page.difference(*rows, "nll") == pytest.approx((-0.25, -0.25, -0.25))
    assert quality_page.is_better(*rows, "nll", -1)
    assert not quality_page.is_better(*rows[::-1], "nll", -1)


def test_what_other_seeds_would_turn_around_is_not_clearly_better():
    def row(*nll: float) -> dict[str, Any]:
        mean = sum(nll) / len(nll)
        return {"seeds": [{"nll": one} for one in nll], "draws": {"nll": f"{mean} {mean}"}}

    other = row(1.0, 1.1, 1.2)
    steady, unsteady = row(0.8, 0.9, 1.0), row(0.5, 0.8, 1.4)  # standard errors of a difference .08 and .27
    for one, is_clear in ((steady, True), (unsteady, False)):
        assert quality_page.is_better(one, other, "nll", -1)
        assert quality_page.is_clearly_better(one, other, "nll", -1) == is_clear
    assert not quality_page.exceeds_seeds(other, row(0.9), "nll")  # one seed has no spread
    assert not quality_page.exceeds_seeds(steady, other, "auroc_errors")  # which neither has


def test_the_page_says_where_times_were_taken_again():
    what = {"device": "A", "dtype": "b", "torch": "2", "transformers": "5", "command": "c"}
    about, timed, by_stock = ({**what, "commit": commit} for commit in ("first", "second", "third"))
    arm = {"kind": "arm", "base": "b", "task": "t", "arm": "one LoRA, rank 2", "size": 1, "rank": 2}
    scores = {"seeds": [{"nll": 0.5}], "draws": {"nll": "0.5"}, "passes": 8, "train_s": 1.0}
    stock = {**arm, "kind": "stock", "ms_per_step": 1.0, "about": by_stock}
    page = quality_page.page([{**arm, **scores, "about": about, "timed": timed}, stock])
    machines = [line for line in page.splitlines() if "commit" in line]
    said = [line.partition("A,")[0] + line.partition("commit ")[2] for line in machines]
    assert said == ["- first: `c`", "- times: second: `c`", "- stock PEFT: third: `c`"]


def test_a_study_goes_on_where_it_ended(task: str, tmp_path: Path):
    shape = ["--agents", "2", "--sizes", "--rank", "2", "--rates", "8e-3", "--epochs", "2", "--seeds", "2"]
    rows = ["--train-rows", "16", "--val-rows", "16", "--test-rows", "12", "--batch-size", "8"]
    command = ["--task", task, "--out", str(tmp_path), *shape, *rows]
    asked = ["--arms", "base", "one LoRA, rank 2", "MC"]
    ended = forked([sys.executable, "benchmarks/quality.py"], *command, *asked)
    assert ended.returncode == 0, ended.stderr[-3000:]
    first = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [row["arm"] for row in first if row["kind"] == "arm"] == [
        "base",
        "one LoRA, rank 2",
        "MC dropout on weights, K passes",
    ]
    assert not any("failed" in row for row in first)
    assert all(len(row["seeds"]) == 2 for row in first if row["size"] and row["kind"] == "arm")
    page = (tmp_path / "quality.md").read_text()
    assert "Best single LoRA, by the test rows themselves: one LoRA, rank" in page
    assert (tmp_path / "quality-toy-tiny-gemma-2.png").stat().st_size > 0
    forked([sys.executable, "benchmarks/quality.py"], *command, "--arms", "base", "snapshots")
    both = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert both[: len(first)] == first
    assert {row["arm"] for row in both[len(first) :]} == {"K snapshots of one LoRA"}
