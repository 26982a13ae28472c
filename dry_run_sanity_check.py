"""Try a configuration before a long run: `python dry_run_sanity_check.py [--config FILE] [--json] [key=value
...]`.

Or `accelerate launch dry_run_sanity_check.py ...`, as the run will be launched. It takes two optimiser steps
in every mode, saves, reads again, and writes nothing into output_dir. Exit codes: 0 all checks passed, 2 bad
input, 3 a check failed. --json prints one JSON object on stdout, and nothing else there.
"""

import json
import os
import sys

from chorus.errors import InputError, end_on_signals, input_errors_end_the_program

if __name__ == "__main__":
    end_on_signals()

from chorus.config import load_config
from chorus.progress import IMPORTING, say

if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
    JSON_TO = None
    if "--json" in sys.argv:
        sys.argv.remove("--json")
        JSON_TO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print, some of them while they are imported, goes to stderr
    # Before the heavy imports, as in train.py.
    with input_errors_end_the_program():
        try:
            CONFIG = load_config(sys.argv[1:])
        except InputError as error:
            if JSON_TO is not None and os.environ.get("RANK", "0") == "0":
                refused = {"name": "configuration", "status": "FAIL", "found": str(error), "remedy": ""}
                print(
                    json.dumps({"passed": False, "exit_code": 2, "checks": [refused]}),
                    file=JSON_TO,
                    flush=True,
                )
            raise
    say(f"{IMPORTING} ...")

    from chorus.planning.checks import report_of_this_process
    from chorus.planning.dry_run import dry_run
    from train import train

    sys.exit(dry_run(CONFIG, train, report_of_this_process(JSON_TO)))
