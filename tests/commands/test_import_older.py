"""The import of the older layout, whose files are made here as its writer made them: PEFT state dicts, saved
by torch.
"""

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from chorus.commands.import_older import META, import_older
from chorus.config import load_config
from chorus.errors import InputError

BASE = "assets/tiny-gemma-2"
RANK, TARGETS = 3, ["q_proj", "down_proj"]
A_TENSOR = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
IDS = torch.arange(4, 24)[None]


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, attn_implementation="eager")


@pytest.fixture(scope="module")
def before() -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Two agents of one PEFT model: what was saved of each, and its logits."""
    config = LoraConfig(r=RANK, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base(), config, adapter_name="agent0")
    model.add_adapter("agent1", config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    states, logits = [], []
    for name in ("agent0", "agent1"):
        model.set_adapter(name)
        states.append(
            {key: value.clone() for key, value in get_peft_model_state_dict(model, None, name).items()}
        )
        logits.append(model.eval()(input_ids=IDS).logits.detach())
    return states, logits


def write_older(folder: Path, states: list[dict[str, Tensor]], **meta: Any) -> Path:
    folder.mkdir()
    for agent, state in enumerate(states):
        torch.save(state, folder / f"agent{agent}_weights.pth")
    ours = {"r": RANK, "lora_alpha": 12, "lora_dropout": 0.05, "target_modules": TARGETS, "bias": "none"}
    ours |= {"task_type": "CAUSAL_LM", "K_agents": len(states), "parallel_mode": "parallel", **meta}
    (folder / META).write_text(json.dumps({key: value for key, value in ours.items() if value is not None}))
    return folder


# ---- what comes out ----


def test_stock_peft_loads_what_was_imported_and_it_answers_as_what_was_saved(tmp_path: Path, before):
    states, logits = before
    remarks = import_older(write_older(tmp_path / "old", states), tmp_path / "new", BASE)
    assert remarks == []
    for agent in range(2):
        model: Any = PeftModel.from_pretrained(base(), str(tmp_path / "new" / "agents" / f"agent_{agent}"))
        assert torch.equal(model(input_ids=IDS).logits, logits[agent])
    assert not torch.equal(logits[0], logits[1])


def test_the_folder_is_that_of_a_run_and_says_what_is_not_carried_over(tmp_path: Path, before):
    old, new = write_older(tmp_path / "old", before[0]), tmp_path / "new"
    new.mkdir()  # empty
    import_older(old, new, BASE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    assert sorted(path.name for path in new.iterdir()) == ["agents", "config.yaml", "ensemble.json"]
    ensemble = json.loads((new / "ensemble.json").read_text())
    assert ensemble["agents"] == ["agents/agent_0", "agents/agent_1"]
    assert (ensemble["weights"], ensemble["base_model"]) == ([0.5, 0.5], str(Path(BASE).resolve()))
    assert ensemble["imported"]["from"] == str(old)
    assert "optimizer moments" in ensemble["imported"]["not_carried_over"]
    config = load_config(["--config", str(new / "config.yaml")])
    assert (config.num_agents, config.lora_rank, config.lora_alpha, config.lora_dropout) == (
        2,
        RANK,
        12,
        0.05,
    )
    assert (config.lora_target_modules, config.parallel_mode) == (TARGETS, "parallel")


SPELLINGS: dict[str, Callable[[str, int], str]] = {
    "with the adapter's name": lambda key, agent: key.replace(".weight", f".agent{agent}.weight"),
    "default": lambda key, _: key.replace(".weight", ".default.weight"),
    "without PEFT's prefix": lambda key, _: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_name_gives_the_same_adapters(spelling: str, tmp_path: Path, before):
    renamed = [
        {SPELLINGS[spelling](key, agent): tensor for key, tensor in state.items()}
        for agent, state in enumerate(before[0])
    ]
    import_older(
        write_older(tmp_path / "old", renamed, parallel_mode=None, model_name=BASE), tmp_path / "new"
    )
    for agent, state in enumerate(before[0]):
        saved = load_file(tmp_path / "new" / "agents" / f"agent_{agent}" / "adapter_model.safetensors")
        assert saved.keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in saved.items())


def test_half_precision_becomes_fp32_and_an_agent_that_was_never_trained_is_remarked_on(
    tmp_path: Path, before
):
    half = [{key: tensor.bfloat16() for key, tensor in state.items()} for state in before[0]]
    half[1] = {key: tensor * 0 if "lora_B" in key else tensor for key, tensor in half[1].items()}
    (remark,) = import_older(write_older(tmp_path / "old", half), tmp_path / "new", BASE)
    assert remark.startswith("agent 1: every B is zero")
    saved = load_file(tmp_path / "new" / "agents" / "agent_0" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, half[0][key].float()) for key, tensor in saved.items())


# ---- what is refused ----


def edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An edit of the second agent's state dict."""

    def act(old: Path) -> None:
        file = old / "agent1_weights.pth"
        state = torch.load(file, weights_only=True)
        edit(state)
        torch.save(state, file)

    return act


def meta(**changes: Any) -> Callable[[Path], None]:
    def act(old: Path) -> None:
        whole = json.loads((old / META).read_text()) | changes
        (old / META).write_text(json.dumps({key: value for key, value in whole.items() if value != "absent"}))

    return act


def cut(old: Path) -> None:
    file = old / "agent1_weights.pth"
    file.write_bytes(file.read_bytes()[:1000])


