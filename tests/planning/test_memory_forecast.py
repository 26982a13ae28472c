"""The memory forecast beside what CPU runs really allocate, and GPU runs reserved."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from chorus.config import Config
from chorus.data.batches import Sample, collate
from chorus.errors import InputError
from chorus.mesh import ALONE
from chorus.model.adapters import lora_shape
from chorus.model.agents import Agents, Regularisation, build_agents
from chorus.model.base import load_model
from chorus.model.execution import decide_execution
from chorus.planning import counted_passes
from chorus.planning.forecast import GIB, Forecast, Machine
from chorus.planning.live_bytes import bytes_of
from chorus.planning.memory_forecast import forecast, longest_batch, trained_bytes
from chorus.training.engine import DTYPES
from chorus.training.objective import objective_of
from chorus.training.optimizer import adamw

SHAPE = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "head_dim": 32,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 32}
GEMMA_2B = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
GEMMA_9B = {
    "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "head_dim": 256,
    "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip


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
    rates = Regularisation(config.dropconnect_p, config.lora_dropout, config.seed)
    execution = decide_execution(config, torch.device("cpu"))
    agents = build_agents(
        config.parallel_mode, model, config.num_agents, lora_shape(config), rates, execution
    )
    row = Sample(
        torch.arange(longest_batch(config) + 1), torch.ones(longest_batch(config) + 1, dtype=torch.bool)
    )
    batch = collate([row] * config.batch_size, 0, config.padding, config.swd_points_per_row)
    gc.collect()  # what earlier tests left must not go while this one is counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = agents(batch, step=0)
        loss_fn = objective_of(config, config, ALONE, agents.head())
        loss_fn(*output, batch, num_targets=len(batch.target_rows_N), step=0).share.backward()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
    return max(totals) - (totals[0] - changes[0])


COMPARING = {"swd_num_projections": 20_000}  # so many that the distance between agents decides
CASES = [  # each mode, each kind of recomputation, both precisions
    ("no", {"parallel_mode": "fused"}),
    ("bf16", {"parallel_mode": "fused", "gradient_checkpointing": "full"}),
    ("bf16", {"parallel_mode": "fused", "gradient_checkpointing": "selective"}),
    ("bf16", {"parallel_mode": "fused", "agents_per_pass": 2}),
    ("bf16", {"parallel_mode": "fused", "lora_dropout": 0.1, "dropconnect_p": 0.1}),
    ("bf16", {"parallel_mode": "sequential"}),
    ("no", {"parallel_mode": "sequential", "gradient_checkpointing": "full"}),
    ("bf16", {"parallel_mode": "parallel"}),
    ("no", {"parallel_mode": "parallel", "gradient_checkpointing": "full"}),
    ("bf16", {"lambda_sw": 0}),
    ("bf16", {**COMPARING, "swd_points_per_row": 96}),
    ("bf16", {**COMPARING, "parallel_mode": "sequential", "gradient_checkpointing": "full"}),
    ("no", {**COMPARING, "swd_representation": "mean"}),
    ("no", {**COMPARING, "swd_space": "probabilities"}),
]


@pytest.mark.parametrize(("precision", "how"), CASES, ids=str)
def test_a_step_allocates_what_is_forecast_in_every_mode(
    base: str, tmp_path: Path, precision: str, how: dict
):
    config = config_of(base, **how)
    told = forecast(config, precision, Machine("cpu"))
    step = told.training - sum(told.standing.values())
    assert step == pytest.approx(allocated_by_a_step(config, precision, tmp_path), rel=0.04)


@pytest.mark.parametrize(
    ("precision", "how"), [("no", {}), ("bf16", {}), ("no", {"parallel_mode": "sequential"})], ids=str
)
def test_a_step_of_a_base_with_experts_allocates_what_is_forecast(tmp_path: Path, precision: str, how: dict):
    """One agent after the other, backward recomputes each pass."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **heads, **experts)).save_pretrained(tmp_path / "base")
    config = config_of(str(tmp_path / "base"), eval_samples=4, **how)
    told = forecast(config, precision, Machine("cpu"))
    step = told.training - sum(told.standing.values())
    assert step == pytest.approx(allocated_by_a_step(config, precision, tmp_path), rel=0.1)
    assert told.evaluation > 0


