"""`python -m chorus.config [--defaults] [--config FILE] [key=value ...]` prints a configuration."""

import sys

from chorus.config.load import main
from chorus.errors import input_errors_end_the_program

if __name__ == "__main__":
    with input_errors_end_the_program():
        main(sys.argv[1:])
