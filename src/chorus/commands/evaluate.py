"""`chorus evaluate RUN... [--data FILE] [key=value ...]`: scores of an ensemble, for people or as JSON."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chorus.checkpoint.atomic_files import json_lines
from chorus.commands.parser import CommandParser
from chorus.config.load import config_over
from chorus.errors import InputError
from chorus.progress import IMPORTING, announced

ALPHA = 1.0  # pseudo-counts for each agent in the fitted mixture, where dirichlet_alpha_aggregator is null

EXAMPLES = """examples:
  chorus evaluate runs/default
  chorus evaluate runs/default --data problems.jsonl --ood others.jsonl --problems scored.jsonl
  chorus evaluate adapters/a adapters/b --data problems.jsonl 'completion_template=" {label}"'
  torchrun --nproc_per_node 2 -m chorus evaluate runs/default --json

Keys are those of configs.yaml; a run's own configuration is the default. A share of the problems
(calibration_split) is used to fit temperatures and mixture weights, and is not scored."""


def main(arguments: Sequence[str]) -> None:
    """Load, score, print.

    Raises:
        InputError: the paths hold no ensemble, or the data cannot be used.
    """
    options = _parser().parse_intermixed_args(arguments)
    runs = [one for one in options.run if _is_path(one)]
    settings = [one for one in options.run if not _is_path(one)]
    if not runs:
        raise InputError("command line: no RUN; name an output folder, a checkpoint or PEFT LoRA folders")
    for path in runs:
        if not Path(path).is_dir():
            raise InputError(
                f"{path}: no such folder; name an output folder, a checkpoint or PEFT LoRA folders"
            )
    known = _configuration_of(Path(runs[0])) if len(runs) == 1 else None
    if known is None and options.data is None:
        raise InputError(f"command line: {runs[0]} has no data set of its own; name one with --data FILE")
    config = config_over(
        {**(known or {}), "use_deepspeed": False, "agent_parallel_size": 1}, settings, runs[0]
    )
    if options.ood is not None:
        config = config.model_copy(update={"ood_dataset_name": options.ood})
    elif options.data is not None and config.ood_dataset_name == "auto":
        config = config.model_copy(update={"ood_dataset_name": None})
    given = {one.partition("=")[0] for one in settings}
    _evaluate(runs, config, config.model_name if "model_name" in given else None, options)


def _evaluate(runs: list[str], config: Any, base: str | None, options: argparse.Namespace) -> None:
    # These imports take seconds: bad arguments are refused before.
    with announced(IMPORTING):
        from rich.console import Console

        from chorus.collectives import lost_processes_named
        from chorus.data.rows import read_held_out, read_rows
        from chorus.data.sources import open_split
        from chorus.ensemble.evaluate import evaluate
        from chorus.ensemble.evaluation_rows import read_evaluation_rows
        from chorus.ensemble.load import load_ensemble
        from chorus.ensemble.tables import evaluation_table
        from chorus.monitoring.run_log import quiet_libraries
        from chorus.training.engine import DTYPES, decide_precision, make_accelerator

    quiet_libraries()
    name, key = (options.data, "--data") if options.data else (config.dataset_name, "dataset_name")
    if options.data or options.split:
        open_split(
            name, options.split, key, "--split" if options.split else None
        )  # refused before the base is loaded
    dtype = DTYPES[decide_precision(config.mixed_precision)]
    accelerator = make_accelerator(config, config)
    with lost_processes_named(config.collective_timeout_s):
        how = {"device": accelerator.device, "dtype": dtype, "base": base, "base_option": "model_name=BASE"}
        ensemble = load_ensemble(runs, **how, attn_implementation=config.attn_implementation)
        if options.data or options.split:
            of_data = (name, key, config.eval_samples, ensemble.tokenizer, accelerator, options.split)
            held_out = read_held_out(config, *of_data)
        else:
            rows = read_rows(config, config.seed, ensemble.tokenizer, accelerator)
            held_out = rows.held_out(ensemble.tokenizer, config.eval_samples)
        if not held_out.rows:
            raise InputError(f"{name}: has no held-out rows; name others with --data FILE or --split SPLIT")
        divided = read_evaluation_rows(held_out, config, ensemble.tokenizer, accelerator)
        with _progress(accelerator.is_main_process, len(divided.scored), len(divided.ood)) as progress:
            found = evaluate(
                *(ensemble.agents, divided, config, config.seed),
                alpha=config.dirichlet_alpha_aggregator or ALPHA,
                progress=progress,
            )
        if accelerator.is_main_process:
            if options.problems:
                _write_problems(Path(options.problems), found.problems)
            if options.json:
                agents = {f"agent_{index}": name for index, name in enumerate(ensemble.names)}
                print(
                    json.dumps({"runs": runs, "base": ensemble.base_name, "agents": agents, **found.report()})
                )
            else:
                Console().print(evaluation_table(found))
        accelerator.wait_for_everyone()
        accelerator.end_training()


@contextmanager
def _progress(is_shown: bool, num_scored: int, num_ood: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar over this process's problems, on stderr, so that stdout holds only the scores."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as bar:
        task = bar.add_task("calibrating", total=num_scored + num_ood)

        def advance(what: str, count: int) -> None:
            bar.update(task, description=what, advance=0 if what == "calibrated" else count)

        yield advance


def _write_problems(file: Path, problems: Sequence[Mapping[str, Any]]) -> None:
    try:
        file.write_text(json_lines(problems), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--problems {file}: cannot be written ({error.strerror}); name another file"
        ) from error


def _configuration_of(path: Path) -> Mapping[str, Any] | None:
    """The configuration of a run or a checkpoint; None of PEFT folders, which have none."""
    for name in ("ensemble.json", "state.json"):
        file = path / name
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8")).get("config")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(
                f"{file}: cannot be read as JSON with a configuration; "
                f"name {path / 'agents'} with --data FILE"
            ) from error
        if config is None:
            return None  # an export of PEFT folders
        if not isinstance(config, dict):
            raise InputError(
                f"{file}: its configuration is not an object; name {path / 'agents'} with --data FILE"
            )
        return config
    return None


def _is_path(argument: str) -> bool:
    return "=" not in argument or Path(argument).exists()


def _parser() -> CommandParser:
    what = "Score the base, each agent and their mixtures on held-out problems."
    parser = CommandParser("evaluate", what, EXAMPLES)
    about = "an output folder, a checkpoint, or several PEFT LoRA folders; and keys to set"
    parser.add_argument("run", metavar="RUN|key=value", nargs="*", help=about)
    parser.add_argument(
        "--data", metavar="FILE", help="problems to score; default: the held-out rows of the run"
    )
    parser.add_argument("--split", metavar="SPLIT", help="of the data; default: the held-out one")
    parser.add_argument("--ood", metavar="FILE", help="problems of another kind, to be told by uncertainty")
    parser.add_argument("--json", action="store_true", help="print all scores as one JSON object")
    parser.add_argument("--problems", metavar="FILE", help="write one JSON object a problem to this file")
    return parser
