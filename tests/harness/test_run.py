"""lm-evaluation-harness gets from the ensemble what it gets from its own model of each merged adapter."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from stock import save_adapter, stock_base, word_tokenizer, write_base

pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel

from chorus.commands.harness import main
from chorus.ensemble.load import load_ensemble
from chorus.errors import InputError
from chorus.harness.run import HarnessResults, run_harness
from chorus.model.base import load_tokenizer

WEIGHTS, TEMPERATURE = [0.7, 0.3], 1.5
TASKS = ["toy_choices", "toy_texts", "toy_rolling"]
# A question of several choices; a text to write, up to a stop string; a text to read, longer than the base.
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: {text}
"""
MORE = {
    "toy_choices": 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{right}}"\nmetric_list: [{metric: acc}]\n',
    "toy_texts": 'doc_to_target: "{{long}}"\ngeneration_kwargs: {until: [w7, w33], max_gen_toks: 6}\n'
    "metric_list: [{metric: exact_match}]\n",
    "toy_rolling": 'doc_to_target: "{{long}}"\nmetric_list: [{metric: word_perplexity}]\n',
}
KINDS = {
    "toy_choices": ("multiple_choice", '"{{question}}"'),
    "toy_texts": ("generate_until", '"{{question}}"'),
    "toy_rolling": ("loglikelihood_rolling", '""'),
}
TEMPLATE = "{% for turn in messages %}w4 {{ turn.content }} {% endfor %}w5"


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{n}" for n in torch.randint(3, 61, (count,), generator=generator).tolist())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 24 positions with a chat template, a run of two agents, and the tasks."""
    folder = tmp_path_factory.mktemp("harness")
    write_base(folder / "base")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    for number in (0, 1):
        save_adapter(
            folder / "base", folder / "agents" / f"agent_{number}", number, r=3, target_modules="all-linear"
        )
    mixture = {"weights": WEIGHTS, "temperature": TEMPERATURE}
    entries = {"agents": ["agents/agent_0", "agents/agent_1"], "base_model": str(folder / "base"), **mixture}
    (folder / "ensemble.json").write_text(json.dumps(entries))
    rows = [
        {
            "question": words(4 + n % 5, n),
            "choices": [words(1 + (n + k) % 3, 100 + 7 * n + k) for k in range(3)],
            "right": n % 3,
            "long": words(20 + 9 * (n % 3), 50 + n),
        }
        for n in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, (kind, text) in KINDS.items():
        head = TASK.format(name=name, data=folder / "rows.jsonl", kind=kind, text=text)
        (folder / "tasks" / f"{name}.yaml").write_text(head + MORE[name])
    return folder


@pytest.fixture(scope="module")
def manager(place: Path) -> TaskManager:
    """Without the harness' own tasks, which take a quarter of a minute to list."""
    return TaskManager(include_path=str(place / "tasks"), include_defaults=False)


@pytest.fixture(scope="module")
def found(place: Path, manager: TaskManager) -> HarnessResults:
    tasks = manager.load(list(TASKS))["tasks"]
    return run_harness(load_ensemble(place), manager, tasks, TASKS, batch_size=3, bootstrap_iters=0)


def merged(place: Path, agent: int) -> Any:
    """One agent merged into the base by stock PEFT."""
    adapter = PeftModel.from_pretrained(stock_base(place / "base"), place / "agents" / f"agent_{agent}")
    return adapter.merge_and_unload().eval()


def stock_samples(
    place: Path, manager: TaskManager, model: Any, names: list[str], **how: Any
) -> dict[str, list[Any]]:
    """What the harness logs of a model of its own kind."""
    tokenizer = load_tokenizer(str(place / "base"))
    harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, backend="causal")
    evaluated: Any = simple_evaluate(
        harness_model, tasks=list(names), task_manager=manager, bootstrap_iters=0, **how
    )
    return evaluated["samples"]


