"""`chorus generate RUN PROMPT...`: answers of an ensemble, as text, as JSON or as a page."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from chorus.errors import InputError
from chorus.progress import IMPORTING, announced

EPILOG = """examples:
  chorus generate runs/default "Ada has 212 apples. Ben gives Ada 30 more. How many apples has Ada?"
  chorus generate runs/default --vote --temperature 0.7 "..." "..."
  chorus generate runs/default --json - < question.txt

RUN is an output folder, a checkpoint, or a folder of PEFT LoRA folders. The prompt - is read from stdin. In a
terminal tokens are coloured by how far the agents disagree: green, yellow, red, white on red."""


def main(arguments: Sequence[str]) -> None:
    """Load, answer, print.

    Raises:
        InputError: the paths hold no ensemble, or a prompt cannot be used.
    """
    from chorus.commands.options import Parser, add_options

    parser = Parser(
        "chorus generate",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Ask an ensemble.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "run", metavar="RUN", help="an output folder, a checkpoint, or a folder of PEFT LoRA folders"
    )
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to ask; - reads it from stdin")
    add_options(parser)
    out = parser.add_argument_group("what is written")
    out.add_argument("--json", action="store_true", help="print one JSON object with every figure")
    out.add_argument("--html", metavar="FILE", help="also write a page with coloured tokens")
    options = parser.parse_intermixed_args(arguments)
    prompts = _prompts(options.prompts)
    if options.html is not None and not Path(options.html).absolute().parent.is_dir():
        raise InputError(f"--html {options.html}: there is no such folder; name a file in one that is there")
    _generate(options, prompts)


def _prompts(given: Sequence[str]) -> list[str]:
    """The prompts; - reads one from stdin.

    Raises:
        InputError: there is none, or one is empty, a folder or a key.
    """
    if not given and sys.stdin.isatty():
        raise InputError("command line: no PROMPT; write one, or - to read it from stdin")
    if list(given).count("-") > 1:
        raise InputError("command line: the prompt - is given twice; stdin holds one prompt")
    prompts = [_of_stdin() if prompt == "-" else prompt for prompt in given or ["-"]]
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise InputError(f"command line: prompt {number} is empty; write a question")
        if os.path.isdir(prompt):  # not Path.is_dir, which fails for a long question
            raise InputError(
                f"command line: prompt {number} is the folder {prompt}; RUN is one folder: put the adapters "
                "of an ensemble into one, and name that"
            )
        if re.fullmatch(r"[a-z][a-z_]+=\S*", prompt):
            raise InputError(
                f"command line: prompt {number} is {prompt}, which reads as a key; `chorus generate` has "
                "options, see --help; to ask it all the same, give it on stdin"
            )
    return prompts


def _of_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: is not UTF-8 text ({error.reason}); convert it first") from None


def _generate(options: argparse.Namespace, prompts: list[str]) -> None:
    # These imports take seconds: bad arguments are refused before.
    with announced(IMPORTING):
        from rich.console import Console

        from chorus.commands.answer_page import write_page
        from chorus.commands.answer_view import show
        from chorus.commands.asking import ask, described, open_of, write
        from chorus.monitoring.run_log import quiet_libraries

    quiet_libraries()
    opened = open_of(options, [options.run])
    asked = ask(
        opened,
        options,
        [(prompt, opened.form.ask([{"role": "user", "content": prompt}])) for prompt in prompts],
    )
    if options.json:
        for _ in write(opened, asked):
            pass
        about = {"run": options.run, "base": opened.ensemble.base_name, "agents": opened.ensemble.names}
        print(json.dumps({**about, "answers": [described(one) for one in asked]}, ensure_ascii=False))
    else:
        show(Console(highlight=False, markup=False), asked, write(opened, asked))
    if options.html is not None:
        write_page(Path(options.html), opened, asked)
