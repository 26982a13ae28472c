"""No silence: what takes longer than a few seconds says what it is."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 2.0  # what is done by then needs no line
IMPORTING = "importing torch and transformers"

logger = logging.getLogger("chorus")


def say(line: str) -> None:
    """One line, from the first process alone: to the run's log where it is open, to stderr before."""
    if os.environ.get("RANK", "0") != "0":
        return
    if logger.handlers:
        logger.info(line)
    else:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Say `what` is under way if it takes longer than `PATIENCE_S` seconds. Also a decorator of functions."""
    timer = threading.Timer(PATIENCE_S, say, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
