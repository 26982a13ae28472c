"""train.py, in which one process meets its end: `fault_worker.py WHERE ACT settings`.

WHERE: forward or backward, of process 1 in step 5; save, of process 0, which writes, after step 4; or
export, of process 0, amid the first agent. ACT: kill, exit, stop; `stop soon`, too, but from step 5 on the
others wait for 5 seconds only; `memory`: it asks for more than any host has; `ask`: SIGTERM.

WHERE may also be `last words`, and ACT ask or kill: the last process is asked to stop, or killed, in step 5.
Every one is asked as it closes the engine, before its last line, and again after that line, as Python takes
itself down.
"""

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import train
from chorus.checkpoint import export, store
from chorus.collectives import limit_waiting, lost_processes_named
from chorus.config import load_config
from chorus.errors import SIGNALS, end_on_signals, input_errors_end_the_program
from chorus.planning.memory_check import memory_errors_named
from chorus.training.engine import Engine

ENDS = {
    "ask": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(0),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "memory": lambda: torch.empty(2**60),
}


class Asked:
    """Sends this process every signal that asks it to end, as the last reference to it goes."""

    def __del__(self, kill: Any = os.kill, own: int = os.getpid(), numbers: Any = SIGNALS) -> None:
        for number in numbers:
            kill(own, number)


def arrange_last_words(act: str) -> None:
    run_backward, close, steps = Engine.backward, Engine.close, itertools.count(1)
    is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1

    def backward(self: Engine, share: Any) -> None:
        if next(steps) == 5 and is_last:
            ENDS[act]()
        run_backward(self, share)

    def close_and_ask(self: Engine) -> None:
        Asked()
        close(self)

    Engine.backward, Engine.close = backward, close_and_ask
    sys.asked = Asked()  # pyright: ignore[reportAttributeAccessIssue]  # the last module that Python takes down


def arrange(where: str, act: str) -> None:
    is_victim = int(os.environ.get("RANK", "0")) == (0 if where in ("save", "export") else 1)
    write, run_backward, steps = store.save_tensors, Engine.backward, itertools.count(1)
    write_adapter = export.save_tensors

    def end() -> None:
        Path(os.environ["CHORUS_TEST_FAULT"]).write_text(str(os.getpid()))
        ENDS[act.split()[0]]()

    def save_file(tensors: Any, file: Path, *arguments: Any, **more: Any) -> None:
        if where == "save" and "step_000004" in str(file):
            end()
        write(tensors, file, *arguments, **more)

    def save_adapter(tensors: Any, file: Path, *arguments: Any, **more: Any) -> None:
        if where == "export" and "agents.new" in file.parts:
            ENDS[act]()
        write_adapter(tensors, file, *arguments, **more)

    def backward(self: Engine, share: Any) -> None:
        if next(steps) == 5:
            if act == "stop soon":
                limit_waiting(5)
            if is_victim and where == "forward":  # the other process goes on alone into the backward pass
                end()
            if is_victim and where == "backward":
                share.register_hook(lambda _gradient: end())
        run_backward(self, share)

    store.save_tensors, export.save_tensors, Engine.backward = save_file, save_adapter, backward


if __name__ == "__main__":
    where, act, *settings = sys.argv[1:]
    end_on_signals()
    with input_errors_end_the_program():
        config = load_config(settings)
        if where == "last words":
            arrange_last_words(act)
        else:
            arrange(where, act)
        with lost_processes_named(config.collective_timeout_s), memory_errors_named(config):
            train.main(config)
