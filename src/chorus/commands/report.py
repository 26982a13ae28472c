"""`chorus report RUN...`: a page of pictures of a run, or of several side by side."""

from collections.abc import Sequence
from pathlib import Path

from chorus.commands.parser import CommandParser
from chorus.errors import InputError
from chorus.progress import announced
from chorus.reporting.run_report import check_report

EXAMPLES = """examples:
  chorus report runs/default                          # writes report.html and report/ into it
  chorus report runs/default/checkpoints/step_000100  # the run up to there
  chorus report scored.jsonl                          # a file of chorus evaluate --problems scored.jsonl
  chorus report runs/a runs/b runs/c --out compared.html

Nothing is computed anew: the page shows what the run has written. It needs no network."""


def main(arguments: Sequence[str]) -> None:
    """Write the page, and say where it is.

    Raises:
        InputError: a path is not a run, or matplotlib is not installed.
    """
    options = _parser().parse_args(arguments)
    for path in options.runs:
        if not Path(path).exists():
            raise InputError(f"{path}: no such file or folder; name an output folder")
    if options.problems and len(options.runs) > 1:
        raise InputError("command line: --problems is of one run; name one, or leave it out")
    if options.out and not options.out.endswith(".html"):
        raise InputError(f"--out {options.out}: is not a page; give it a name that ends in .html")
    check_report("chorus report")
    with announced("importing matplotlib"):  # seconds
        from chorus.reporting.page import write_report

    out, problems = (None if one is None else Path(one) for one in (options.out, options.problems))
    with announced("drawing the pictures"):
        place = write_report([Path(path) for path in options.runs], out, problems)
    print(f"{place}: open it in any browser; its pictures are in {place.with_suffix('')}")


def _parser() -> CommandParser:
    what = "Write a page of pictures of a run, or of several side by side."
    parser = CommandParser("report", what, EXAMPLES)
    about = "an output folder, a checkpoint, or a file that chorus evaluate --problems has written"
    parser.add_argument("runs", metavar="RUN", nargs="+", help=about)
    parser.add_argument("--out", metavar="FILE", help="the page; its pictures go into a folder beside it")
    parser.add_argument("--problems", metavar="FILE", help="scored problems in place of the run's own")
    return parser
