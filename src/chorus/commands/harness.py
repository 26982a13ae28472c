"""`chorus harness RUN --tasks ...`: lm-evaluation-harness with an ensemble as its model."""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chorus.checkpoint.atomic_files import json_lines, json_text
from chorus.commands.parser import CommandParser
from chorus.errors import InputError
from chorus.progress import IMPORTING, announced

EXAMPLES = """examples:
  chorus harness runs/default --tasks arc_easy,hellaswag --limit 200
  chorus harness adapters/a adapters/b --tasks gsm8k --apply_chat_template --num_fewshot 5
  chorus harness runs/default --tasks mine --include_path tasks/ --json --samples samples.jsonl

Options that the harness has, too, mean what they mean there."""


def main(arguments: Sequence[str]) -> None:
    """Load, evaluate, print.

    Raises:
        InputError: the paths hold no ensemble, a task does not exist, or lm-eval is not installed.
    """
    options = _parser().parse_args(arguments)
    for path in options.runs:
        if not Path(path).is_dir():
            raise InputError(f"{path}: no such folder; name an output folder, a checkpoint or PEFT folders")
    batch_size = None if options.batch_size == "auto" else _positive("--batch_size", options.batch_size)
    names = [name for name in options.tasks.split(",") if name]
    if not names:
        raise InputError("--tasks: names no task; lm-eval ls tasks lists them")
    if find_spec("lm_eval") is None:
        raise InputError("chorus harness needs the package lm-eval; pip install 'chorus[harness]'")
    _run(options, names, batch_size)


def _run(options: argparse.Namespace, names: Sequence[str], batch_size: int | None) -> None:
    # These imports take seconds: bad arguments are refused before.
    with announced(IMPORTING):
        import torch

        from chorus.ensemble.load import load_ensemble
        from chorus.harness.run import load_tasks, run_harness
        from chorus.monitoring.run_log import quiet_libraries
        from chorus.training.engine import DTYPES, decide_precision

    quiet_libraries()
    include_path = None if options.include_path is None else Path(options.include_path)
    with announced("reading the tasks"):
        manager, tasks = load_tasks(names, include_path)  # before the base is loaded
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ensemble = load_ensemble(
        options.runs,
        device=device,
        dtype=DTYPES[decide_precision(options.precision)],
        base=options.base,
        base_option="--base BASE",
    )
    how = {
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "apply_chat_template": options.apply_chat_template,
        "system_instruction": options.system_instruction,
        "gen_kwargs": options.gen_kwargs,
    }
    with _progress() as progress:
        found = run_harness(ensemble, manager, tasks, names, batch_size=batch_size, progress=progress, **how)
    if options.samples:
        _write_samples(Path(options.samples), found.samples)
    if options.json:
        agents = {f"agent_{index}": name for index, name in enumerate(ensemble.names)}
        print(json_text({"base": ensemble.base_name, "agents": agents, "results": found.results}), end="")
    else:
        _print_tables(found.results)


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """A count of requests on stderr, so that stdout holds only the results."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.completed:.0f} requests answered by all"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda count: bar.advance(task, count)


def _print_tables(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """One table for each task, one row for each answerer."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name in next(iter(results.values())):
        metrics = dict.fromkeys(key for own in results.values() for key in own[name] if "_stderr" not in key)
        table = Table(title=name)
        for column in ("", *metrics):
            table.add_column(column, justify="right" if column else "left")
        for answerer, own in results.items():
            cells = [_cell(own[name], metric) for metric in metrics]
            table.add_row(answerer.replace("_", " "), *cells, style="bold" if answerer == "mixture" else None)
        console.print(table)


def _cell(own: Mapping[str, float], metric: str) -> str:
    value, error = own.get(metric, math.nan), own.get(f"{metric}_stderr", math.nan)
    if math.isnan(value):
        return ""
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _write_samples(file: Path, samples: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    rows = (
        {"answerer": answerer, "task": task, **json.loads(json.dumps(sample, default=str))}
        for answerer, own in samples.items()
        for task, of_task in own.items()
        for sample in of_task
    )
    try:
        file.write_text(json_lines(rows), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--samples {file}: cannot be written ({error.strerror}); name another") from error


def _positive(option: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{option} {value}: is not a whole number above 0; give one, or auto")
    return int(value)


def _parser() -> CommandParser:
    what = "Evaluate the base, each agent and their mixture on tasks of lm-evaluation-harness."
    parser = CommandParser("harness", what, EXAMPLES)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="an output folder, a checkpoint, or several PEFT LoRA folders")
    add("--tasks", required=True, metavar="NAME,...", help="tasks or groups of the harness")
    add("--include_path", metavar="DIR", help="a folder with task files of your own")
    add("--limit", type=float, metavar="N", help="at most N questions a task; below 1 a share of them")
    add("--num_fewshot", type=int, metavar="N", help="solved examples before each question")
    add("--batch_size", default="auto", metavar="N", help="requests at a time; auto: what fits")
    add("--apply_chat_template", action="store_true", help="ask in the base's chat template")
    add("--system_instruction", metavar="TEXT", help="a system turn for it")
    add("--gen_kwargs", metavar="KEY=VALUE,...", help="in place of a task's generation_kwargs")
    add("--base", metavar="NAME", help="a folder or hub id in place of the base that the agents name")
    add("--device", metavar="NAME", help="default: cuda where there is one")
    add("--precision", default="auto", choices=["no", "bf16", "fp16", "auto"], help="as mixed_precision")
    add("--json", action="store_true", help="print all results as one JSON object")
    add("--samples", metavar="FILE", help="write what was asked and answered, one JSON object a line")
    return parser
