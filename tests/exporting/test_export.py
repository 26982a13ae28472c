"""Exported agents are what they were, wherever they are read; merged ones are the mean, to rounding."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import of_family
from folders import contents
from peft import AutoPeftModelForCausalLM, PeftModel
from stock import ADAPTERS, save_adapter, stock_base, word_tokenizer, write_base
from torch import Tensor
from toy import VOCABULARY
from transformers import AutoModelForCausalLM, AutoTokenizer

from chorus.commands.export import main
from chorus.ensemble.evaluate import Evaluation
from chorus.ensemble.load import load_ensemble
from chorus.errors import InputError
from chorus.exporting.export import export
from chorus.exporting.folders import new_folder

WEIGHTS = [0.4, 0.3, 0.2, 0.1]
TEMPLATE = "{% for turn in messages %}{{ turn.content }} {% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which `base` is the base, and adapters that name it by that relative path."""
    folder = tmp_path_factory.mktemp("home")
    write_base(folder / "base")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, settings in enumerate(ADAPTERS):
            save_adapter("base", folder / "agents" / f"agent_{number}", number, **settings)
    scores = {"cls/Acc": 0.875, "token/NLL": 0.0205, "cal/ECE": 0.03}
    scores |= {"sc/AUROC/max_p": 0.953, "sc/Risk@80Cov/max_p": 0.017}
    found = Evaluation(num_problems=8, temperatures={"uniform": 1.5})
    found.scores = {"uniform": scores, "uniform/calibrated": scores}
    entries = {
        "agents": [f"agents/agent_{number}" for number in range(len(ADAPTERS))],
        "base_model": "base",
        "weights": WEIGHTS,
        "temperature": 1.5,
        "evaluation": {"before": {}, "after": found.report()},
    }
    (folder / "ensemble.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def exported(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All three kinds of export, made where `base` means something."""
    place = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        main([str(home), str(place / "agents")])
        main([str(home), str(place / "mean"), "--merge", "cat"])
        main([str(home), str(place / "model"), "--merge-into-base"])
    return {name: place / name for name in ("agents", "mean", "model")}


def ids_of_a_text() -> Tensor:
    return torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=ids_of_a_text()).logits


def deltas(folder: Path, base: Path) -> dict[str, Tensor]:
    """What stock PEFT adds to the weight of every layer, by layer, in float64."""
    model = PeftModel.from_pretrained(stock_base(base), folder).double()
    layers = {name: one for name, one in model.named_modules() if hasattr(one, "get_delta_weight")}
    return {name: one.get_delta_weight("default").detach() for name, one in layers.items()}


