"""Pictures of how a run trained, from metrics.jsonl."""

from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from chorus.ensemble.tables import label_of
from chorus.reporting.drawing import INK, MUTED, SERIES, Picture, picture, thinned
from chorus.reporting.sources import Row, RunRecord

MEMORY = {
    "allocated": "allocated",
    "max_allocated": "most allocated",
    "reserved": "reserved",
    "resident": "resident",
    "max_resident": "most resident",
}


def training_pictures(run: RunRecord) -> Iterator[Picture | str]:
    """Pictures, and a sentence in place of each for which the run has no data."""
    steps = run.steps
    if not steps:
        yield "No losses: there is no metrics.jsonl with logged steps."
        return
    mean = "" if len(steps) < 300 else " Each point is a mean over several logged rows."
    yield picture("loss", "Loss of each agent", f"Cross-entropy in nats a token.{mean}", _losses(steps))
    if any(row.get("swd") is not None for row in steps):
        caption = (
            "Sliced Wasserstein distance between the agents' hidden states, squared: how far apart they are."
        )
        yield picture("swd", "Distance between agents", caption, _curve(steps, "swd", SERIES[3]))
    else:
        yield "No distance between agents: with lambda_sw 0 it is not measured."
    yield picture("lr", "Learning rate", "Of every agent's optimizer.", _rates(steps))
    skipped = sum(row.get("skipped") or 0 for row in steps)
    caption = "Of all agents together, before clipping." + (
        f" {skipped} updates were skipped because a loss or gradient was not finite." if skipped else ""
    )
    yield picture("grad_norm", "Gradient norm", caption, _curve(steps, "grad_norm", SERIES[2]))
    yield picture(
        "throughput",
        "Throughput",
        "Agents x tokens of a batch, padding included, a second. It dips where scoring or saving took time.",
        _curve(steps, "agent_tokens_per_second", SERIES[5]),
    )


def evaluation_over_time(run: RunRecord) -> Iterator[Picture | str]:
    """Scores of agents and mixture while they trained."""
    nll = "cls/NLL" if run.evaluation.is_choice else "token/NLL"
    if len({row["step"] for row in run.scored if _has_agents(row)}) < 2:
        yield "No scores while training: agents were scored at most once; eval_steps=N scores every N steps."
        return
    captions = {
        "cls/Acc": ("accuracy", "Right answers", "Share of held-out problems that each answers right."),
        nll: ("nll", "NLL of the reference answers", "Nats, before calibration; lower is better."),
    }
    for score, (key, title, caption) in captions.items():
        yield picture(f"eval_{key}", title, caption, _scores(run.scored, score))


def cost_pictures(run: RunRecord) -> Iterator[Picture | str]:
    """Where time and memory went."""
    parts = {name: part for name, part in run.profile.get("parts", {}).items() if "." not in name}
    if parts:
        caption = (
            f"Share of an optimiser step, and seconds of one call, over {run.profile['steps']} steps after "
            "warming up."
        )
        yield picture("time", "Time by part", caption, _bars_of_time(parts))
    else:
        yield "No times by part: profile_steps=N times N steps part by part."
    memory = run.profile.get("memory_gb", {})
    if any(row.get("peak_memory_gib") is not None for row in run.steps):
        caption = "The most memory the first process has held so far."
        yield picture("memory", "Memory", caption, _curve(run.steps, "peak_memory_gib", SERIES[6], "GiB"))
    elif memory:
        yield picture(
            "memory", "Memory", "Of the first process, when it was profiled.", _bars_of_memory(memory)
        )
    else:
        yield "No memory: log_memory_usage=true logs it with every row."


def _losses(steps: Sequence[Row]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for agent in range(len(steps[0]["task_loss_per_agent"])):
            x, y = thinned((row["step"], row["task_loss_per_agent"][agent]) for row in steps)
            axes.plot(x, y, color=SERIES[agent % len(SERIES)], label=f"agent {agent}", alpha=0.9)
        _by_step(axes)
        _logarithmic_where_it_helps(axes, [row["task_loss"] for row in steps])

    return draw


def _curve(
    steps: Sequence[Row], key: str, colour: str, unit: str = "", label: str | None = None
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        x, y = thinned((row["step"], row.get(key)) for row in steps)
        axes.plot(x, y, color=colour, label=label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        _by_step(axes)

    return draw


def _rates(steps: Sequence[Row]) -> Callable[[Axes], None]:
    """One curve; one for each agent where they have different learning rates."""
    if not isinstance(steps[0]["lr"], list):
        return _curve(steps, "lr", SERIES[4])

    def draw(axes: Axes) -> None:
        for agent in range(len(steps[0]["lr"])):
            own = [{"step": row["step"], "lr": row["lr"][agent]} for row in steps]
            colour = SERIES[agent % len(SERIES)]
            _curve(own, "lr", colour, label=f"agent {agent}")(axes)

    return draw


def _scores(scored: Sequence[Row], score: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        names = dict.fromkeys(name.removesuffix(f"/{score}") for row in scored for name in row["scores"])
        for name in names:
            points = [(row["step"], row["scores"].get(f"{name}/{score}")) for row in scored]
            points = [point for point in points if point[1] is not None]
            if "/" in name or name == "base" or not points:
                continue
            is_agent = name.startswith("agent_")
            colour = SERIES[int(name.removeprefix("agent_")) % len(SERIES)] if is_agent else INK
            style: Row = {"linewidth": 1.2, "alpha": 0.9} if is_agent else {"linewidth": 2.4, "zorder": 3}
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, label=label_of(name), marker="o", markersize=3, **style)
        if score == "cls/Acc":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        else:
            _logarithmic_where_it_helps(axes, [row["scores"].get(f"uniform/{score}") for row in scored])
        _by_step(axes)

    return draw


def _bars_of_time(parts: Row) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        shown = {name: part for name, part in parts.items() if part["share"] >= 0.001}
        names = [name.replace("_", " ") for name in shown]
        shares = [part["share"] for part in shown.values()]
        bars = axes.barh(names, shares, color=SERIES[0])
        texts = [f"{part['share']:.1%}, {part['seconds']:.3g} s" for part in shown.values()]
        axes.bar_label(bars, texts, padding=3, fontsize=9, color=INK)
        axes.set_xlim(0, max(shares) * 1.4)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        _as_list(axes)

    return draw


def _bars_of_memory(memory: Row) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        values = list(memory.values())
        bars = axes.barh([MEMORY.get(name, name) for name in memory], values, color=SERIES[6])
        axes.bar_label(bars, [f"{value:.2f} GB" for value in values], padding=3, fontsize=9, color=INK)
        axes.set_xlim(0, max(values) * 1.3)
        _as_list(axes)

    return draw


def _as_list(axes: Axes) -> None:
    axes.invert_yaxis()  # the first one on top
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)


def _by_step(axes: Axes) -> None:
    axes.set_xlabel("optimiser step", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))


def _logarithmic_where_it_helps(axes: Axes, values: Sequence[float | None]) -> None:
    """Use a logarithmic axis for a curve that falls by orders of magnitude, so that its end is visible."""
    known = [value for value in values if value is not None]
    if known and min(known) > 0 and max(known) > 20 * min(known):
        axes.set_yscale("log")


def _has_agents(row: Row) -> bool:
    return any(name.startswith("agent_") for name in row["scores"])
