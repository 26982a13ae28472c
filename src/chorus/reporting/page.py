"""The report: one page that needs no network, and its pictures as files beside it."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment

from chorus.checkpoint.atomic_files import disk_errors, write_text
from chorus.ensemble.tables import score_table
from chorus.reporting.answer_pictures import answer_pictures
from chorus.reporting.answers import shown_answers
from chorus.reporting.comparison import comparison_pictures, comparison_table
from chorus.reporting.drawing import COLOURS, Picture
from chorus.reporting.sources import RunRecord, read_run
from chorus.reporting.training_pictures import cost_pictures, evaluation_over_time, training_pictures

TEMPLATE = Path(__file__).with_name("page.html.jinja")
NO_SCORES = (
    "No scores: no held-out problem has been scored at the end of a run. chorus evaluate RUN scores one."
)


class Section(NamedTuple):
    """A section of the page: pictures, and sentences about missing ones."""

    title: str
    lead: str
    pictures: list[Picture]
    absent: list[str]


def write_report(paths: Sequence[Path], out: Path | None = None, problems: Path | None = None) -> Path:
    """Write a page about one run, or one that compares several; the pictures go into a folder beside it.

    Args:
        paths: see `read_run`.
        out: the page; None is RUN/report.html, or chorus-report.html here where several are compared.
        problems: a file of scored problems in place of the run's own.

    Returns:
        Where the page is.

    Raises:
        InputError: what is named is no run.
        RunError: the write failed.
    """
    runs = [read_run(path, problems) for path in paths]
    runs = runs if len({run.name for run in runs}) == len(runs) else _told_apart(runs, paths)
    place = out or (runs[0].place if len(runs) == 1 else Path("chorus-report.html"))
    folder = place.with_suffix("")
    about = _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(**about, colours=COLOURS, folder=folder.name, no_table=NO_SCORES)
    drawn = [picture for section in about["sections"] for picture in section.pictures]
    with disk_errors(
        place, len(page) + sum(len(one.png) for one in drawn), "make room, or name another --out"
    ):
        _write_pictures(folder, drawn)
        write_text(place, page)
    return place


def _of_one(run: RunRecord) -> dict[str, Any]:
    sections = [
        _section("Training", "What every logged step measured.", training_pictures(run)),
        _section("Scores while training", "On the held-out problems.", evaluation_over_time(run)),
        _section("Time and memory", "Where they went.", cost_pictures(run)),
        _section("Answers", "What the mixture knows of its own answers.", answer_pictures(run)),
    ]
    config, last = run.config, run.steps[-1]["step"] if run.steps else None
    named = (
        "model_name",
        "dataset_name",
        "num_agents",
        "parallel_mode",
        "lora_rank",
        "lambda_sw",
        "lr",
        "seed",
    )
    facts = [f"{key} {config[key]}" for key in named if key in config]
    facts += [f"{last} optimiser steps"] if last else []
    facts += [f"{len(run.problems)} answers read one by one"] if run.problems else []
    return {
        "title": run.name,
        "lead": "A run of Chorus: LoRA agents over one frozen base, and the mixture of their answers.",
        "facts": facts,
        "table": score_table(run.evaluation),
        "sections": sections,
        "answers": shown_answers(run),
    }


def _of_several(runs: Sequence[RunRecord]) -> dict[str, Any]:
    return {
        "title": f"{len(runs)} runs compared",
        "lead": ", ".join(run.name for run in runs),
        "facts": [],
        "table": comparison_table(runs),
        "sections": [_section("Side by side", "One colour a run.", comparison_pictures(runs))],
        "answers": [],
    }


def _section(title: str, lead: str, found: Iterable[Picture | str]) -> Section:
    parts = list(found)
    return Section(
        title,
        lead,
        [part for part in parts if isinstance(part, Picture)],
        [part for part in parts if isinstance(part, str)],
    )


def _told_apart(runs: Sequence[RunRecord], paths: Sequence[Path]) -> list[RunRecord]:
    """Runs with the same name are named by their paths."""
    return [RunRecord(**{**vars(run), "name": str(path)}) for run, path in zip(runs, paths, strict=True)]


def _write_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Pictures of an earlier report are removed first, so that none stays without data in this run."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for one in pictures:
        (new / f"{one.key}.svg").write_text(one.svg, encoding="utf-8")
        (new / f"{one.key}.png").write_bytes(one.png)
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)
