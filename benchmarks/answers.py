"""How long answers take: the 2b recipe's evaluation, decoding, scoring of given answers, and the mixture's
kernel.

    python benchmarks/answers.py                         # everything: about eight minutes on an H100
    python benchmarks/answers.py --only kernel decode    # some parts
    python benchmarks/answers.py --model tiny --small    # a minute on a CPU, to see that it runs

Weights and token ids are random, and no text ends early. Prints a table and writes answers.json to --out.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from case import TARGETS
from conditions import conditions
from shapes import random_base
from stock_decoding import one_after_the_other, stock_ms_per_token
from timing import matmul_tflops, timed, wait
from torch import Tensor

from chorus.data.batches import Sample, collate
from chorus.ensemble.decode import generate
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.scoring import token_log_probs
from chorus.model.adapters import LoraShape
from chorus.model.agents import Agents, build_agents
from chorus.model.execution import Execution
from chorus.model.kernels.decode_graphs import CapturedStep
from chorus.model.kernels.mixture_kernel import mixture_statistics, torch_statistics
from chorus.model.regularisation import Regularisation
from chorus.monitoring.flops import Work, work_of

PARTS = ("kernel", "scoring", "evaluation", "decode", "stock")
RANK = 16
GSM8K = {"prompt": (70, 220), "answer": (60, 200)}  # tokens of most problems with the recipe's template
KERNEL_SHAPES = [(K, N) for K in (4, 16) for N in (16, 64, 256)]


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matmul = matmul_tflops(device, dtype)
    results: dict[str, Any] = {"about": {**conditions(device, dtype), "matmul_tflops": matmul}}
    parts: dict[str, Callable[[], Any]] = {
        "kernel": lambda: kernel_rows(options, device, dtype),
        "scoring": lambda: scoring_row(options, device, dtype),
        "evaluation": lambda: evaluation_row(options, device, dtype),
        "decode": lambda: decode_rows(options, device, dtype),
        "stock": lambda: stock_row(options, device, dtype),
    }
    for name in options.only:
        begun = time.perf_counter()
        results[name] = parts[name]()
        results[name]["seconds_of_the_part"] = time.perf_counter() - begun
        print(table(name, results[name]), flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "answers.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if {"decode", "stock"} <= results.keys():
        for name, row in results["decode"].items():
            if name.startswith("K="):
                print(f"{name}: {row['ms_per_token'] / results['stock']['ms_per_token']:.2f} times stock")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="gemma-2-2b", help="of benchmarks/shapes.py")
    parser.add_argument("--prompts", type=int, default=32, help="texts at a time in `decode`")
    parser.add_argument("--small", action="store_true", help="a tenth of everything")
    parser.add_argument("--out", type=Path, default=Path("runs/answers"))
    return parser.parse_args()


def agents_of(
    options: argparse.Namespace, num_agents: int, device: torch.device, dtype: torch.dtype
) -> Agents:
    torch.manual_seed(0)
    base = random_base(options.model, device, dtype, "eager")
    shape = LoraShape(RANK, 2.0 * RANK, TARGETS, random_init=True, seed=0)
    execution = Execution(compiled=device.type == "cuda")
    return build_agents("fused", base, num_agents, shape, Regularisation(0, 0, 0), execution).eval()


def mixture_of(agents: Agents) -> Answerer:
    K = len(agents.agents)
    return Answerer("mixture", agents.agents, (1 / K,) * K)


def everybody(agents: Agents) -> list[Answerer]:
    members = [Answerer("base", (None,)), *(Answerer(f"agent {k}", (k,)) for k in agents.agents)]
    return [*members, mixture_of(agents)]


def random_prompts(count: int, vocabulary: int, lengths: tuple[int, int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(*lengths, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (size,), generator=generator).tolist() for size in sizes]


def evaluation_row(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The recipe's evaluation: NLL and a full answer of base, 4 agents and mixture to 200 problems."""
    agents = agents_of(options, 4, device, dtype)
    problems, new_tokens = (20, 32) if options.small else (200, 320)
    prompts = random_prompts(problems, agents.config.vocab_size, GSM8K["prompt"])
    samples = random_samples(problems, agents.config.vocab_size)
    begun = time.perf_counter()
    token_log_probs(agents, [None, *agents.agents], samples)
    wait(device)
    scored = time.perf_counter() - begun
    answers = generate(agents, everybody(agents), prompts, max_new_tokens=new_tokens, end_ids=())
    seconds = time.perf_counter() - begun
    assert all(len(answer.token_ids) == new_tokens for row in answers for answer in row)
    rows, tokens = (8, 4) if options.small else (16, 12)  # the 2b recipe answered 16 at a time
    share = one_after_the_other(agents, prompts[:rows], tokens, device)
    before = share * (new_tokens / tokens) * (problems / rows)
    return {
        "seconds": seconds,
        "of_which_nll": scored,
        "problems": problems,
        "new_tokens": new_tokens,
        "one_after_the_other_seconds": before,
        "one_after_the_other_measured": f"{rows} problems, {tokens} tokens: {share:.1f} s, scaled up",
        "times_as_fast": before / seconds,
    }


