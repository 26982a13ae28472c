"""`chorus evaluate` as its users call it: on a run, on a
checkpoint, and on adapters that stock PEFT has made alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import PLAIN, ddp
from peft import LoraConfig, PeftModel, get_peft_model
from preloaded import forked, train
from stock_adapters import BASE, base, write_adapters
from transformers import AutoTokenizer

from chorus.checkpoint.store import checkpoints

pytestmark = pytest.mark.launch
QUESTIONS = [
    {"question": f"Ada has {n} apples. Ben gives Ada 7 more.", "answer": f"{n + 7}"} for n in range(12, 24)
]
FEW = ("max_new_tokens_eval=4", "ood_samples=3")


def evaluate(*arguments: str | Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """`chorus evaluate ARGUMENTS`, in forked processes."""
    starter = [sys.executable] if processes == 1 else ddp(processes)[:-1]
    return forked([*starter, "src/chorus/__main__.py"], "evaluate", *map(str, arguments))


def numbers(scores: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if value is not None}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = ("num_agents=2", "lora_rank=2", "batch_size=2", "max_train_steps=2", "eval_samples=4", *FEW)
    train(PLAIN, folder, *settings, "num_warmup_steps_ratio=0", "dirichlet_alpha_aggregator=1")
    return folder


def test_adapters_of_stock_peft_have_the_nll_that_stock_peft_gives_them(
    adapters: list[Path], data: Path, tmp_path: Path
):
    problems = tmp_path / "scored.jsonl"
    result = evaluate(
        *adapters, "--data", data, "--json", "--problems", problems, *FEW, "calibration_split=0.25"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["agents"] == {"agent_0": "one", "agent_1": "other"}
    assert (found["num_problems"], found["num_calibration"], found["num_ood"]) == (9, 3, 0)
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    assert len(rows) == 9
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for name, folder in zip(("agent_0", "agent_1"), adapters, strict=True):
        model = PeftModel.from_pretrained(base(), str(folder)).eval()
        nlls = []
        for row in rows:
            asked = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor(
                [[*tokenizer(row["prompt"] + row["reference"])["input_ids"], tokenizer.eos_token_id]]
            )
            with torch.no_grad():
                log_prob_TV = model(ids[:, :-1]).logits[0].log_softmax(-1)
            nll_T = -log_prob_TV.gather(1, ids[0, 1:, None])[len(asked) - 1 :, 0]
            assert row["answers"][name]["reference_nll"] == pytest.approx(float(nll_T.sum()), rel=1e-3)
            nlls.append(nll_T)
        assert found["scores"][name]["token/NLL"] == pytest.approx(float(torch.cat(nlls).mean()), rel=1e-3)
    assert {"base", "uniform", "fitted", "fitted/calibrated"} < found["scores"].keys()
    low, high = found["intervals"]["agent_0"]["token/NLL"]
    assert low < found["scores"]["agent_0"]["token/NLL"] < high


def test_two_processes_score_what_one_scores(adapters: list[Path], data: Path):
    arguments = (*adapters, "--data", data, "--ood", data, "--json", *FEW)
    one, two = evaluate(*arguments), evaluate(*arguments, processes=2)
    assert two.returncode == 0, two.stderr[-2000:]
    alone, together = json.loads(one.stdout), json.loads(two.stdout)
    assert (together["num_problems"], together["num_ood"]) == (9, 3)
    assert alone["scores"].keys() == together["scores"].keys()
    for name, own in alone["scores"].items():
        assert numbers(together["scores"][name]) == pytest.approx(numbers(own), rel=1e-3, abs=1e-3), name
    assert together["mixture"]["weights"] == pytest.approx(alone["mixture"]["weights"], abs=1e-3)


def test_a_run_is_scored_on_its_own_held_out_rows(run: Path):
    result = evaluate(run, "--json")
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    after = json.loads((run / "ensemble.json").read_text())["evaluation"]["after"]["scores"]
    for name, own in after.items():
        assert numbers(found["scores"][name]) == pytest.approx(numbers(own), rel=1e-3, abs=1e-4), name


def test_a_checkpoint_gives_a_table_with_every_answerer(run: Path):
    result = evaluate(checkpoints(run)[0], "eval_samples=4", *FEW)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("base", "agent 0", "agent 1", "mixture", "fitted"):
        assert f"│ {name} " in result.stdout


def test_what_cannot_be_used_is_refused_in_one_line(
    adapters: list[Path], data: Path, run: Path, tmp_path: Path
):
    empty, text = tmp_path / "empty.jsonl", tmp_path / "text"
    empty.touch()
    text.mkdir()
    damaged = tmp_path / "step_000002"
    damaged.mkdir()
    for file in checkpoints(run)[0].rglob("*"):
        if file.is_file():
            (damaged / file.relative_to(checkpoints(run)[0])).parent.mkdir(parents=True, exist_ok=True)
            (damaged / file.relative_to(checkpoints(run)[0])).write_bytes(file.read_bytes())
    weights = damaged / "agents" / "agent_1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    foreign = tmp_path / "foreign"
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(foreign))
    described = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(
        json.dumps(described | {"target_modules": ["no_such_layer"]})
    )
    cases = {
        "no ensemble": ((tmp_path / "nowhere",), "no such folder"),
        "no adapters": ((text, "--data", data), "holds no adapters"),
        "no data": ((adapters[0],), "name one with --data FILE"),
        "no rows": ((*adapters, "--data", empty), "empty"),
        "no such data": ((*adapters, "--data", tmp_path / "none.jsonl"), "does not exist"),
        "damaged": ((damaged,), "is not as it was written"),
        "foreign": ((foreign, adapters[0], "--data", data), "foreign"),
        "equal": ((adapters[0], adapters[0], "--data", data), "is the same agent"),
        "a misspelt key": ((run, "eval_sample=3"), "did you mean 'eval_samples'"),
        "a misspelt option": ((run, "--jsn"), "--help shows"),
    }
    for name, (arguments, message) in cases.items():
        result = evaluate(*arguments)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2, (name, result.stderr[-1000:])
        assert len(lines) == 1, name
        assert message in lines[0], (name, lines)
        assert "Traceback" not in result.stderr, name
