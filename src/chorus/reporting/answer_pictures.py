"""Pictures of the answers to held-out problems, their calibration and their uncertainty."""

import math
from collections.abc import Iterator, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from chorus.ensemble.answers import answer_to
from chorus.ensemble.metrics import auroc, calibration_error, risk_at_coverage
from chorus.ensemble.tables import label_of
from chorus.ensemble.uncertainty import UNCERTAINTIES, pairwise_disagreement
from chorus.reporting.drawing import BAD, GOOD, INK, MUTED, SERIES, Picture, picture
from chorus.reporting.sources import Row, RunRecord

NUM_BINS = 10
NAMES = {
    "max_p": "1 - probability",
    "entropy": "entropy",
    "mutual_information": "mutual information",
    "disagreement": "disagreement",
}


def answer_pictures(run: RunRecord) -> Iterator[Picture | str]:
    """Pictures, and a sentence in place of each for which the run has no data."""
    if not run.problems or not run.mixture:
        yield (
            "No answers one by one: there is no problems.jsonl with a mixture's answers. chorus evaluate RUN "
            "--problems FILE writes one, and chorus report RUN --problems FILE shows it."
        )
        return
    mixture = run.mixture
    plain = run.answers(mixture, ood=False)
    yield from _heat_map(run)
    temperature = run.evaluation.temperatures.get(mixture)
    yield _reliability(run, mixture, temperature)
    right = sum(one["right"] for one in plain)
    if 0 < right < len(plain):
        yield _risk(run, mixture)
        caption = f"{right} right and {len(plain) - right} wrong answers. {_told(plain, 'right')}"
        yield _histogram(
            "right_wrong", "Uncertainty, right against wrong", caption, _by_right(plain), (GOOD, BAD)
        )
    else:
        yield f"All answers are {'right' if right else 'wrong'}: there is nothing for uncertainty to tell."
    other = run.answers(mixture, ood=True)
    if other:
        caption = (
            f"{len(plain)} held-out problems and {len(other)} of another kind. "
            f"{_told([*plain, *other], [False] * len(plain) + [True] * len(other))}"
        )
        groups = {"held out": _entropies(plain), "out of distribution": _entropies(other)}
        yield _histogram("in_out", "Uncertainty, in against out of distribution", caption, groups, SERIES[:2])
    else:
        yield "No problems out of distribution: ood_dataset_name or chorus evaluate --ood FILE names some."


def answers_compared(problem: Row, names: Sequence[str]) -> list[str | None]:
    """The answers in the form in which they are compared: the results where the reference marks one."""
    return [answer_to(problem["reference"], problem["answers"][name]["text"]) for name in names]


def _heat_map(run: RunRecord) -> Iterator[Picture | str]:
    agents = run.agents
    if len(agents) < 2:
        yield "No pairwise disagreement: there is one agent."
        return
    problems = [one for one in run.problems if not one.get("ood")]
    answers_KN = list(zip(*(answers_compared(one, agents) for one in problems), strict=True))
    share = [[pairwise_disagreement([one_N, other_N]) for other_N in answers_KN] for one_N in answers_KN]
    apart = pairwise_disagreement(answers_KN)
    caption = f"Share of held-out problems that two agents answer differently; {apart:.1%} over all pairs."
    most = max(max(row) for row in share) or 1.0

    def draw(axes: Axes) -> None:
        K = len(agents)
        for a in range(K):
            for b in range(K):
                cell = Rectangle(
                    (b - 0.48, a - 0.48),
                    0.96,
                    0.96,
                    facecolor=SERIES[1],
                    alpha=0.08 + 0.72 * share[a][b] / most,
                )
                axes.add_patch(cell)
                if K <= 8:
                    axes.text(b, a, "" if a == b else f"{share[a][b]:.0%}", ha="center", va="center")
        axes.set(xlim=(-0.5, K - 0.5), ylim=(K - 0.5, -0.5), xticks=range(K), yticks=range(K), aspect="equal")
        labels = [label_of(name) if K <= 5 else name.removeprefix("agent_") for name in agents]
        axes.set_xticks(range(K), labels)
        axes.set_yticks(range(K), labels)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=INK)

    yield picture("disagreement", "How often agents disagree", caption, draw)