def stock_row(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """transformers' generate of one merged adapter, the yardstick of `decode`."""
    base = random_base(options.model, device, dtype, "eager")
    prompts = random_prompts(options.prompts, base.config.vocab_size, (64, 65))
    return stock_ms_per_token(base, prompts, 16 if options.small else 128, device)


def decode_rows(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds a token of the mixture of K agents, and of base, agents and mixture together."""
    new_tokens = 16 if options.small else 128
    rows: dict[str, Any] = {"texts": options.prompts, "new_tokens": new_tokens}
    for K in (4, 16):
        agents = agents_of(options, K, device, dtype)
        prompts = random_prompts(options.prompts, agents.config.vocab_size, (64, 65))
        rows[f"K={K} mixture"] = decoding(agents, [mixture_of(agents)], prompts, new_tokens)
        if K == 4:
            rows["K=4 base, agents and mixture"] = decoding(agents, everybody(agents), prompts, new_tokens)
        print({name: row for name, row in rows.items() if name.startswith(f"K={K}")}, flush=True)
        del agents
        gc.collect()
    return rows


def decoding(
    agents: Agents, answerers: Sequence[Answerer], prompts: list[list[int]], new_tokens: int
) -> dict[str, float]:
    """From the difference of a long and a short run, so that
    the prompts and the capture count for nothing."""
    seconds, device = [], next(agents.parameters()).device
    for tokens in (17, new_tokens + 17, 17, new_tokens + 17):
        wait(device)
        begun = time.perf_counter()
        generate(agents, answerers, prompts, max_new_tokens=tokens, end_ids=())
        wait(device)
        seconds.append(time.perf_counter() - begun)
    ms = 1000 * (seconds[3] - seconds[2]) / new_tokens
    return {"ms_per_token": ms, "whole_seconds": seconds[3], "first_seconds": seconds[0]}


def random_samples(count: int, vocabulary: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    samples = []
    for _ in range(count):
        prompt, answer = (int(torch.randint(*GSM8K[part], (1,), generator=generator)) for part in GSM8K)
        ids = torch.randint(3, vocabulary, (prompt + answer,), generator=generator)
        samples.append(Sample(ids, torch.arange(prompt + answer) >= prompt))
    return samples


def scoring_row(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Useful TFLOP/s of scoring 1,000 rows by 4 agents, and of the training forward over 4 x 4 x 512."""
    agents = agents_of(options, 4, device, dtype)
    work = work_of(agents.peft_models[0].get_base_model())
    samples = random_samples(100 if options.small else 1000, agents.config.vocab_size)
    token_log_probs(agents, agents.agents, samples[:40])
    wait(device)
    begun = time.perf_counter()
    token_log_probs(agents, agents.agents, samples)
    seconds = time.perf_counter() - begun
    flops = sum(forward_flops(work, len(sample.ids) - 1, sample.num_targets) for sample in samples) * 4
    T = 64 if options.small else 512
    ids = torch.randint(3, agents.config.vocab_size, (4, T + 1))
    batch = collate([Sample(row, torch.ones(T + 1, dtype=torch.bool)) for row in ids], pad_id=0).to(device)
    agents.train()
    for _ in range(3):
        agents(batch)
    training = median(timed(lambda: agents(batch), 10, device)) / 1000
    forward = 16 * forward_flops(work, T, T) / training / 1e12
    return {
        "rows": len(samples),
        "seconds": seconds,
        "useful_tflops": flops / seconds / 1e12,
        "training_forward_tflops": forward,
        "share": flops / seconds / 1e12 / forward,
    }


def forward_flops(work: Work, length: int, targets: int) -> float:
    """Of one row: 2 for each weight and token, the head on targets alone, attention over the causal half."""
    return 2.0 * (work.body * length + work.head * targets) + 2.0 * length * length * work.attention


def kernel_rows(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The mixture's statistics of K x N x V logits: the product's, eager PyTorch and torch.compile."""
    V = 512 if options.model == "tiny" else 256_000
    compiled = torch.compile(torch_statistics, dynamic=False)
    rows: dict[str, Any] = {"V": V}
    for K, N in KERNEL_SHAPES[:2] if options.small else KERNEL_SHAPES:
        copies = 3 if K * N * V < 2**28 else 1  # together more than a cache holds
        sets = [3 * torch.randn(K, N, V, device=device, dtype=dtype) for _ in range(copies)]
        weight_K = torch.full((K,), 1 / K, device=device)
        how = {"temperature": 1.3, "softcap": 30.0, "scale": 1.0, "want_log_prob": False}
        ways = {"ours": mixture_statistics, "eager": torch_statistics}
        if device.type == "cuda":
            ways["compiled"] = compiled
        row = {name: time_way(way, sets, weight_K, how, device) for name, way in ways.items()}
        row["read_twice_gb_s"] = 2 * sets[0].nbytes / row["ours"] / 1e6
        rows[f"K={K} N={N}"] = row
        del sets
    return rows


def time_way(
    way: Callable, sets: Sequence[Tensor], weight_K: Tensor, how: dict, device: torch.device
) -> float:
    """Median ms of one call, the sets in turn; on a GPU as it runs while decoding, captured."""
    for logits_KNV in sets:
        way(logits_KNV, weight_K, **how)
    calls = [lambda logits_KNV=logits_KNV: way(logits_KNV, weight_K, **how) for logits_KNV in sets]
    if device.type == "cuda":
        calls = [CapturedStep(call, []).replay for call in calls]
    turns = iter(calls * 9)
    return median(timed(lambda: next(turns)(), 9 * len(calls), device))


def table(name: str, rows: dict[str, Any]) -> str:
    lines = [f"--- {name}"]
    for key, value in rows.items():
        shown = (
            ", ".join(f"{k} {_short(v)}" for k, v in value.items())
            if isinstance(value, dict)
            else _short(value)
        )
        lines.append(f"{key}: {shown}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
