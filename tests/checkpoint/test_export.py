"""What a run leaves: agents that stock PEFT reads, and what stands beside them."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents
from peft import PeftModel
from preloaded import forked
from safetensors.torch import load_file
from torch import Tensor
from toy import ALPHA, RANK, TARGETS, max_difference, tiny_gemma, toy_agents, toy_batch

from chorus.checkpoint import export
from chorus.checkpoint.atomic_files import write_text
from chorus.checkpoint.export import refuse_non_finite, save_ensemble, write_ensemble
from chorus.config import Config, load_config
from chorus.errors import RunError
from chorus.model.adapters import TensorId
from chorus.model.agents import Agents
from chorus.model.base import head_of

WEIGHTS = [0.5, 0.3, 0.2]
CONFIG = Config(
    model_name="some/base",
    num_agents=3,
    lora_rank=RANK,
    lora_alpha=ALPHA,
    lora_target_modules=list(TARGETS),
    prompt_template="“{question}”\n#: ",
    lr=3e-5,
    max_train_steps=None,
)


def values(agents: Agents) -> dict[TensorId, Tensor]:
    return {identity: tensor.detach() for identity, tensor in agents.adapter_tensors().items()}


def save(folder: Path, agents: Agents, config: Config = CONFIG, **more: Any) -> None:
    save_ensemble(folder, values(agents), WEIGHTS, config, more)


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


# ---- whole or not at all ----


def test_a_later_save_replaces_the_earlier_one_and_leaves_nothing_beside_it(tmp_path: Path):
    agents = toy_agents("parallel")
    save(tmp_path, agents)
    for tensor in agents.adapter_tensors().values():
        tensor.data += 1
    save(tmp_path, agents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agents", "config.yaml", "ensemble.json"]
    saved = load_file(tmp_path / "agents" / "agent_2" / "adapter_model.safetensors")
    for identity, tensor in values(agents).items():
        if identity.agent == 2:
            assert torch.equal(saved[f"{identity.path}.lora_{identity.matrix}.weight"], tensor)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_those_who_may_read_the_folder_may_read_the_adapters(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        save(tmp_path, toy_agents("parallel"))
    finally:
        os.umask(before)
    for file in (tmp_path / "agents").glob("*/*"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_save_that_fails_leaves_the_earlier_one_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
):
    agents = toy_agents("parallel")
    save(tmp_path, agents)
    before = contents(tmp_path)
    left = iter(range(writes))
    real = export.save_tensors

    def disk_is_full(tensors: dict[str, Tensor], path: Path, *more: Any) -> None:
        if next(left, None) is None:
            path.write_bytes(b"half a file")
            raise RuntimeError("No space left on device")
        real(tensors, path, *more)

    for tensor in agents.adapter_tensors().values():
        tensor.data += 1
    monkeypatch.setattr(export, "save_tensors", disk_is_full)
    with pytest.raises(RuntimeError, match="No space left"):
        save(tmp_path, agents)
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert all(name.startswith("agents.new/") for name in after.keys() - before.keys())
    # and it is not in the way of the next save
    monkeypatch.setattr(export, "save_tensors", real)
    save(tmp_path, agents)
    assert contents(tmp_path).keys() == before.keys()


def test_a_first_save_that_fails_leaves_no_agents_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def disk_is_full(*_: Any, **__: Any) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(export, "save_tensors", disk_is_full)
    with pytest.raises(RuntimeError):
        save(tmp_path, toy_agents("parallel"))
    assert not (tmp_path / "agents").exists()
    assert not (tmp_path / "ensemble.json").exists()


class Killed(BaseException):
    """Nothing of the save runs after it, as after SIGKILL."""


def save_until_killed(folder: Path, num_acts: int, value: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Save an ensemble that ends before its `num_acts` + 1st act on the disk. Whether it was killed."""
    acts = iter(range(num_acts))

    def mortal(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if next(acts, None) is None:
                raise Killed
            return act(*arguments, **more)

        return call

    tensors = {
        TensorId(k, "base_model.model.x", m): torch.full((2, 2), value) for k in range(2) for m in ("A", "B")
    }
    with monkeypatch.context() as patched:
        for owner, name in (
            *((export, "save_tensors"), (export, "sync"), (export.shutil, "rmtree")),
            *((Path, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "write_text")),
        ):
            patched.setattr(owner, name, mortal(getattr(owner, name)))
        try:
            save_ensemble(folder, tensors, [value, 1 - value], CONFIG, {})
        except Killed:
            return True
    return False


def saved_values(folder: Path) -> set[float]:
    """All values in a folder of agents; it fails unless both agents are whole."""
    files = [load_file(folder / f"agent_{agent}" / "adapter_model.safetensors") for agent in range(2)]
    assert all(file.keys() == {f"base_model.model.x.lora_{m}.weight" for m in ("A", "B")} for file in files)
    assert all((folder / f"agent_{agent}" / "adapter_config.json").is_file() for agent in range(2))
    return {value for file in files for tensor in file.values() for value in tensor.flatten().tolist()}


def test_a_save_killed_before_any_of_its_acts_leaves_whole_agents_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    num_acts, was_killed, found = 0, True, []
    while was_killed:
        folder = tmp_path / str(num_acts)
        folder.mkdir()
        assert not save_until_killed(folder, 1000, 0.25, monkeypatch)
        was_killed = save_until_killed(folder, num_acts, 0.75, monkeypatch)
        # Between two renames the last save stands under agents.old alone.
        place = folder / "agents" if (folder / "agents").exists() else folder / "agents.old"
        found.append(saved_values(place))
        assert json.loads((folder / "ensemble.json").read_text())["weights"] in ([0.25, 0.75], [0.75, 0.25])
        assert load_config(["--config", str(folder / "config.yaml")]) == CONFIG
        # and the next save takes it from there
        assert not save_until_killed(folder, 1000, 0.5, monkeypatch)
        assert sorted(path.name for path in folder.iterdir()) == ["agents", "config.yaml", "ensemble.json"]
        assert saved_values(folder / "agents") == {0.5}
        num_acts += 1
    assert num_acts > 15
    change = found.index({0.75})
    assert found == [{0.25}] * change + [{0.75}] * (len(found) - change)


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "ensemble.json"
    write_text(path, "first ü\n")
    assert path.read_bytes() == "first ü\n".encode()

    def fails_midway(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text[:3].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fails_midway)
        with pytest.raises(OSError, match="No space"):
            write_text(path, "second\n")
    assert path.read_text() == "first ü\n"
    write_text(path, "third\n")
    assert path.read_text() == "third\n"
    assert list(tmp_path.iterdir()) == [path]


# ---- numbers that are none ----


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


# ---- what is not finite ----


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
