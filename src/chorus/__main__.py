"""`chorus COMMAND ...`, also `python -m chorus COMMAND ...`: what can be done with a trained ensemble."""

import sys
from importlib import import_module

from chorus.errors import InputError, input_errors_end_the_program

COMMANDS = {
    "evaluate": "scores of the base, each agent and their mixtures on held-out problems",
    "generate": "answers of the ensemble to prompts, and how far its agents agree",
    "chat": "a conversation with the ensemble in a terminal",
    "serve": "the ensemble behind OpenAI's protocol",
    "ask": "one mixed answer of agents that another server serves",
    "harness": "lm-evaluation-harness with the ensemble as its model",
    "report": "a page of pictures of a run, or of several side by side",
    "export": "agents for other tools: PEFT folders, one merged adapter, or a merged model",
}
USAGE = "\n".join(
    [
        "usage: chorus COMMAND [--help] ...",
        "",
        *(f"  {name:10} {about}" for name, about in COMMANDS.items()),
        "",
        "To train: accelerate launch train.py",
    ]
)


def main() -> None:
    """Run the command that the first argument names; what it needs is imported only then."""
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("--help", "-h"):
        print(USAGE)
        return
    with input_errors_end_the_program():
        if command not in COMMANDS:
            raise InputError(f"command line: {command!r} is not a command; there is {', '.join(COMMANDS)}")
        import_module(f"chorus.commands.{command}").main(arguments)


if __name__ == "__main__":
    main()