def mean_delta(folders: Sequence[Path], base: Path, weights: Sequence[float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for layer, delta in deltas(folder, base).items():
            found[layer] = found.get(layer, 0) + weight * delta
    return found


# ---- the agents as they are ----


def test_an_exported_agent_loads_by_its_folder_alone_from_any_directory(
    home: Path, exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for number in range(len(ADAPTERS)):
        agent = AutoPeftModelForCausalLM.from_pretrained(exported["agents"] / f"agent_{number}")
        own = PeftModel.from_pretrained(stock_base(home / "base"), home / "agents" / f"agent_{number}")
        torch.testing.assert_close(logits(agent), logits(own), atol=2e-5, rtol=0)


def test_no_exported_folder_has_layers_of_different_rank_or_scaling(exported: dict[str, Path]):
    """A server reads one r and one lora_alpha, and would be silently wrong about the rest."""
    for number in range(len(ADAPTERS)):
        entries = json.loads((exported["agents"] / f"agent_{number}" / "adapter_config.json").read_text())
        assert not entries["rank_pattern"]
        assert not entries["alpha_pattern"]


def test_an_export_is_an_ensemble_again_with_its_mixture_and_scores(
    home: Path, exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    ensemble = load_ensemble(exported["agents"])
    assert (list(ensemble.weights), ensemble.temperature) == (WEIGHTS, 1.5)
    assert ensemble.base_name == str(home / "base")
    export([exported["agents"]], tmp_path / "again")
    assert contents(tmp_path / "again").keys() == contents(exported["agents"]).keys()
    assert (tmp_path / "again" / "ensemble.json").read_text() == (
        exported["agents"] / "ensemble.json"
    ).read_text()


def test_tokenizer_and_chat_template_come_with_every_kind(exported: dict[str, Path]):
    for folder in exported.values():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("w3 w4")["input_ids"] == [3, 4]
        assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "w5 "


# ---- the mean ----


def test_the_merged_adapter_adds_the_weighted_mean_of_what_the_agents_add(
    home: Path, exported: dict[str, Path]
):
    folders = [home / "agents" / f"agent_{number}" for number in range(len(ADAPTERS))]
    expected = mean_delta(folders, home / "base", WEIGHTS)
    found = deltas(exported["mean"], home / "base")
    assert found.keys() == expected.keys()
    for layer, delta in expected.items():
        assert float((found[layer] - delta).abs().max() / delta.abs().max()) < 1e-6, layer


def test_a_merged_model_is_the_base_with_the_merged_adapter(home: Path, exported: dict[str, Path]):
    merged = AutoModelForCausalLM.from_pretrained(exported["model"])
    with_adapter = AutoPeftModelForCausalLM.from_pretrained(exported["mean"])
    torch.testing.assert_close(logits(merged), logits(with_adapter), atol=2e-5, rtol=0)
    base = stock_base(home / "base")
    assert (logits(merged) - logits(base)).abs().max() > 0.1
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert merged.config.to_diff_dict().keys() == base.config.to_diff_dict().keys()


def test_a_base_of_transposed_linears_is_merged_alike(tmp_path: Path):
    of_family("gpt2").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    for number in (0, 1):
        save_adapter(
            tmp_path / "base", tmp_path / f"{number}", number, r=2, target_modules=["c_attn", "c_fc"]
        )
    agents = [tmp_path / "0", tmp_path / "1"]
    export(agents, tmp_path / "mean", "cat")
    export(agents, tmp_path / "model", "into-base")
    expected = mean_delta(agents, tmp_path / "base", [0.5, 0.5])
    for layer, delta in deltas(tmp_path / "mean", tmp_path / "base").items():
        assert float((delta - expected[layer]).abs().max() / delta.abs().max()) < 1e-6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with_adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mean")
    torch.testing.assert_close(logits(merged), logits(with_adapter), atol=2e-5, rtol=0)


# ---- the card ----


def test_the_card_has_the_figures_and_commands_that_fit_the_agents(home: Path, exported: dict[str, Path]):
    card = (exported["agents"] / "README.md").read_text()
    for words in ("8 held-out problems", "87.5%", "0.0205", "0.953", "temperature of 1.5", "0.4000"):
        assert words in card
    modules = " ".join(f"agent_{number}=$PWD/agent_{number}" for number in range(4))
    assert f"vllm serve {home / 'base'} --enable-lora --max-loras 4 --max-lora-rank 8 " in card
    assert f"--lora-modules {modules}\n" in card
    assert f"--max-loras-per-batch 4 --max-lora-rank 5 \\\n  --lora-paths {modules}\n" in card
    mean = (exported["mean"] / "README.md").read_text()
    assert "rank 10 over" in mean  # q_proj of three agents: 3 + 5 + 2
    assert "--max-lora-rank 16" in mean
    for kind in ("mean", "model"):
        text = (exported[kind] / "README.md").read_text()
        assert "A mean of weights is not the mixture" in text
        assert "Of the agents and their mixture, not of this model. 8 held-out problems" in text


def test_agents_without_scores_have_a_card_that_says_so(home: Path, tmp_path: Path):
    export([home / "agents" / "agent_0"], tmp_path / "out", base=str(home / "base"))
    assert "No scores came with these agents" in (tmp_path / "out" / "README.md").read_text()


# ---- what is refused ----


def refused(words: str, *arguments: str | Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        main([str(one) for one in arguments])
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_is_overwritten(home: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").touch()
    refused("is not empty, and an export overwrites nothing", home, tmp_path / "full")
    refused("is a file, and an export overwrites nothing", home, tmp_path / "file")
    assert contents(tmp_path) == {"full/note": b"mine", "file": b""}


def test_an_export_that_fails_leaves_nothing_and_an_empty_folder_is_filled(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyError), new_folder(out, 1) as new:
        (new / "half").write_text({}["gone"])
    assert not list((tmp_path / "deep").iterdir())
    out.mkdir()
    with new_folder(out, 1) as new:
        (new / "whole").write_text("a")
        assert not list(out.iterdir())
    assert contents(tmp_path) == {"deep/out/whole": b"a"}


def test_what_cannot_be_merged_is_refused_with_a_remedy(home: Path, tmp_path: Path):
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    for name, content in contents(home / "base").items():
        (quantised / name).write_bytes(content)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    arguments = (home / "agents" / "agent_0", tmp_path / "out", "--merge-into-base")
    refused("quantised, .* with --base, or export with --merge cat", *arguments, "--base", quantised)
    with pytest.warns(UserWarning, match="tie"):
        save_adapter(home / "base", tmp_path / "head", 0, r=2, target_modules=["lm_head"])
    refused("lm_head: its weight is tied to .*--merge cat", tmp_path / "head", *arguments[1:])
    refused("one folder is named; give a RUN and then OUT", home)
    refused("not allowed with", home, tmp_path / "out", "--merge", "cat", "--merge-into-base")
    refused("no such folder", tmp_path / "gone", tmp_path / "out")
    assert not (tmp_path / "out").exists()
