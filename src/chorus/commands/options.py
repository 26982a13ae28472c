"""Options that several commands share. Cheap to import: mistakes are refused before libraries load."""

import argparse
from typing import NoReturn

from chorus.data.templates import FORMS
from chorus.errors import InputError

MAX_NEW_TOKENS = 256


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line for people."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}; --help shows what there is")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose the answerer and how it answers."""
    who = parser.add_argument_group("who answers (the mixture, unless one of these is given)")
    one = who.add_mutually_exclusive_group()
    one.add_argument("--member", metavar="K", type=int, help="agent K alone")
    one.add_argument("--base", action="store_true", help="the base without an adapter")
    one.add_argument("--vote", action="store_true", help="every agent alone, and the answer of the most")
    add_answer_options(parser)
    add_place_options(parser)


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """The options of how an answer is generated."""
    how = parser.add_argument_group("how")
    how.add_argument(
        "--temperature",
        metavar="T",
        type=_at_least_0,
        default=0.0,
        help="0, the default: the likeliest token",
    )
    how.add_argument("--top-p", metavar="P", type=_share, default=1.0, help="draw from the likeliest tokens")
    how.add_argument("--seed", metavar="N", type=int, default=0, help="of the draws")
    how.add_argument("--max-new-tokens", metavar="N", type=at_least_1, default=MAX_NEW_TOKENS, help="256")
    how.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="ends an answer; may be given several times",
    )


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """The options of how prompts are formed, and where answers are computed."""
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="chat: the base's chat template; template: the run's prompt_template; plain: the text as it is. "
        "Default: as the run was trained",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--model", metavar="PATH", help="the base, in place of the one that the adapters name")
    where.add_argument("--device", default="auto", help="cuda, cpu, ...")
    where.add_argument(
        "--precision", choices=("auto", "no", "bf16", "fp16"), default="auto", help="of weights"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None


def _at_least_0(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def above_0(text: str) -> float:
    """A number above 0, for argparse."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def at_least_1(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)
