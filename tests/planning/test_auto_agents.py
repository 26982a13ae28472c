"""`num_agents: auto`: the most that fit, no more, and the same for a run that goes on."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launching import PLAIN
from preloaded import train
from runs import config_of, save_run

import chorus.planning.auto_agents
from chorus.config import Config, RunConfig
from chorus.errors import InputError
from chorus.model.base import load_model
from chorus.planning.auto_agents import (
    MOST_AGENTS,
    OUT_OF_MEMORY,
    decide_num_agents,
    lower_until_a_step_fits,
    measured_step,
    most_that_fit,
    newest_state,
    with_agents,
)
from chorus.planning.forecast import Machine
from chorus.planning.memory_forecast import forecast

AUTO = Config(
    num_agents="auto",
    batch_size=2,
    lambda_sw=0.01,
    eval_samples=0,
    lora_target_modules=["q_proj"],
    resume_from_checkpoint=None,
)
GPU = Machine("cuda")  # on a CPU the libraries are part of the forecast, and grow


def peak(config: Config, agents: int) -> int:
    return forecast(with_agents(config, agents), "no", GPU).peak


@pytest.mark.parametrize("how", [{"parallel_mode": "fused"}, {"parallel_mode": "sequential"}], ids=str)
def test_the_forecast_takes_the_most_agents_that_fit(how: dict):
    config = AUTO.model_copy(update=how)
    limit = (peak(config, 3) + peak(config, 4)) // 2
    assert most_that_fit(config, "no", GPU, limit)[0] == 3


def test_a_number_is_left_alone(accelerator: Accelerator):
    assert decide_num_agents(Config(), "no", accelerator) == (RunConfig(), "")


def test_a_measured_step_that_does_not_fit_lowers_the_number(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    tried = []

    def short_of_memory(model, config: Config, *_) -> int:
        tried.append(config.num_agents)
        return 0 if config.num_agents <= 40 else OUT_OF_MEMORY

    monkeypatch.setattr(chorus.planning.auto_agents, "measured_step", short_of_memory)
    settings = {
        "num_agents": 64,
        "each": 2**20,
        "limit": 2**30,
        "precision": "no",
        "accelerator": accelerator,
    }
    assert lower_until_a_step_fits(AUTO, **settings) == (tried[-1], 0)
    assert tried[0] == 64
    assert tried == sorted(tried, reverse=True)
    assert tried[-1] <= 40 < tried[-2]
    monkeypatch.setattr(chorus.planning.auto_agents, "measured_step", lambda *_: OUT_OF_MEMORY)
    with pytest.raises(InputError, match="'num_agents' is auto, but a measured step runs out of memory"):
        lower_until_a_step_fits(AUTO, **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_is_really_measured():
    device = torch.device("cuda")
    model = load_model(AUTO.model_name, torch.float32, device)
    few, many = (measured_step(model, with_agents(AUTO, count), "no", GPU, device) for count in (2, 12))
    assert many - few > 2**26  # ten agents more of two rows, some 8 MiB each


def test_the_fewest_agents_must_fit_and_a_distance_needs_two():
    limit = (peak(AUTO.model_copy(update={"lambda_sw": 0.0}), 1) + peak(AUTO, 2)) // 2
    assert most_that_fit(AUTO.model_copy(update={"lambda_sw": 0.0}), "no", GPU, limit)[0] == 1
    with pytest.raises(InputError, match="'num_agents' is auto, but the forecast for 2 needs"):
        most_that_fit(AUTO, "no", GPU, limit)


def test_a_run_that_goes_on_keeps_its_number(tmp_path: Path, accelerator: Accelerator):
    for step, agents in ((1, 3), (2, 5)):
        save_run(config_of(tmp_path, num_agents=agents), accelerator, step)
    config = AUTO.model_copy(update={"output_dir": str(tmp_path), "resume_from_checkpoint": "auto"})
    decided, note = decide_num_agents(config, "no", accelerator)
    assert decided.num_agents == 5
    assert note == "num_agents auto: 5, as in the checkpoint"
    named = config.model_copy(
        update={"resume_from_checkpoint": str(tmp_path / "checkpoints" / "step_000001")}
    )
    assert decide_num_agents(named, "no", accelerator)[0].num_agents == 3
    (tmp_path / "checkpoints" / "step_000002" / "state.json").write_text("half a fi")
    assert decide_num_agents(config, "no", accelerator)[0].num_agents == 3
    assert newest_state(AUTO) is None


@pytest.mark.launch
def test_a_run_says_in_its_log_how_many_agents_it_took_and_why(tmp_path: Path):
    few = ("lora_target_modules=[layers.0.self_attn.q_proj]", "batch_size=1", "debug_subset_size=20")
    train(PLAIN, tmp_path / "run", "num_agents=auto", *few, "eval_samples=0", "max_train_steps=1")
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"num_agents auto: {MOST_AGENTS} (auto takes no more; name a number to have them); forecast" in log
    assert len(list((tmp_path / "run" / "agents").iterdir())) == MOST_AGENTS
    assert f"num_agents: {MOST_AGENTS}\n" in (tmp_path / "run" / "config.yaml").read_text()
