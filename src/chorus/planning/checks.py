"""The report of a dry run: tables for a terminal, readable without colour, or one JSON object."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from chorus.errors import InputError, RunError, out_of_memory
from chorus.planning.auto_agents import WAYS_OUT
from chorus.planning.forecast import in_words
from chorus.planning.trial_run import ModeRun

STYLE = {"PASS": "green", "FAIL": "bold red", "skip": "yellow"}


class Check(NamedTuple):
    """One check. `status` is PASS, FAIL or skip; a failed check has a remedy."""

    name: str
    status: str
    found: str
    remedy: str = ""


class Stopped(Exception):
    """The dry run cannot continue. The last check says why."""


@dataclass
class Report:
    """The findings so far, printed immediately. With `console` None this process prints nothing.

    Attributes:
        facts: for JSON: plan, forecast, sample, modes.
        out: where JSON goes at the end; None if it was not asked for.
        bad_input: a run would be refused.
        is_alone: this process left a step that the others are still in, so no collective call is possible.
    """

    console: Console | None
    out: TextIO | None = None
    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    bad_input: bool = False
    is_alone: bool = False

    def show(self, *what: RenderableType) -> None:
        if self.console is not None:
            for one in what:
                self.console.print(one, highlight=False)

    def add(self, name: str, passed: bool, found: str, remedy: str = "") -> None:
        self.checks.append(Check(name, "PASS" if passed else "FAIL", found, "" if passed else remedy))

    @contextmanager
    def trying(self, name: str, may_be_refused: bool = False) -> Iterator[None]:
        """Turn an error in this context into a failed check, which ends the dry run.

        Args:
            may_be_refused: bad input is a skipped check, because the run itself would not do this.

        Raises:
            Stopped: after a failed check.
        """
        try:
            yield
        except InputError as error:
            if may_be_refused:
                self.checks.append(Check(name, "skip", str(error)))
                return
            self.bad_input = True
            self.checks.append(Check(name, "FAIL", str(error)))
            raise Stopped from error
        except RunError as error:
            self.checks.append(Check(name, "FAIL", str(error)))
            raise Stopped from error
        except Exception as error:
            found = out_of_memory(error)
            if found is None:
                raise
            self.is_alone = True
            self.checks.append(Check(name, "FAIL", f"out of memory: {found}", f"make room: {WAYS_OUT}"))
            raise Stopped from error

    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.status == "FAIL"]

    def join(self, failures: Sequence[Sequence[Check]]) -> None:
        """Add the checks that failed only on other processes."""
        own = {check.name for check in self.checks if check.status == "FAIL"}
        for index, of_process in enumerate(failures):
            for name, _, found, remedy in of_process:
                if name not in own:
                    own.add(name)
                    self.checks.append(Check(f"{name} (process {index})", "FAIL", found, remedy))

    @property
    def exit_code(self) -> int:
        """0 all passed, 2 bad input, 3 a check failed."""
        return 2 if self.bad_input else 3 if self.failures() else 0

    def conclude(self) -> None:
        """Print all checks and the verdict."""
        failed = len(self.failures())
        verdict = (
            f"{failed} of {len(self.checks)} checks failed"
            if failed
            else f"all {len(self.checks)} checks passed"
        )
        self.show(check_table(self.checks), Text(verdict, style="bold red" if failed else "bold green"))
        if self.out is not None:
            checks = [check._asdict() for check in self.checks]
            whole = {"passed": not failed, "exit_code": self.exit_code, **self.facts, "checks": checks}
            print(json.dumps(whole, allow_nan=False), file=self.out, flush=True)


def report_of_this_process(json_to: TextIO | None) -> Report:
    """The report of the first process prints: tables on stdout, or one JSON object on `json_to`."""
    if os.environ.get("RANK", "0") != "0":
        return Report(None)
    if json_to is not None:
        return Report(None, json_to)
    return Report(Console(width=None if sys.stdout.isatty() else 100))


def check_table(checks: Sequence[Check]) -> Table:
    table = Table(title="checks", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column("check", max_width=34)
    table.add_column("found")
    for name, status, found, remedy in checks:
        text = escape(found) + (f"\n[bold]remedy:[/] {escape(remedy)}" if remedy else "")
        table.add_row(f"[{STYLE[status]}]{status}[/]", escape(name), text)
    return table


def mode_table(runs: Sequence[ModeRun], forecasts: Mapping[str, int]) -> Table:
    """A row for each mode. The peak was measured on a GPU; a CPU's allocator keeps no count."""
    table = Table(title="modes, at the longest rows", title_justify="left")
    table.add_column("mode")
    for name in ("ms/step", "peak", "forecast", "loss of each agent"):
        table.add_column(name, justify="right")
    for run in runs:
        losses = " ".join(f"{loss:.4f}" for loss in run.losses[-1])
        peak = "" if run.peak is None else in_words(run.peak)
        table.add_row(run.mode, f"{1000 * run.step_s:,.0f}", peak, in_words(forecasts[run.mode]), losses)
    return table


def sample_view(tokens: Sequence[Mapping[str, Any]], what: str = "the first training row") -> Group:
    """A row, token by token: | after one without loss, [] around one with loss, {} where loss is missing."""
    line = Text()
    for token in tokens:
        text = token["text"].replace("\n", "\\n")
        if token.get("unlearnt"):
            line.append(f"{{{text}}}", style="bold red")
        else:
            line.append(
                f"[{text}]" if token["loss"] else f"{text}|", style="bold green" if token["loss"] else "dim"
            )
    targets = sum(token["loss"] for token in tokens)
    title = f"{what}: {len(tokens)} tokens, loss on the {targets} in brackets"
    if unlearnt := sum(bool(token.get("unlearnt")) for token in tokens):
        title += f", none on the {unlearnt} in braces, which hold a part of the completion"
    return Group(Text(title, style="italic"), line, Text())
