"""The argument parser of every subcommand: a mistake is one line on stderr, and exit code 2."""

import argparse
from typing import NoReturn

from chorus.errors import InputError


class CommandParser(argparse.ArgumentParser):
    """An argparse parser of one subcommand. Options are not abbreviated, and examples keep their lines."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            f"chorus {command}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=description,
            epilog=examples,
        )

    def error(self, message: str) -> NoReturn:
        """Raise InputError where argparse would exit the program."""
        raise InputError(f"command line: {message}; --help shows what there is")
