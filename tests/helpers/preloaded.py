"""Processes of train.py forked from one that has imported all it needs: a launcher's start is seconds of CPU, nearly
all of it imports.

Before the fork nothing is done but imports: no thread, process group, generator or model is inherited. After it each
process has a session and group of its own, the environment that the real launcher gives, and train.py as `__main__`.
As a script it is what a launcher launches to learn that environment: `preloaded.py FOLDER`.
"""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

if __name__ == "__main__":
    own = Path(sys.argv[1], os.environ.get("RANK", "0"))
    own.write_text(json.dumps(dict(os.environ)))
    sys.exit()

from launching import ROOT, environment, launch
from torch.distributed import TCPStore

MODULES = ("train", "transformers.models.gemma2.modeling_gemma2", "deepspeed.runtime.zero.muon.muon_optimizer")
FORKS = multiprocessing.get_context("forkserver")
LOCK = threading.Lock()  # multiprocessing looks at all its children at each start


def preload() -> None:
    """Start the parent of all processes; in the environment of every run, for libraries look at it as they come."""
    FORKS.set_forkserver_preload([*MODULES])
    kept = dict(os.environ)
    os.environ.update(environment(PYTHONPATH=os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])))
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(kept)


def environments(launcher: Sequence[str]) -> list[dict[str, str]]:
    """What the launcher sets for each process, by rank."""
    with tempfile.TemporaryDirectory() as place:
        result = launch([*launcher[:-1], str(Path(__file__)), place])
        assert result.returncode == 0, result.stderr
        files = sorted(Path(place).iterdir(), key=lambda file: int(file.name))
        return [json.loads(file.read_text()) for file in files]


class Workers:
    """The processes of one run, in the manner of `subprocess.Popen`."""

    def __init__(self, of_ranks: Sequence[Mapping[str, str]], settings: Sequence[str], log: Path):
        meeting = {}
        if len(of_ranks) > 1:  # torchrun holds the store, too, and not the first worker
            self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self._store.port)}
        with LOCK:
            self._processes = [FORKS.Process(target=work, args=({**own, **meeting}, settings, log)) for own in of_ranks]
            for process in self._processes:
                process.start()

    @property
    def pids(self) -> list[int | None]:
        """By rank."""
        return [process.pid for process in self._processes]

    def poll(self) -> int | None:
        """None while one of them lives; then the first exit code that is not 0."""
        with LOCK:
            codes = [process.exitcode for process in self._processes]
        return None if None in codes else next(filter(None, codes), 0)


def work(own: Mapping[str, str], settings: Sequence[str], log: Path) -> None:
    """train.py, as a launcher's process."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "a thread before the fork"
    assert sys.modules.keys() >= set(MODULES), "not preloaded"
    multiprocessing.set_start_method(None, force=True)  # of DataLoader workers: it was this process's own
    os.environ.clear()
    os.environ.update(own)
    os.chdir(ROOT)
    sys.argv = ["train.py", *settings]
    runpy.run_path("train.py", run_name="__main__")
