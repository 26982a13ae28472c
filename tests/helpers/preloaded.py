"""Processes forked from one that has imported all they need, in place of those that a launcher starts.

A launcher's start takes some ten seconds of CPU time for each process, nearly all of it imports. So `train`
and `forked` fork the processes of a run, in the environment that the real launcher gives, with train.py (or
another script) as `__main__`. Before the fork nothing is done but imports: no thread, process group,
generator or model is inherited. After it each process has a session and group of its own. Tests of the
launchers themselves use `launching.py`.

As a script this file is what a launcher launches to learn that environment: `preloaded.py FOLDER`.
"""

import gc
import json
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    own = Path(sys.argv[1], os.environ.get("RANK", "0"))
    own.write_text(json.dumps(dict(os.environ)))
    sys.exit()

import launching
from launching import PATIENCE_S, ROOT, environment, wait_for
from torch.distributed import TCPStore

MODULES = (
    "train",
    "datasets",
    "torch.utils.tensorboard",
    "transformers.models.gemma.tokenization_gemma",
    "transformers.models.gemma2.modeling_gemma2",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
FORKS = multiprocessing.get_context("forkserver")
LOCK = threading.Lock()  # multiprocessing looks at all its children at each start


def preload() -> None:
    """Start the parent of all processes, unless it runs. Its
    environment is a run's: libraries read it on import."""
    FORKS.set_forkserver_preload([*MODULES])
    kept = dict(os.environ)
    os.environ.update(environment(PYTHONPATH=os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])))
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(kept)


def environments(launcher: Sequence[str]) -> list[dict[str, str]]:
    """What the launcher sets for each process, by rank. The last word of `launcher` is the script. The
    launcher is forked, too."""
    command, *options = [*launcher[:-1], str(Path(__file__))]
    with tempfile.TemporaryDirectory() as place:
        if command == sys.executable:
            subprocess.run([command, *options, place], env=environment(), check=True)
        else:
            preload()
            log = Path(place, "log")
            launched = Workers([environment()], [*options, place], log, script=command)
            assert launched.wait() == 0, log.read_text()
            log.unlink()
        files = sorted(Path(place).iterdir(), key=lambda file: int(file.name))
        return [json.loads(file.read_text()) for file in files]


def environments_once(launcher: Sequence[str]) -> list[dict[str, str]]:
    """`environments`, asked of each launcher once in a test
    run, by whichever of its processes comes first."""
    file = Path(os.environ["CHORUS_TEST_LAUNCHERS"], "-".join(launcher[:-1]).replace("/", "_"))
    if not file.exists():
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(json.dumps(environments(launcher)))
        new.replace(file)
    return json.loads(file.read_text())


def forked(
    command: Sequence[str], *settings: str, timeout: float = PATIENCE_S, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As `launching.launch`, forked: the script that ends `command`, with more variables in its environment.
    Its exit code is the first one that is not 0.
    """
    preload()
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "stdout"), Path(place, "stderr")
        of_ranks = [{**own, **environment} for own in environments_once(command)]
        workers = Workers(of_ranks, settings, out, err, script=command[-1])
        end = time.monotonic() + timeout
        while workers.poll() is None:
            if time.monotonic() > end:
                workers.kill()
                raise subprocess.TimeoutExpired(list(command), timeout, out.read_text(), err.read_text())
            time.sleep(0.02)
        return subprocess.CompletedProcess(
            [*command, *settings], workers.poll() or 0, out.read_text(), err.read_text()
        )


def train(command: Sequence[str], output_dir: Path, *settings: str) -> list[dict[str, Any]]:
    """As `launching.train`, forked."""
    return launching.train(command, output_dir, *settings, run=forked)


class Workers:
    """The forked processes of one run, in the manner of `subprocess.Popen`."""

    def __init__(
        self,
        of_ranks: Sequence[Mapping[str, str]],
        settings: Sequence[str],
        log: Path,
        error_log: Path | None = None,
        script: str = "train.py",
        most_bytes: int = resource.RLIM_INFINITY,
    ):
        """most_bytes: beyond which no file of theirs can grow."""
        meeting = {}
        if len(of_ranks) > 1:  # as under torchrun, whose launcher holds the store, not the first worker
            self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self._store.port)}
        with LOCK:
            logs = (log, error_log or log)
            self._processes = [
                FORKS.Process(target=work, args=({**own, **meeting}, script, settings, logs, most_bytes))
                for own in of_ranks
            ]
            for process in self._processes:
                process.start()

    @property
    def pids(self) -> list[int | None]:
        """By rank."""
        return [process.pid for process in self._processes]

    @property
    def exit_codes(self) -> list[int | None]:
        """By rank; None while the process lives."""
        with LOCK:
            return [process.exitcode for process in self._processes]

    def poll(self) -> int | None:
        """None while one of them lives; then the first exit code that is not 0."""
        codes = self.exit_codes
        return None if None in codes else next(filter(None, codes), 0)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        wait_for(lambda: self.poll() is not None, timeout)
        return self.poll() or 0

    def kill(self) -> None:
        with LOCK:
            for process in self._processes:
                process.kill()
                process.join()


def work(
    own: Mapping[str, str], script: str, settings: Sequence[str], logs: tuple[Path, Path], most_bytes: int
) -> None:
    """The script, as a launcher's process."""
    os.setsid()
    gc.freeze()  # as train.py does after its imports: a collection takes 0.2 s otherwise
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    for number, log in enumerate(logs, start=1):
        with log.open("a") as file:
            os.dup2(file.fileno(), number)
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "a thread before the fork"
    assert sys.modules.keys() >= set(MODULES), "not preloaded"
    multiprocessing.set_start_method(
        None, force=True
    )  # for DataLoader workers: so far it is this process's own
    os.environ.clear()
    os.environ.update(own)
    os.chdir(ROOT)
    sys.argv = [script, *settings]
    runpy.run_path(script, run_name="__main__")
