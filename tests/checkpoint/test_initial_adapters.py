"""Agents that start from adapters that exist."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ALPHA, RANK, TARGETS, toy_agents

from chorus.checkpoint.export import save_ensemble
from chorus.checkpoint.initial_adapters import initial_folders, start_from
from chorus.checkpoint.manifest import ADAPTER_CONFIG
from chorus.config import RunConfig
from chorus.errors import InputError

SETTINGS: dict[str, Any] = {"num_agents": 3, "lambda_sw": 0, "lora_rank": RANK, "lora_alpha": ALPHA}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    agents = toy_agents("fused")
    tensors = {identity: tensor.clone() for identity, tensor in agents.adapter_tensors().items()}
    save_ensemble(folder, tensors, [1 / 3] * 3, RunConfig(**SETTINGS, lora_target_modules=list(TARGETS)), {})
    return folder


@pytest.mark.parametrize("mode", ["fused", "parallel"])
def test_each_agent_has_the_weights_of_its_folder_whichever_way_they_are_named(mode: Any, run_folder: Path):
    expected = toy_agents("fused").adapter_tensors()
    for wanted in (str(run_folder), [str(run_folder / "agents" / f"agent_{k}") for k in range(3)]):
        agents = toy_agents(mode, trained=False)
        start_from(agents, initial_folders(RunConfig(**SETTINGS, init_adapters_from=wanted)))
        found = agents.adapter_tensors()
        assert all(torch.equal(found[identity], tensor) for identity, tensor in expected.items())


def test_adapters_of_another_base_are_said(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folders, agents = [], toy_agents("fused")
    for name, base in (("own", "google/gemma"), ("foreign", "other/base"), ("unknown", None)):
        shutil.copytree(run_folder / "agents" / "agent_0", tmp_path / name)
        file = tmp_path / name / ADAPTER_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
        folders.append(tmp_path / name)
    agents.config.name_or_path = "google/gemma"
    start_from(agents, [folders[0], folders[2], folders[0]])
    assert not caplog.text
    start_from(agents, folders)
    assert "trained over other/base, and start over google/gemma" in caplog.text


def test_without_the_key_agents_stay_as_they_are():
    assert initial_folders(RunConfig(**SETTINGS)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_agents": 2}, "names 3 adapters, and num_agents is 2; set num_agents=3"),
        ({"lora_rank": 4}, r"has r 3; set lora_rank=3"),
        ({"lora_alpha": 7.0}, r"has lora_alpha 6.0; set lora_alpha=6.0"),
        ({"use_rslora": True}, "has use_rslora False; set use_rslora=false"),
        ({"init_adapters_from": "no/such/folder"}, "holds no adapter_config.json.*name a run's output_dir"),
    ],
)
def test_adapters_of_another_shape_are_refused_with_the_key_to_set(
    settings: dict, words: str, run_folder: Path
):
    with pytest.raises(InputError, match=words):
        initial_folders(RunConfig(**{**SETTINGS, "init_adapters_from": str(run_folder), **settings}))


def test_agents_start_from_adapters_with_an_alpha_each_and_the_list_to_set_is_named(tmp_path: Path):
    alphas = [6.0, 15.0, 2.0]
    config = RunConfig(**{**SETTINGS, "lora_alpha": alphas}, lora_target_modules=list(TARGETS))
    save_ensemble(tmp_path, toy_agents("fused").adapter_tensors(), [1 / 3] * 3, config, {})
    wanted = {**SETTINGS, "init_adapters_from": str(tmp_path), "output_dir": "another"}
    assert len(initial_folders(RunConfig(**{**wanted, "lora_alpha": alphas}))) == 3
    for other in (6.0, [6.0, 2.0, 15.0]):
        with pytest.raises(
            InputError, match=r"agent_1 has lora_alpha 15.0; set lora_alpha=\[6.0, 15.0, 2.0\]"
        ):
            initial_folders(RunConfig(**{**wanted, "lora_alpha": other}))


def test_the_own_output_dir_is_refused_because_a_fresh_start_sets_it_aside(run_folder: Path):
    with pytest.raises(InputError, match="lies in output_dir"):
        initial_folders(RunConfig(**SETTINGS, init_adapters_from=str(run_folder), output_dir=str(run_folder)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("use_dora", True), ("lora_bias", True), ("target_parameters", ["experts"]), ("bias", "all")),
        *(
            ("modules_to_save", ["lm_head"]),
            ("rank_pattern", {"q_proj": 9}),
            ("alpha_pattern", {"q_proj": 9}),
        ),
        *(("alora_invocation_tokens", [5]), ("use_bdlora", {"nblocks": 2}), ("layer_replication", [[0, 1]])),
        *(("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("of_tomorrow", 1)),
    ],
)
def test_what_peft_can_do_beside_plain_lora_is_refused_by_name(
    key: str, value: object, run_folder: Path, tmp_path: Path
):
    config = json.loads((run_folder / "agents" / "agent_0" / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=f"'init_adapters_from'.*{key}.*; name .*plain.* LoRA"):
        initial_folders(RunConfig(**{**SETTINGS, "num_agents": 1}, init_adapters_from=[str(tmp_path)]))


def test_a_layer_more_or_less_is_named(run_folder: Path):
    agents = toy_agents("fused", num_agents=1)
    folder = run_folder / "agents" / "agent_0"
    for path in [path for path in agents.layout.shapes if "down_proj" in path[0]]:
        del agents.layout.shapes[path]
    agents.layout._sizes = [shape.numel() for shape in agents.layout.shapes.values()]
    agents.agent_0.data = agents.agent_0.data[: sum(agents.layout._sizes)]
    with pytest.raises(InputError, match=r"has, and this run has not,.*down_proj.*lora_target_modules"):
        start_from(agents, [folder])
