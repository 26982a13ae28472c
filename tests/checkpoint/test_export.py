"""What a run leaves: agents that stock PEFT reads, and what stands beside them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from exports import CONFIG, WEIGHTS, save, values
from folders import contents
from peft import PeftModel
from preloaded import forked
from safetensors.torch import load_file
from toy import ALPHA, RANK, TARGETS, max_difference, tiny_gemma, toy_agents, toy_batch

from chorus.checkpoint.export import refuse_non_finite, save_ensemble, write_ensemble
from chorus.config import Config, load_config
from chorus.errors import RunError
from chorus.model.adapters import TensorId
from chorus.model.base import head_of

# ---- the adapters ----


@pytest.mark.parametrize("mode", ["fused", "sequential", "parallel"])
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj",), "all-linear"], ids=str)
@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_stock_peft_reads_every_agent_and_gives_its_logits(mode: Any, targets: Any, tmp_path: Path):
    """Each with an alpha of its own."""
    alphas = [ALPHA, 2.5 * ALPHA, 2.0]
    agents = toy_agents(mode, alpha=alphas)
    kept = values(agents)
    if targets == (
        "q_proj",
    ):  # an ensemble with fewer adapters, so that the list of targets must be the saved one
        kept = {identity: tensor for identity, tensor in kept.items() if identity.path.endswith("q_proj")}
        for identity, tensor in agents.adapter_tensors().items():
            tensor.data *= identity in kept
    modules = targets if isinstance(targets, str) else list(targets)
    config = CONFIG.model_copy(update={"lora_target_modules": modules, "lora_alpha": alphas})
    save_ensemble(tmp_path, kept, WEIGHTS, config, {})
    batch = toy_batch()
    for agent in agents.agents:
        folder = tmp_path / "agents" / f"agent_{agent}"
        model = PeftModel.from_pretrained(tiny_gemma(), folder).eval()
        loaded = {
            name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora_" in name
        }
        assert loaded.keys() == load_file(folder / "adapter_model.safetensors").keys(), (
            "missing or unexpected keys"
        )
        with torch.no_grad(), agents.trunk(agent) as trunk:
            expected = head_of(tiny_gemma()).logits(trunk(input_ids=batch.input_BT).last_hidden_state)
            assert max_difference(model(input_ids=batch.input_BT).logits, expected) < 2e-5


def test_an_adapter_folder_says_what_it_is(tmp_path: Path):
    save(tmp_path, toy_agents("parallel"))
    folder = tmp_path / "agents" / "agent_1"
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (
        RANK,
        ALPHA,
        sorted(TARGETS),
    )


def test_the_targets_are_in_one_order_whatever_python_hashes(tmp_path: Path):
    """PEFT keeps them as a set: equal agents would be other bytes in every process."""
    save(tmp_path, toy_agents("parallel"))
    config = json.loads((tmp_path / "agents" / "agent_0" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(TARGETS)


def test_a_saved_agent_holds_its_own_values_in_fp32_and_nothing_of_the_base(tmp_path: Path):
    agents = toy_agents("sequential")
    save(tmp_path, agents)
    saved = [
        load_file(tmp_path / "agents" / f"agent_{agent}" / "adapter_model.safetensors") for agent in range(3)
    ]
    for identity, tensor in values(agents).items():
        own = saved[identity.agent].pop(f"{identity.path}.lora_{identity.matrix}.weight")
        assert own.dtype == torch.float32
        assert torch.equal(own, tensor)
    assert saved == [{}, {}, {}]


# ---- what stands beside them ----


def test_the_ensemble_file_says_how_the_agents_are_one(tmp_path: Path):
    save(tmp_path, toy_agents("parallel"), evaluation={"after": {"base": {"nll": 1.5}}})
    ensemble = json.loads((tmp_path / "ensemble.json").read_text())
    assert ensemble["agents"] == ["agents/agent_0", "agents/agent_1", "agents/agent_2"]
    assert all((tmp_path / agent / "adapter_model.safetensors").is_file() for agent in ensemble["agents"])
    assert ensemble["weights"] == WEIGHTS
    assert (ensemble["base_model"], ensemble["parallel_mode"]) == ("some/base", CONFIG.parallel_mode)
    assert Config(**ensemble["config"]) == CONFIG
    assert ensemble["evaluation"] == {"after": {"base": {"nll": 1.5}}}


def test_the_weights_that_the_evaluation_fits_are_written_later_beside_the_same_agents(tmp_path: Path):
    save(tmp_path, toy_agents("parallel"))
    before = contents(tmp_path)
    write_ensemble(tmp_path, [0.1, 0.2, 0.7], CONFIG, {"evaluation": {}})
    after = contents(tmp_path)
    assert [name for name in after if after[name] != before.get(name)] == ["ensemble.json"]
    assert json.loads(after["ensemble.json"]) == {
        **json.loads(before["ensemble.json"]),
        "weights": [0.1, 0.2, 0.7],
        "evaluation": {},
    }


def test_the_saved_configuration_starts_an_equal_run(tmp_path: Path):
    save(tmp_path, toy_agents("parallel"))
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == CONFIG


def test_agents_are_in_order_beyond_ten(tmp_path: Path):
    tensors = {
        TensorId(agent, "base_model.model.x", "A"): torch.full((1, 1), float(agent)) for agent in range(12)
    }
    save_ensemble(tmp_path, dict(reversed(tensors.items())), [1 / 12] * 12, CONFIG, {})
    names = json.loads((tmp_path / "ensemble.json").read_text())["agents"]
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in names]
    assert [int(file["base_model.model.x.lora_A.weight"]) for file in files] == list(range(12))


# ---- what is not finite ----


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_not_finite_is_refused_with_agent_and_tensor(value: float):
    tensors = values(toy_agents("parallel"))
    refuse_non_finite(tensors)
    identity = [identity for identity in tensors if identity.agent == 2][5]
    tensors[identity] = tensors[identity].clone()
    tensors[identity][1, 1] = value
    with pytest.raises(RunError) as error:
        refuse_non_finite(tensors)
    message = str(error.value)
    assert message.startswith("agent 2: ")
    assert identity.path in message
    assert f"({identity.matrix})" in message
    assert "\n" not in message


def test_the_run_writes_no_agents_of_which_one_is_not_finite(tmp_path: Path):
    """Also where its answers are: the weights that DeepSpeed holds in fp32 are not those of the passes."""
    import train as script

    tensors = values(toy_agents("parallel"))
    next(iter(tensors.values()))[0, 0] = torch.nan
    engine: Any = SimpleNamespace(adapter_values=lambda: tensors, accelerator=Accelerator(cpu=True))
    with pytest.raises(RunError, match=r"^agent 0: .* is not finite"):
        script.save(engine, CONFIG, tmp_path, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_of_the_mixture_that_is_not_finite_is_refused(tmp_path: Path, weight: float):
    tensors = values(toy_agents("parallel"))
    with pytest.raises(RunError, match=f"agent 1: its weight in the mixture is {weight}"):
        save_ensemble(tmp_path, tensors, [0.5, weight, 0.5], CONFIG, {})
    with pytest.raises(RunError, match="agent 1: its weight"):
        write_ensemble(tmp_path, [0.5, weight, 0.5], CONFIG, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.launch
def test_agents_whose_answers_are_not_finite_are_not_exported(tmp_path: Path):
    """Their weights are finite, and too large for any forward pass."""
    few = ("num_agents=2", "batch_size=4", "debug_subset_size=20", "eval_samples=0")
    ended = forked(
        [sys.executable, "train.py"], *few, "lr=1e30", "max_train_steps=6", f"output_dir={tmp_path / 'run'}"
    )
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: agents 0, 1: the loss on training rows is not finite"), ended.stderr[
        -2000:
    ]
    assert ended.returncode == 3
    assert not {"agents", "ensemble.json"} & {path.name for path in (tmp_path / "run").iterdir()}