IN_AGENT_1 = "agent1_weights.pth: "
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no meta": (lambda old: (old / META).unlink(), f"{META}: cannot be read (No such file"),
    "meta is not valid JSON": (lambda old: (old / META).write_text("{"), f"{META}: is not valid JSON"),
    "meta is a list": (lambda old: (old / META).write_text("[1]"), f"{META}: holds [1]; give a JSON object"),
    "meta without rank": (meta(r="absent"), f"{META}: key 'r' is missing"),
    "rank is a word": (meta(r="3"), f"{META}: key 'r' is '3'; "),
    "rank is true": (meta(r=True), f"{META}: key 'r' is True; "),
    "another kind of LoRA": (meta(use_dora=True), f"{META}: key 'use_dora' is not known"),
    "biases": (meta(bias="all"), f"{META}: key 'bias' is 'all'"),
    "another rank": (meta(r=4), "has shape (3, 160); this base and rank need (4, 160); correct"),
    "another target": (
        meta(target_modules=["q_proj"]),
        "down_proj.lora_A.weight: the base has no such target",
    ),
    "one target more": (meta(target_modules=[*TARGETS, "k_proj"]), "k_proj.lora_A.weight is missing"),
    "no such target": (meta(target_modules=["q_projj"]), "'q_projj' cannot carry an adapter"),
    "one agent more": (meta(K_agents=3), "agent2_weights.pth: cannot be read (No such file"),
    "one agent less": (meta(K_agents=1), "agent1_weights.pth: ci_llm_meta_config.json says 1 agents"),
    "no agents": (meta(K_agents=0), f"{META}: key 'K_agents' is 0; "),
    "a tensor less": (edited(lambda state: state.pop(A_TENSOR)), f"{IN_AGENT_1}{A_TENSOR} is missing"),
    "a tensor of the base": (
        edited(lambda state: state.update({"base_model.model.lm_head.weight": torch.zeros(2)})),
        f"{IN_AGENT_1}'base_model.model.lm_head.weight' is not a LoRA tensor of agent 1",
    ),
    "another agent's tensor": (
        edited(
            lambda state: state.update({A_TENSOR.replace(".weight", ".agent0.weight"): state.pop(A_TENSOR)})
        ),
        ".lora_B.agent0.weight' is not a LoRA tensor of agent 1",
    ),
    "a tensor twice": (
        edited(lambda state: state.update({A_TENSOR.replace(".weight", ".default.weight"): state[A_TENSOR]})),
        "is in the file twice",
    ),
    "transposed": (
        edited(lambda state: state.update({A_TENSOR: state[A_TENSOR].T})),
        "lora_B.weight: has shape (3, 160)",
    ),
    "integers": (edited(lambda state: state.update({A_TENSOR: state[A_TENSOR].long()})), "is torch.int64"),
    "no tensor": (edited(lambda state: state.update({A_TENSOR: 1.0})), "is float"),
    "a NaN": (edited(lambda state: state[A_TENSOR].fill_(torch.nan)), f"{A_TENSOR}: holds a NaN"),
    "a list": (lambda old: torch.save([1], old / "agent1_weights.pth"), f"{IN_AGENT_1}holds a list"),
    "cut short": (cut, f"{IN_AGENT_1}does not hold plain tensors"),
    "empty": (
        lambda old: (old / "agent1_weights.pth").write_bytes(b""),
        f"{IN_AGENT_1}does not hold plain tensors",
    ),
    "a whole model": (
        lambda old: torch.save(torch.nn.Linear(1, 1), old / "agent1_weights.pth"),
        f"{IN_AGENT_1}does not hold plain tensors",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_whole_and_of_this_base_is_refused_in_one_line_and_nothing_is_written(
    fault: str, tmp_path: Path, before
):
    old = write_older(tmp_path / "old", before[0])
    act, said = FAULTS[fault]
    act(old)
    with pytest.raises(InputError) as caught:
        import_older(old, tmp_path / "new", BASE)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_and_a_base_that_nobody_names_are_refused(tmp_path: Path, before):
    old = write_older(tmp_path / "old", before[0])
    with pytest.raises(InputError, match=f"^{old}: exists and is not empty"):
        import_older(old, old, BASE)
    with pytest.raises(InputError, match="does not name the base; add model_name=BASE"):
        import_older(old, tmp_path / "new")
    with pytest.raises(InputError, match=r"folder \./nowhere does not exist"):
        import_older(old, tmp_path / "new", "./nowhere")


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(zipped: bool, tmp_path: Path, before):
    old, marker = write_older(tmp_path / "old", before[0]), tmp_path / "marker"
    state = before[0][1] | {A_TENSOR: Bomb(marker)}
    torch.save(state, old / "agent1_weights.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"agent1_weights\.pth: does not hold plain tensors"):
        import_older(old, tmp_path / "new", BASE)
    assert not marker.exists()
    torch.load(old / "agent1_weights.pth", weights_only=False)
    assert marker.exists(), "the bomb is one"


# ---- the command ----


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """`python -m chorus.checkpoint`, in this process."""
    monkeypatch.setattr(sys, "argv", ["checkpoint", *arguments])
    monkeypatch.delitem(sys.modules, "chorus.checkpoint", raising=False)
    runpy.run_module("chorus.checkpoint", run_name="__main__")


def test_the_command_says_what_is_not_carried_over_and_ends_a_mistake_with_one_line_and_code_2(
    tmp_path: Path, before, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    old, new = write_older(tmp_path / "old", before[0]), tmp_path / "new"
    command(monkeypatch, "import", str(old), str(new), f"model_name={BASE}")
    said = capsys.readouterr().out
    assert said.startswith(f"the agents are in {new}/agents; not carried over: optimizer moments, ")
    for arguments in ([], ["import", str(old)], ["import", str(old), str(new), f"model_name={BASE}"]):
        with pytest.raises(SystemExit) as ended:
            command(monkeypatch, *arguments)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    command(monkeypatch, "--help")
    assert "import OLD NEW" in capsys.readouterr().out
