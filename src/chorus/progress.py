"""Messages about work that takes longer than a few seconds."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 2.0  # faster work is not announced
IMPORTING = "importing torch and transformers"

logger = logging.getLogger("chorus")


def say(line: str) -> None:
    """Print one line on the first process: to the run's log if it is open, otherwise to stderr."""
    if os.environ.get("RANK", "0") != "0":
        return
    if logger.handlers:
        logger.info(line)
    else:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Print `what` if it takes longer than `PATIENCE_S` seconds. A context manager and a decorator."""
    timer = threading.Timer(PATIENCE_S, say, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