def test_what_stands_is_the_base_the_adapters_and_two_moments(base: str):
    config = config_of(base)
    model = load_model(base, torch.bfloat16, torch.device("cpu"))
    agents = build_agents("fused", model, 3, lora_shape(config), Regularisation(0, 0, 0))
    tensors = list(agents.adapters().values())
    optimizer = adamw(agents.adapters(), 1e-3, 0.0)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    told = forecast(config, "bf16", Machine("cpu")).standing
    assert told["adapters"] == bytes_of(tensors)
    assert told["optimizer"] == bytes_of(moments)
    assert told["base"] == bytes_of(agents.frozen_tensors().values())


def test_zero_shares_the_optimizer_and_counts_its_buckets():
    zero = {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True}
    parts = [
        trained_bytes(40_000, Config(), torch.bfloat16, Machine("cuda", count, {"zero_optimization": zero}))
        for count in (1, 4)
    ]
    # fp32 weights and two moments: 12 bytes; gradients in bf16, and two buckets of 1,000
    assert parts[0] == {
        "adapters": 80_000, "optimizer, its share": 480_000, "gradients and buckets of ZeRO": 84_000
    }  # fmt: skip
    assert parts[1] == {
        "adapters": 80_000, "optimizer, its share": 120_000, "gradients and buckets of ZeRO": 24_000
    }  # fmt: skip


def test_gradients_stay_where_steps_accumulate_or_ddp_keeps_buckets():
    one = sum(trained_bytes(1000, Config(), torch.float32, Machine("cuda")).values())
    accumulating = Config(gradient_accumulation_steps=2)
    assert sum(trained_bytes(1000, accumulating, torch.float32, Machine("cuda")).values()) == one + 4000
    assert sum(trained_bytes(1000, Config(), torch.float32, Machine("cuda", 2)).values()) == one + 4000


def test_the_peak_of_sequential_mode_grows_with_agents_by_what_belongs_to_them_alone(base: str):
    few, many = (
        forecast(config_of(base, parallel_mode="sequential", num_agents=count), "bf16", Machine("cuda"))
        for count in (4, 8)
    )
    hidden = 2 * 2 * 96 * SHAPE["hidden_size"]  # bytes x rows x tokens x width, of an agent
    own = (
        16 * few.trainable + 4 * 3 * hidden
    )  # weights, moments, gradients; the hidden states, joined, their gradient
    assert many.peak - few.peak <= 1.1 * own


def test_scores_of_eager_attention_grow_with_the_square_of_the_length_and_no_kernels_do(base: str):
    def bends(attention: str) -> float:
        lengths = (65, 129, 257)
        activations = [
            forecast(
                config_of(base, max_seq_length=length, attn_implementation=attention), "bf16", Machine("cuda")
            ).activations
            for length in lengths
        ]
        return (activations[2] - activations[1]) / (activations[1] - activations[0])

    assert bends("flex_attention") == pytest.approx(2, rel=0.02)
    assert bends("eager") > 2.3