def _reliability(run: RunRecord, mixture: str, temperature: float | None) -> Picture:
    curves = {False: "as it is", True: "at its temperature"}
    if temperature is not None:
        curves[True] = f"at temperature {temperature:.2f}"
    answers = {calibrated: run.answers(mixture, ood=False, calibrated=calibrated) for calibrated in curves}
    errors = [
        calibration_error(torch.tensor([one["probability"] for one in own]), _is_right(own))
        for own in answers.values()
    ]

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for (calibrated, label), colour in zip(curves.items(), (SERIES[1], SERIES[0]), strict=True):
            x, y, count = _binned(answers[calibrated])
            axes.plot(x, y, color=colour, label=label)
            axes.scatter(
                x, y, [6 + 120 * n / len(answers[calibrated]) for n in count], color=colour, zorder=3
            )
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_xlabel("probability of the answer", color=MUTED)
        axes.set_ylabel("share that is right", color=MUTED)

    caption = (
        "Of the mixture's answers of a probability, the share that is right; on the dashed line they agree. "
        f"A larger point has more answers. ECE {errors[0]:.1%} as it is, {errors[1]:.1%} at its temperature."
    )
    return picture("reliability", "Reliability of the mixture", caption, draw)


def _binned(answers: Sequence[Row]) -> tuple[list[float], list[float], list[int]]:
    """Mean probability, share that is right and count of every bin of equal width that has answers."""
    bins: list[list[Row]] = [[] for _ in range(NUM_BINS)]
    for one in answers:
        bins[min(int(one["probability"] * NUM_BINS), NUM_BINS - 1)].append(one)
    full = [own for own in bins if own]
    mean = [sum(one["probability"] for one in own) / len(own) for own in full]
    return mean, [sum(one["right"] for one in own) / len(own) for own in full], [len(own) for own in full]


def _risk(run: RunRecord, mixture: str) -> Picture:
    answers = run.answers(mixture, ood=False)
    best = max(run.agents, key=lambda name: float(_is_right(run.answers(name, ood=False)).double().mean()))

    def draw(axes: Axes) -> None:
        for name, colour in zip(UNCERTAINTIES, SERIES, strict=False):
            axes.plot(*risk_curve(answers, name), color=colour, label=NAMES[name])
        own = run.answers(best, ood=False)
        axes.plot(
            *risk_curve(own, "max_p"), color=MUTED, linestyle=(0, (2, 2)), label=f"{label_of(best)} alone"
        )
        axes.set(xlim=(0, 1), ylim=(0, None))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("share of problems answered, the surest first", color=MUTED)
        axes.set_ylabel("errors among them", color=MUTED)

    caption = (
        "How many errors are left if the mixture answers only the problems that an uncertainty ranks surest; "
        f"lower is better. {label_of(best)}, right most often, is ranked by its own probability."
    )
    return picture("risk_coverage", "Errors against coverage", caption, draw)


def risk_curve(answers: Sequence[Row], uncertainty: str) -> tuple[list[float], list[float]]:
    """Coverage and the error rate at it, from the most certain answer on."""
    uncertainty_N = torch.tensor([one["uncertainty"][uncertainty] for one in answers], dtype=torch.float64)
    risk_N = risk_at_coverage(uncertainty_N, ~_is_right(answers))
    return [(n + 1) / len(risk_N) for n in range(len(risk_N))], risk_N.tolist()


def _histogram(
    key: str, title: str, caption: str, groups: dict[str, list[float]], colours: Sequence[str]
) -> Picture:
    most = max(max(values) for values in groups.values()) or 1.0
    edges = [most * n / 20 for n in range(21)]

    def draw(axes: Axes) -> None:
        for (label, values), colour in zip(groups.items(), colours, strict=False):
            weights = [1 / len(values)] * len(values)
            how = {"bins": edges, "weights": weights, "color": colour}
            axes.hist(values, **how, alpha=0.35, label=f"{label} ({len(values)})")
            axes.hist(values, **how, histtype="step", linewidth=1.4)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("entropy of the mixture, nats a token", color=MUTED)
        axes.set_ylabel("share of the group", color=MUTED)

    return picture(key, title, caption, draw)


def _by_right(answers: Sequence[Row]) -> dict[str, list[float]]:
    return {
        "right": _entropies([one for one in answers if one["right"]]),
        "wrong": _entropies([one for one in answers if not one["right"]]),
    }


def _entropies(answers: Sequence[Row]) -> list[float]:
    return [one["uncertainty"]["entropy"] for one in answers]


def _told(answers: Sequence[Row], positive: str | Sequence[bool]) -> str:
    """How well each uncertainty separates the two groups."""
    is_positive = ~_is_right(answers) if isinstance(positive, str) else torch.tensor(positive)
    found = {
        NAMES[name]: auroc(torch.tensor([one["uncertainty"][name] for one in answers]), is_positive)
        for name in UNCERTAINTIES
    }
    told = ", ".join(f"{name} {value:.2f}" for name, value in found.items() if not math.isnan(value))
    return f"AUROC: {told}; 0.5 is chance."


def _is_right(answers: Sequence[Row]) -> torch.Tensor:
    return torch.tensor([bool(one["right"]) for one in answers])
