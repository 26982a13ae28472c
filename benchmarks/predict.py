"""Step time and memory of many GPUs, predicted from what one GPU does and from the rates of the links.

    python benchmarks/predict.py --model gemma-2-2b --agents 16 --recompute selective --gpus 8 64 512 1024
    python benchmarks/predict.py --compare    # the rows of table.json on several GPUs beside the prediction

What one GPU does is read from table.json (`--json`): milliseconds and memory of its plain, fused rows of one
base, length and recomputation, as straight lines over the agent-tokens of a step. What is sent comes from
`chorus.planning.traffic`; the links are arguments. A captured backward pass gives all gradients at its end,
so nothing of what is sent counts as hidden. docs/scaling.md has the formulas and what was measured.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from statistics import NormalDist, fmean
from typing import NamedTuple

from results import Row, markdown_table
from shapes import SHAPES
from verdicts import name_of

from chorus.mesh import Mesh, divisors
from chorus.planning.traffic import Traffic, traffic

GIB = 2**30
POINTS_OF_A_ROW, PROJECTIONS = 16, 64  # as benchmarks/case.py compares agents
ENGINES = ("plain", "zero2")


class Links(NamedTuple):
    """The machine between GPUs.

    Attributes:
        per_host: GPUs of a host.
        inside: GB/s at which a GPU sends to others of its host in a collective call.
        between: GB/s at which a whole host sends to others.
        latency_us: of a collective call.
        sort: 1e9 numbers a second that a GPU sorts: the sliced distance sorts its projections.
        spread: standard deviation of the GPUs' speeds, relative: a step is as slow as the slowest one.
    """

    per_host: int = 8
    inside: float = 300.0
    between: float = 350.0
    latency_us: float = 30.0
    sort: float = 2.0
    spread: float = 0.005


class OneGpu(NamedTuple):
    """What one GPU does by itself: milliseconds and GiB as straight lines over the agent-tokens of a step.

    Attributes:
        adapter: trained numbers of one agent. gib_fixed is without them.
        zero2_ms: what ZeRO-2 adds to a step on one GPU.
        matmul_tflops: of a large product on it.
    """

    ms_fixed: float
    ms_per_token: float
    gib_fixed: float
    gib_per_token: float
    adapter: int
    zero2_ms: float
    matmul_tflops: float


class Load(NamedTuple):
    """K agents, B rows of T tokens on each process, and the engine: "plain" (DDP) or "zero2"."""

    K: int
    B: int
    T: int
    engine: str = "plain"


class Prediction(NamedTuple):
    """ms: of a step. sent_ms: of them, collective calls. gib: of each GPU. traffic: what each GPU sends."""

    ms: float
    sent_ms: float
    gib: float
    traffic: Traffic


def predict(load: Load, mesh: Mesh, gpu: OneGpu, links: Links) -> Prediction:
    """A step of one micro-batch on all processes of the mesh."""
    held, zero = load.K // mesh.agent_size, load.engine == "zero2"
    tokens, points = held * load.B * load.T, load.B * POINTS_OF_A_ROW if load.K > 1 else 0
    sent = traffic(
        mesh,
        agents=load.K,
        adapter=gpu.adapter,
        zero_stage=2 if zero else 0,
        itemsize=2,
        points=points,
        projections=PROJECTIONS,
    )
    in_data, in_agents = rates(mesh, links)
    calls = (mesh.data_size > 1) * (4 if zero else 3) + (mesh.agent_size > 1) * 2  # SWD's, gradients, norms
    sent_ms = sent.of_data_group / in_data / 1e6 + sent.sorted_points / in_agents / 1e6
    sent_ms += calls * links.latency_us / 1000
    sorted_ms = held * PROJECTIONS * points * (mesh.data_size - 1) / links.sort / 1e6  # beyond its own
    own_ms = gpu.ms_fixed + gpu.ms_per_token * tokens + zero * gpu.zero2_ms
    slowest = 1 + links.spread * expected_maximum(mesh.data_size * mesh.agent_size)
    gib = gpu.gib_fixed + gpu.gib_per_token * tokens + trained_gib(held * gpu.adapter, zero, mesh.data_size)
    return Prediction(own_ms * slowest + sent_ms + sorted_ms, sent_ms, gib, sent)


def rates(mesh: Mesh, links: Links) -> tuple[float, float]:
    """GB/s of a process in a collective call of its data group, and of its agent group.

    A data group is neighbouring ranks. All groups that go through a host share its rate evenly, each by its
    processes there.
    """
    G = min(links.per_host, mesh.data_size * mesh.agent_size)
    found = []
    for size, here in (
        (mesh.data_size, min(mesh.data_size, G)),
        (mesh.agent_size, max(1, G // mesh.data_size)),
    ):
        spans_hosts = size > here
        found.append(min(links.inside, links.between * here / G) if spans_hosts else links.inside)
    return found[0], found[1]


def trained_gib(elements: int, zero: bool, data_size: int) -> float:
    """fp32 weights, two moments and, with several processes, DDP's buckets; or bf16 weights and shards."""
    if zero:
        return (2 * elements + 14 * ceil(elements / data_size)) / GIB
    return (16 if data_size > 1 else 12) * elements / GIB