def test_decoding_counts_two_caches_for_every_agent(base: str):
    """One for its own answers, one for the mixture's."""

    def scoring(agents: int) -> int:
        keys = {"num_agents": agents, "eval_samples": 32, "max_new_tokens_eval": 200, "lora_rank": 1}
        return forecast(config_of(base, **keys), "bf16", Machine("cpu")).evaluation

    keys_and_values = 2 * 2 * SHAPE["num_hidden_layers"] * HEADS["num_key_value_heads"] * SHAPE["head_dim"]
    logits = 3 * 4 * 32 * SHAPE["vocab_size"]
    expected = 2 * (32 * (97 + 200) * keys_and_values + logits)
    assert scoring(8) - scoring(7) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "how",
    [
        {"parallel_mode": "fused"},
        {"parallel_mode": "fused", "agents_per_pass": 7},
        {"parallel_mode": "sequential"},
        pytest.param({"agents_per_pass": 2, "gradient_checkpointing": "full"}, marks=pytest.mark.slow),
        pytest.param({"parallel_mode": "parallel"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_of_many_agents_a_few_are_built_and_the_forecast_is_that_of_all(
    base: str, how: dict, monkeypatch: pytest.MonkeyPatch
):
    config, built = config_of(base, num_agents=14, eval_samples=8, **how), []

    def build(mode: Any, model: Any, num_agents: int, *more: Any, **keys: Any) -> Agents:
        built.append(num_agents)
        return build_agents(mode, model, num_agents, *more, **keys)

    monkeypatch.setattr(counted_passes, "build_agents", build)
    told = forecast(config, "bf16", Machine("cpu"))
    assert max(built) <= 12
    monkeypatch.setattr(counted_passes, "MOST_COUNTED", 14)
    of_all = forecast(config, "bf16", Machine("cpu"))
    assert built[-1] == 14
    assert told.trainable == of_all.trainable
    assert told[1:-1] == pytest.approx(of_all[1:-1], rel=0.01, abs=2**16)
    monkeypatch.undo()
    huge = forecast(config.model_copy(update={"num_agents": 4096}), "bf16", Machine("cpu"))
    assert huge.standing["adapters"] == 4 * 4096 * (of_all.trainable // 14)


def test_agents_over_processes_take_of_each_what_their_share_takes_of_one(base: str):
    """A step of 2 of 4 agents; evaluation has all four, those of the other process beside the own."""
    keys = {"lambda_sw": 0.0, "eval_samples": 4, "eval_batch_size": 1}
    spread = forecast(config_of(base, num_agents=4, **keys), "bf16", Machine("cuda", 2, agent_size=2))
    alone, all_four = (
        forecast(config_of(base, num_agents=count, **keys), "bf16", Machine("cuda")) for count in (2, 4)
    )
    assert (spread.standing, spread.training) == (alone.standing, alone.training)
    assert spread.trainable == all_four.trainable == 2 * alone.trainable
    assert spread.evaluation == all_four.evaluation + 4 * alone.trainable  # fp32


def test_a_forecast_is_the_same_whatever_was_forecast_before(base: str):
    def of(agents: int) -> Forecast:
        config = config_of(base, num_agents=agents, compile=True, cuda_graphs=True, pad_to_multiple_of=96)
        return forecast(config, "bf16", Machine("cuda"))

    torch._dynamo.reset()
    alone = of(agents=4)
    torch._dynamo.reset()
    of(agents=2)
    assert of(agents=4) == alone


def test_an_unknown_base_is_refused():
    with pytest.raises(InputError, match="model_name"):
        forecast(Config(model_name="/nowhere/at/all"), "no", Machine("cpu"))


# What an H200's allocator reserved (benchmarks/modes.md, table.md): K, B and T, rank 16 on all linears.
RECORDED = {"compile": True, "cuda_graphs": True}
UNRECORDED = {"compile": True, "cuda_graphs": False}
FULL = {"gradient_checkpointing": "full", "attn_implementation": "flex_attention"}
OF_2B = [
    ((4, 1, 512), RECORDED, 13.3),
    ((4, 4, 512), RECORDED, 30.2),
    ((16, 1, 512), RECORDED, 35.1),
    ((4, 8, 512), RECORDED, 53.1),
    ((4, 4, 512), {**RECORDED, "gradient_checkpointing": "selective"}, 20.4),
    ((4, 1, 512), {**UNRECORDED, "gradient_checkpointing": "full"}, 7.0),
    ((4, 8, 1024), {**UNRECORDED, **FULL}, 14.3),
    ((4, 4, 512), {**RECORDED, "parallel_mode": "sequential"}, 13.0),
    ((4, 4, 512), {**UNRECORDED, "parallel_mode": "parallel"}, 31.2),
]
OF_9B = [
    ((4, 4, 1024), {**UNRECORDED, **FULL, "agents_per_pass": 1}, 26.3),
    ((4, 4, 1024), {**UNRECORDED, **FULL, "agents_per_pass": 2}, 27.3),
    ((4, 4, 1024), {**UNRECORDED, **FULL}, 28.5),
    ((4, 4, 1024), {**RECORDED, **FULL}, 30.2),
    ((8, 1, 512), {**UNRECORDED, "gradient_checkpointing": "full"}, 26.8),
    ((8, 4, 1024), {**RECORDED, **FULL}, 42.6),
    ((8, 4, 1024), {**RECORDED, **FULL, "parallel_mode": "sequential"}, 27.1),
    ((8, 4, 1024), {**RECORDED, **FULL, "parallel_mode": "parallel"}, 35.6),
]
MEASURED = [*((GEMMA_2B, *row) for row in OF_2B), *((GEMMA_9B, *row) for row in OF_9B)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "shape", "how", "measured_gib"), MEASURED, ids=str)
def test_a_gpu_reserved_what_is_forecast_within_ten_percent(
    tmp_path: Path, model: dict, shape: tuple[int, int, int], how: dict, measured_gib: float
):
    Gemma2Config(**model, query_pre_attn_scalar=256, vocab_size=256_000).save_pretrained(tmp_path)
    K, B, T = shape
    config = Config(
        model_name=str(tmp_path), num_agents=K, batch_size=B, max_seq_length=T + 1, pad_to_multiple_of=T,
        lora_rank=16, eval_samples=0, **{"attn_implementation": "eager", **how},
    )  # fmt: skip
    assert forecast(config, "bf16", Machine("cuda")).peak / GIB == pytest.approx(measured_gib, rel=0.1)
