"""The rows of a benchmark on disk: NAME.json with every figure
and NAME.md for readers, written after every row."""

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

Row = dict[str, Any]


class Results:
    """The measured rows. Several threads may add to them.

    Args:
        key: what identifies a row. A row that is measured again replaces the earlier one.
        page: the Markdown page of all rows.
    """

    def __init__(
        self, out: Path, name: str, key: Callable[[Row], Hashable], page: Callable[[list[Row]], str]
    ):
        self._files = out / f"{name}.json", out / f"{name}.md"
        self._key, self._page, self._lock = key, page, Lock()
        self.rows: list[Row] = (
            json.loads(self._files[0].read_text())["rows"] if self._files[0].exists() else []
        )

    def of(self, row: Row) -> Row | None:
        """The row of the same key, if there is one."""
        return next((known for known in self.rows if self._key(known) == self._key(row)), None)

    def is_measured(self, row: Row) -> bool:
        known = self.of(row)
        return known is not None and "failed" not in known

    def add(self, row: Row, sort_key: Callable[[Row], Any] | None = None) -> None:
        with self._lock:
            self.rows = [known for known in self.rows if self._key(known) != self._key(row)] + [row]
            if sort_key is not None:
                self.rows.sort(key=sort_key)
            self.write()

    def write(self) -> str:
        """Write both files; returns the page."""
        page = self._page(self.rows)
        self._files[0].parent.mkdir(parents=True, exist_ok=True)
        for file, text in zip(
            self._files, (json.dumps({"rows": self.rows}, indent=1) + "\n", page), strict=True
        ):
            new = file.with_name(f"{file.name}.new")
            new.write_text(text)
            new.replace(file)
        return page


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


def recompute_cell(row: Row) -> str:
    return "" if row["recompute"] == "none" else row["recompute"]


def gib_cell(row: Row) -> str:
    return "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
