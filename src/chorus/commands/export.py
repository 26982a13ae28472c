"""`chorus export RUN... OUT`: agents for other tools, with a model card and the commands to serve them."""

from collections.abc import Sequence
from pathlib import Path

from chorus.commands.parser import CommandParser
from chorus.errors import InputError
from chorus.progress import IMPORTING, announced

EXAMPLES = """examples:
  chorus export runs/default exported                  # agent_0/, ..., ensemble.json, README.md
  chorus export adapters/a adapters/b exported         # of PEFT folders that any tool has made
  chorus export runs/default mean --merge cat          # one adapter: the weighted mean of what the agents add
  chorus export runs/default model --merge-into-base   # a plain model folder with that mean in its weights

A mean of weights is one model. It is not the mixture, which needs all agents: see docs/export.md."""


def main(arguments: Sequence[str]) -> None:
    """Write the export, and say where it is.

    Raises:
        InputError: the paths hold no agents, or OUT is in use.
    """
    options = _parser().parse_args(arguments)
    *runs, out = options.paths
    if not runs:
        raise InputError("command line: one folder is named; give a RUN and then OUT, a new folder")
    # These imports take seconds: bad arguments are refused before.
    with announced(IMPORTING):
        from chorus.exporting.export import export
        from chorus.monitoring.run_log import quiet_libraries

    quiet_libraries()
    merge = "into-base" if options.merge_into_base else options.merge or "none"
    with announced("writing the export"):
        export([Path(run) for run in runs], Path(out), merge, options.base)
    print(f"{out}: written; {Path(out, 'README.md')} says how to load and serve it")


def _parser() -> CommandParser:
    what = "Write agents into a new folder, for PEFT, transformers, vLLM and SGLang."
    parser = CommandParser("export", what, EXAMPLES)
    about = "an output folder, a checkpoint, or PEFT LoRA folders; and last the new folder"
    parser.add_argument("paths", metavar="RUN... OUT", nargs="+", help=about)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--merge", choices=["cat"], help="one adapter of rank K x R in place of K adapters")
    kind.add_argument("--merge-into-base", action="store_true", help="a model in place of adapters")
    parser.add_argument("--base", metavar="NAME", help="name this folder or hub id as the base")
    return parser
