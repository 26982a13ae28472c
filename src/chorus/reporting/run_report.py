"""A report at the end of a run. matplotlib is checked at the start of the run and imported at the end."""

import logging
from importlib.util import find_spec
from pathlib import Path

from chorus.errors import InputError

logger = logging.getLogger(__name__)


def check_report(asked_by: str) -> None:
    """Raise InputError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError(f"{asked_by} needs the package matplotlib; pip install 'chorus[report]'")


def write_run_report(output_dir: Path) -> None:
    """Write `output_dir/report.html`. One process calls it, once the scores are written."""
    from chorus.reporting.page import write_report  # imports matplotlib, which other runs do not need

    logger.info("the report is %s", write_report([output_dir]))