def expected_maximum(count: int) -> float:
    """Of so many draws of a standard normal variable (Blom 1958); 0 for one."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def adapter_size(model: str, rank: int) -> int:
    """Trained numbers of one agent with all seven linears of a Gemma-2 shape."""
    shape = SHAPES[model]
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    sides = 2 * (width + queries) + 2 * (width + keys) + 3 * (width + inner)
    return rank * shape["num_hidden_layers"] * sides


def one_gpu(rows: Sequence[Row], model: str, T: int, recompute: str) -> OneGpu:
    """What the measured rows on one GPU say. One row alone is taken as proportional to its tokens.

    Raises:
        SystemExit: there is no such row.
    """
    own = [row for row in rows if is_of(row, model, T, recompute) and row["processes"] == 1]
    plain = [row for row in own if row["engine"] == "plain"]
    if not plain:
        raise SystemExit(f"no row of {model} on one GPU, plain, fused, {T} tokens, recompute {recompute}")
    adapter = adapter_size(model, plain[0]["rank"])
    tokens = [row["K"] * row["B"] * row["T"] for row in plain]
    ms_fixed, ms_per_token = line(tokens, [row["ms_per_step"] for row in plain])
    gib = [(row["peak_gib"] or 0.0) - trained_gib(row["K"] * adapter, False, 1) for row in plain]
    gib_fixed, gib_per_token = line(tokens, gib)
    by_shape = {(row["K"], row["B"]): row["ms_per_step"] for row in plain}
    over = [
        row["ms_per_step"] - by_shape[row["K"], row["B"]]
        for row in own
        if row["engine"] == "zero2" and (row["K"], row["B"]) in by_shape
    ]
    zero2_ms = fmean(over) if over else 0.0
    matmul_tflops = fmean(row["matmul_tflops"] for row in plain)
    return OneGpu(ms_fixed, ms_per_token, gib_fixed, gib_per_token, adapter, zero2_ms, matmul_tflops)


def is_of(row: Row, model: str, T: int, recompute: str) -> bool:
    wanted = {"model": model, "T": T, "recompute": recompute, "mode": "fused"}
    return "failed" not in row and all(row[name] == value for name, value in wanted.items())


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares: y at 0, and the slope. Through 0 where all x are equal."""
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((one - mean_x) ** 2 for one in x)
    if spread == 0:
        return 0.0, mean_y / mean_x
    slope = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True)) / spread
    return mean_y - slope * mean_x, slope


def meshes(K: int, gpus: int) -> Iterator[Mesh]:
    """Every way to spread K agents over these GPUs."""
    for A in divisors(gpus):
        if K % A == 0:
            yield Mesh(A, gpus // A)


def table(options: argparse.Namespace, gpu: OneGpu, links: Links) -> str:
    """For each number of GPUs: every mesh and engine, at the same work for each GPU; the fastest is bold."""
    lines = [["GPUs", "A", "data", "engine", "ms/step", "of it sent", "weak", "GiB/GPU", "MB sent by each"]]
    alone = predict(Load(options.agents, options.rows, options.length), Mesh(), gpu, links)
    for gpus in options.gpus:
        found = [
            (
                mesh,
                engine,
                predict(
                    Load(options.agents, options.rows * mesh.agent_size, options.length, engine),
                    mesh,
                    gpu,
                    links,
                ),
            )
            for mesh in meshes(options.agents, gpus)
            for engine in ENGINES
        ]
        fastest = min(found, key=lambda one: one[2].ms)
        for mesh, engine, told in found:
            mark = "**" if (mesh, engine) == fastest[:2] else ""
            cells = [gpus, mesh.agent_size, mesh.data_size, "DDP" if engine == "plain" else "ZeRO-2"]
            figures = [f"{mark}{told.ms:.1f}{mark}", f"{told.sent_ms:.1f}", f"{alone.ms / told.ms:.1%}"]
            lines.append([*map(str, cells), *figures, f"{told.gib:.1f}", f"{told.traffic.total / 1e6:,.1f}"])
    return markdown_table(lines)


def comparison(rows: Sequence[Row], links: Links) -> str:
    """Every measured fused row on several GPUs beside its prediction from one.

    GPUs of one kind differ by some percent: the prediction is for GPUs that run the large product as fast as
    those of the row.
    """
    lines = [["row", "measured ms", "predicted", "", "measured GiB", "predicted", ""]]
    for row in rows:
        if "failed" in row or row["processes"] == 1 or row["mode"] != "fused":
            continue
        gpu = one_gpu(rows, row["model"], row["T"], row["recompute"])
        mesh = Mesh(row["A"], row["processes"] // row["A"])
        told = predict(Load(row["K"], row["B"], row["T"], row["engine"]), mesh, gpu, links)
        told = told._replace(ms=told.ms * gpu.matmul_tflops / row["matmul_tflops"])
        ms, gib = row["ms_per_step"], row["peak_gib"] or float("nan")
        figures = [f"{ms:.1f}", f"{told.ms:.1f}", f"{told.ms / ms - 1:+.1%}"]
        lines.append([name_of(row), *figures, f"{gib:.1f}", f"{told.gib:.1f}", f"{told.gib / gib - 1:+.0%}"])
    return markdown_table(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("table.json"))
    parser.add_argument("--compare", action="store_true", help="measured rows beside their prediction")
    parser.add_argument("--model", default="gemma-2-2b")
    parser.add_argument("--agents", type=int, default=4, help="K")
    parser.add_argument(
        "--rows", type=int, default=4, help="of a GPU by itself; agents over A GPUs see A times as many"
    )
    parser.add_argument("--length", type=int, default=512, help="T")
    parser.add_argument("--recompute", default="none", help="as the key gradient_checkpointing")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64, 256, 1024])
    for name, default in Links()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    rows = json.loads(options.json.read_text())["rows"]
    links = Links(**{name: getattr(options, name) for name in Links._fields})
    if options.compare:
        print(comparison(rows, links))
        return
    gpu = one_gpu(rows, options.model, options.length, options.recompute)
    print(table(options, gpu, links))


if __name__ == "__main__":
    main()
