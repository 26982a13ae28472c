"""The memory forecast beside what CPU runs really allocate, and GPU runs reserved."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config, Gemma2ForCausalLM

from chorus.adapters import lora_shape
from chorus.agents import NoiseRates, build_agents, decide_execution
from chorus.base import load_model
from chorus.config import Config
from chorus.data import Sample, collate
from chorus.engine import DTYPES, adamw
from chorus.errors import InputError
from chorus.forecast import GIB, LiveBytes, Machine, bytes_of, forecast, longest_batch, trained_bytes

SHAPE = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 32}
GEMMA_2B = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Gemma-2 that is large enough for its tensors to outweigh an allocator's rounding."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma2ForCausalLM(Gemma2Config(**SHAPE, **HEADS)).save_pretrained(folder)
    return str(folder)


def config_of(base: str, **more) -> Config:
    settings = {"num_agents": 3, "batch_size": 2, "max_seq_length": 97, "eval_samples": 0, **more}
    return Config(model_name=base, **settings)


def allocated_by_a_step(config: Config, precision: str, folder: Path) -> int:
    """The most bytes that forward and backward of one micro-batch hold, by the CPU allocator's own count."""
    model = load_model(config.model_name, DTYPES[precision], torch.device("cpu"), config.attn_implementation)
    rates = NoiseRates(config.dropconnect_p, config.lora_dropout, config.seed)
    execution = decide_execution(config, torch.device("cpu"))
    agents = build_agents(config.parallel_mode, model, config.num_agents, lora_shape(config), rates, execution)
    row = Sample(torch.arange(longest_batch(config) + 1), torch.ones(longest_batch(config) + 1, dtype=torch.bool))
    batch = collate([row] * config.batch_size, pad_id=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = agents(batch, step=0)
        (output.nll_KBT.sum() + output.hidden_KBTD.sum().float()).backward()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
    return max(totals) - (totals[0] - changes[0])


CASES = [
    *({"parallel_mode": mode, "use_gradient_checkpointing": again} for mode, again in product(
        ("fused", "sequential", "parallel"), (False, True)
    )),
    {"parallel_mode": "fused", "agents_per_pass": 2},
    {"parallel_mode": "fused", "lora_dropout": 0.1, "dropconnect_p": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("how", CASES, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_allocates_what_is_forecast_in_every_mode(base: str, tmp_path: Path, how: dict, precision: str):
    config = config_of(base, **how)
    told = forecast(config, precision, Machine("cpu"))
    step = told.activations + max(told.loss, told.backward)
    assert step == pytest.approx(allocated_by_a_step(config, precision, tmp_path), rel=0.05)
