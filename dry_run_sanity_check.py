"""Try a configuration before a long run: `python dry_run_sanity_check.py [--config FILE] [--json] [key=value ...]`.

Or `accelerate launch dry_run_sanity_check.py ...`, as the run will be launched. It takes two optimiser steps in every
mode, saves, reads again, and writes nothing into output_dir. Exit codes: 0 all checks passed, 2 bad input, 3 a check
failed. --json prints one JSON object on stdout, and nothing else there.
"""

import json
import sys

from chorus.config import load_config
from chorus.errors import InputError, input_errors_end_the_program

if __name__ == "__main__":
    AS_JSON = "--json" in sys.argv
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
    # Before the heavy imports, as in train.py.
    with input_errors_end_the_program():
        try:
            CONFIG = load_config([argument for argument in sys.argv[1:] if argument != "--json"])
        except InputError as error:
            if AS_JSON:
                print(json.dumps({"passed": False, "exit_code": 2, "checks": [], "error": str(error)}))
            raise

    from chorus.dry_run import dry_run
    from chorus.report import open_report
    from train import train

    with open_report(AS_JSON) as report:
        code = dry_run(CONFIG, train, report)
    sys.exit(code)
