"""`chorus chat RUN...`: a conversation with an ensemble in a terminal."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from chorus.errors import InputError
from chorus.progress import IMPORTING, announced

if TYPE_CHECKING:
    from rich.console import Console

    from chorus.data.chat import Turn
    from chorus.serving.opened import Opened

EPILOG = """in the conversation:
  /reset   forget the earlier turns
  /quit    leave, as do Ctrl-D and a second Ctrl-C; the first one ends an answer

RUN is an output folder, a checkpoint, or PEFT LoRA folders. Agents that were trained on single questions, and
not on turns, are asked each question by itself."""


def main(arguments: Sequence[str]) -> None:
    """Load, then answer one question after another.

    Raises:
        InputError: the paths hold no ensemble.
    """
    from chorus.commands.options import Parser, add_options

    parser = Parser(
        "chorus chat",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Talk to an ensemble.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="+", help="an output folder, a checkpoint, or PEFT LoRA folders"
    )
    add_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system's turn, where there is a chat template")
    options = parser.parse_intermixed_args(arguments)

    with announced(IMPORTING):
        from rich.console import Console

        from chorus.commands.asking import open_of
        from chorus.monitoring.run_log import quiet_libraries

    quiet_libraries()
    opened = open_of(options, options.run)
    if options.system is not None and opened.form.form != "chat":
        raise InputError(
            f"--system: the form {opened.form.form} has no system's turn; leave it out or name --form chat"
        )
    _converse(Console(highlight=False, markup=False), opened, options)


def _converse(console: "Console", opened: "Opened", options: argparse.Namespace) -> None:
    if console.is_terminal:
        count = len(opened.ensemble.names)
        alone = "" if opened.form.form == "chat" else " Each question is asked by itself."
        console.print(f"{count} agents over {opened.ensemble.base_name}.{alone} /quit leaves.", style="dim")
        with suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and a history in `input`
    system = [{"role": "system", "content": options.system}] if options.system else []
    turns: list[Turn] = [*system]
    while (line := _line(console)) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            turns = [*system]
        elif line.startswith("/"):
            console.print(f"there is no command {line.split()[0]}; there is /reset and /quit", style="dim")
        elif line:
            asked = [*turns, {"role": "user", "content": line}]
            answer = _answer(console, opened, options, asked)
            if answer is not None and opened.form.form == "chat":
                turns = [*asked, {"role": "assistant", "content": answer}]


def _line(console: "Console") -> str | None:
    """The next line, stripped; None at the end of the conversation."""
    try:
        return input("> " if console.is_terminal and sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        console.print()
        return None


def _answer(
    console: "Console", opened: "Opened", options: argparse.Namespace, turns: Sequence["Turn"]
) -> str | None:
    """Stream an answer; None where the question cannot be asked. Ctrl-C ends the answer."""
    from chorus.commands.answer_view import show
    from chorus.commands.asking import ask, write

    try:
        [asked] = ask(opened, options, [(turns[-1]["content"], opened.form.ask(turns))])
    except InputError as error:
        console.print(f"error: {error}", style="bold")
        return None
    try:
        show(console, [asked], write(opened, [asked]))
    except KeyboardInterrupt:
        console.print(" (ended)", style="dim")
        answer = asked.texts[0].answer
        return asked.texts[0].ending.text_of(answer) if answer.token_ids else None
    return asked.texts[asked.chosen].answer.text
