"""`python -m chorus.checkpoint import OLD NEW`: adapters of the older layout become ordinary PEFT folders."""

import sys

from chorus.errors import input_errors_end_the_program

if __name__ == "__main__":
    with input_errors_end_the_program():
        from chorus.commands.import_older import main

        main(sys.argv[1:])
