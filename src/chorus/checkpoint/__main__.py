"""`python -m chorus.checkpoint import OLD NEW`: adapters of the
layout that came before, as ordinary PEFT folders."""

import sys

from chorus.errors import input_errors_end_the_program

if __name__ == "__main__":
    with input_errors_end_the_program():
        from chorus.checkpoint.legacy_import import main

        main(sys.argv[1:])
