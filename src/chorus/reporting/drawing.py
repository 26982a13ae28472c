"""Pictures by matplotlib: as files with a white background, and as SVG in the page, in the page's colours.

The SVG is inline, so its colours can be the page's CSS variables, which follow the reader's light or dark
setting. Its text stays text. A page of fifteen pictures has a few hundred kilobytes; the scripts of an
interactive library alone have several thousand.
"""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# For files; page.html.jinja has the colours of both modes under the same names.
COLOURS = {
    "--surface": "#ffffff",
    "--ink": "#20242b",
    "--muted": "#6b7281",
    "--grid": "#e2e5ea",
    "--good": "#1f9d6b",
    "--bad": "#c9402f",
    "--series-0": "#2f6fde",
    "--series-1": "#d9622c",
    "--series-2": "#128a70",
    "--series-3": "#b0479e",
    "--series-4": "#8a6d02",
    "--series-5": "#0a8fb1",
    "--series-6": "#7d5bd3",
    "--series-7": "#5f7a2f",
}
INK, MUTED, GOOD, BAD = (COLOURS[f"--{name}"] for name in ("ink", "muted", "good", "bad"))
SERIES = [colour for name, colour in COLOURS.items() if name.startswith("--series")]
MOST_POINTS = 300  # of a curve; more would be closer than a pixel, and make the page large

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "chorus",  # the same data gives the same bytes
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=SERIES),
    "grid.color": COLOURS["--grid"],
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


class Picture(NamedTuple):
    """One picture.

    Attributes:
        key: its file's name, without an ending.
        title: what is drawn.
        caption: how to read it, and what it shows here.
        svg, png: the files.
    """

    key: str
    title: str
    caption: str
    svg: str
    png: bytes

    def inline(self) -> str:
        """The SVG element for a page: as wide as its container, in the page's colours."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        # Ids must be unique among the pictures of one page.
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.key}-", svg)
        for name, colour in COLOURS.items():
            svg = svg.replace(colour, f"var({name})")
        return svg


def picture(
    key: str, title: str, caption: str, draw: Callable[[Axes], None], size: tuple[float, float] = (4.6, 3.1)
) -> Picture:
    """Draw on new axes, with a legend above them if there are labels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        _legend(figure, axes)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
        figure.savefig(png, format="png", dpi=160, facecolor=COLOURS["--surface"])
    return Picture(key, title, caption, svg.getvalue(), png.getvalue())


def _legend(figure: Figure, axes: Axes) -> None:
    """A legend above the axes, filled row by row, as wide as the picture; none without labels."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    columns = max(1, min(len(labels), 52 // (max(map(len, labels)) + 5)))
    rows = -(-len(labels) // columns)
    # matplotlib fills columns, but people read rows.
    order = [row * columns + column for column in range(columns) for row in range(rows)]
    order = [place for place in order if place < len(labels)]
    figure.legend(
        *([handles[place] for place in order], [labels[place] for place in order]),
        loc="outside upper left",
        ncols=columns,
        handlelength=1.3,
        columnspacing=1.0,
    )


def thinned(points: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    """x and y of a curve without gaps; more than `MOST_POINTS` points become means of neighbours."""
    whole = [(x, y) for x, y in points if y is not None]
    size = -(-len(whole) // MOST_POINTS) or 1
    groups = [whole[start : start + size] for start in range(0, len(whole), size)]
    return [_mean([x for x, _ in group]) for group in groups], [
        _mean([y for _, y in group]) for group in groups
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