def assert_same(own: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    for name, samples in expected.items():
        assert len(own[name]) == len(samples) == 8
        for one, other in zip(own[name], samples, strict=True):
            assert one["doc"] == other["doc"]
            if name == "toy_texts":
                assert one["filtered_resps"] == other["filtered_resps"]
            elif name == "toy_rolling":
                assert one["filtered_resps"] == pytest.approx(other["filtered_resps"], abs=1e-3)
            else:
                for (mine, is_mine), (theirs, is_theirs) in zip(
                    one["filtered_resps"], other["filtered_resps"], strict=True
                ):
                    assert mine == pytest.approx(theirs, abs=1e-4)
                    assert is_mine == is_theirs


def test_each_agent_and_the_base_answer_as_the_harness_own_model_does(
    place: Path, manager: TaskManager, found: HarnessResults
):
    assert list(found.results) == ["base", "agent_0", "agent_1", "mixture"]
    assert_same(found.samples["base"], stock_samples(place, manager, stock_base(place / "base"), TASKS))
    for agent in (0, 1):
        assert_same(
            found.samples[f"agent_{agent}"], stock_samples(place, manager, merged(place, agent), TASKS)
        )
    texts = [sample["filtered_resps"] for sample in found.samples["agent_0"]["toy_texts"]]
    assert texts != [sample["filtered_resps"] for sample in found.samples["agent_1"]["toy_texts"]]


def test_the_mixtures_likelihoods_are_those_of_the_pooled_probabilities(place: Path, found: HarnessResults):
    models, tokenizer = [merged(place, agent).double() for agent in (0, 1)], word_tokenizer()
    for sample in found.samples["mixture"]["toy_choices"]:
        asked = tokenizer(sample["doc"]["question"])["input_ids"]
        for choice, (likelihood, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            own = tokenizer(choice)["input_ids"]
            ids = torch.tensor([[*asked, *own]])
            with torch.no_grad():
                prob_KTV = torch.stack([model(input_ids=ids).logits[0].softmax(-1) for model in models])
            pooled_TV = sum(w * prob_TV for w, prob_TV in zip(WEIGHTS, prob_KTV, strict=True)).log()
            log_prob_TV = (pooled_TV / TEMPERATURE).log_softmax(-1)[len(asked) - 1 : -1]
            expected = float(log_prob_TV.gather(1, torch.tensor(own)[:, None]).sum())
            assert likelihood == pytest.approx(expected, abs=1e-4)


def test_nll_and_auroc_over_the_choices_come_from_the_logged_likelihoods(found: HarnessResults):
    for answerer, own in found.results.items():
        probabilities, right = [], []
        for sample in found.samples[answerer]["toy_choices"]:
            prob_C = torch.tensor([one for one, _ in sample["filtered_resps"]], dtype=torch.float64).softmax(
                -1
            )
            probabilities.append(prob_C)
            right.append(sample["doc"]["right"])
        nll = sum(-math.log(float(p[k])) for p, k in zip(probabilities, right, strict=True)) / 8
        wrong = [int(p.argmax()) != k for p, k in zip(probabilities, right, strict=True)]
        scores = own["toy_choices"]
        assert scores["choice_nll"] == pytest.approx(nll)
        assert scores["acc"] == pytest.approx(1 - sum(wrong) / 8)
        assert scores["choice_auroc"] == pytest.approx(
            roc_auc_score(wrong, [1 - float(p.max()) for p in probabilities])
        )
        assert 0 <= scores["choice_ece"] <= 1
        assert not any(key.startswith("choice") for key in own["toy_texts"])


def test_chats_are_asked_in_the_bases_template(place: Path, manager: TaskManager):
    tasks, how = manager.load(["toy_texts"])["tasks"], {"apply_chat_template": True}
    found = run_harness(load_ensemble(place), manager, tasks, ["toy_texts"], bootstrap_iters=0, **how)
    expected = stock_samples(place, manager, merged(place, 1), ["toy_texts"], **how)
    assert_same(found.samples["agent_1"], expected)
    prompt = found.samples["agent_1"]["toy_texts"][0]["arguments"]
    assert "w4 w" in str(prompt)


@pytest.mark.slow
def test_the_command_prints_every_answerer_and_writes_samples(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    common = ["--tasks", "toy_choices", "--include_path", str(place / "tasks"), "--limit", "3"]
    main([str(place), *common, "--json", "--samples", str(tmp_path / "samples.jsonl")])
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["results"]) == ["base", "agent_0", "agent_1", "mixture"]
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["answerer"], row["task"]) for row in rows[:3]] == [("base", "toy_choices")] * 3
    assert len(rows) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "--tasks", "a"], "gone: no such folder"),
        ([".", "--tasks", ","], "--tasks: names no task"),
        pytest.param(
            *([".", "--tasks", "no_such_task_here"], "no_such_task_here: the harness has no such task"),
            marks=pytest.mark.slow,
        ),
        ([".", "--tasks", "a", "--batch_size", "0"], "--batch_size 0: is not a whole number above 0"),
        ([".", "--tasks", "a", "--include_path", "gone"], "--include_path gone: no such folder"),
        (["."], "--tasks; --help shows"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(arguments: list[str], message: str):
    with pytest.raises(InputError, match=message) as caught:
        main(arguments)
    assert len(str(caught.value).splitlines()) == 1
