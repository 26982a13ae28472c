"""docs/multi-node.md as it is written: a launcher a host, a shared folder, and a host that is lost.

Two hosts are two network namespaces, each with an address of its own on a cable between them, where this
machine allows it (root, and iproute2's `ip`); elsewhere two launchers on the loopback.
"""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from launching import BIN, ROOT, ZERO2, environment, processes_of, wait_for
from preloaded import Workers, environments_once, preload

from chorus.checkpoint.manifest import MANIFEST
from chorus.checkpoint.store import checkpoints, step_of

pytestmark = pytest.mark.launch
PATIENCE = 300.0  # seconds, for a machine with other work
# Without an end: each run is stopped once it has what is to be seen, however fast the machine is.
SETTINGS = (
    "num_agents=2",
    "lambda_sw=0.01",
    "batch_size=2",
    "eval_samples=0",
    "debug_subset_size=200",
    "max_train_steps=100000",
    "logging_steps=1",
)
SAVING = ("save_steps=5", "save_total_limit=null")


class Host(NamedTuple):
    """inside: what runs a command there. interface: of its address."""

    inside: list[str]
    interface: str
    address: str


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    names = [f"chorus-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            names[1],
        )
        addresses = [f"10.211.0.{number}" for number in (1, 2)]
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", name, "link", "set", interface, "up")
        yield [
            Host(["ip", "netns", "exec", *own], "eth0", at) for *own, at in zip(names, addresses, strict=True)
        ]
    except (OSError, subprocess.CalledProcessError):
        yield [Host([], "lo", f"127.0.0.{number}") for number in (1, 2)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)


@contextmanager
def running(
    hosts: list[Host], folder: Path, output_dir: Path, *more: str
) -> Iterator[list[subprocess.Popen]]:
    """A run of two processes on one host or two, a launcher each, from the newest checkpoint of `output_dir`.

    Host N's processes carry the mark `folder`/N. Whatever is left of them is killed at the end.
    `more`: further keys.
    """
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    launchers = []
    for rank, host in enumerate(hosts):
        launcher = [str(BIN / "accelerate"), "launch", "--config_file", "accelerate_config.yaml"]
        launcher += ["--num_machines", str(len(hosts)), "--machine_rank", str(rank), "--num_processes", "2"]
        launcher += ["--main_process_ip", hosts[0].address, "--main_process_port", str(port)]
        with (folder / f"{rank}.log").open("w") as log:
            process = subprocess.Popen(
                [*host.inside, *launcher, "train.py", *SETTINGS, *SAVING, *more, f"output_dir={output_dir}"],
                cwd=ROOT,
                env=environment(CHORUS_TEST_RUN=f"{folder}/{rank}", GLOO_SOCKET_IFNAME=host.interface),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        launchers.append(process)
    try:
        yield launchers
    finally:
        for rank, process in enumerate(launchers):
            kill(folder / str(rank))
            process.wait()


def kill(host: Path) -> None:
    for number in processes_of(host):
        os.kill(number, signal.SIGKILL)


def stop_a_trainer(host: Path) -> None:
    """SIGTERM to one that trains, and not to its launcher,
    which would kill it where 30 seconds are not enough."""
    trainers = [n for n in processes_of(host) if b"\0LOCAL_RANK=" in Path(f"/proc/{n}/environ").read_bytes()]
    os.kill(trainers[0], signal.SIGTERM)


def has_saved(
    output_dir: Path, step: int, launchers: list[subprocess.Popen], folder: Path
) -> Callable[[], bool]:
    def condition() -> bool:
        logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))
        assert all(launcher.poll() is None for launcher in launchers), logs
        return newest(output_dir) >= step

    return condition


def newest(output_dir: Path) -> int:
    return step_of(next(iter(checkpoints(output_dir)), Path("step_0")))


def losses(output_dir: Path, num_steps: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "task_loss_per_agent", "swd", "grad_norm", "lr")
    return [{name: row[name] for name in names} for row in rows if row["step"] <= num_steps]


def digests(checkpoint: Path) -> dict[str, Any]:
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    return {name: value for name, value in files.items() if name.endswith(".safetensors")}


@pytest.mark.slow  # six processes that start three times
def test_two_hosts_lose_one_go_on_together_and_are_the_run_of_one_host_bit_by_bit(
    hosts: list[Host], tmp_path: Path
):
    two, one = tmp_path / "two", tmp_path / "one"
    with running(hosts, tmp_path / "first", two) as launchers:
        wait_for(has_saved(two, 5, launchers, tmp_path / "first"), PATIENCE)
        kill(tmp_path / "first" / "1")
        assert launchers[0].wait(PATIENCE) != 0
    lost_at = newest(two)
    with running(hosts, tmp_path / "again", two) as launchers:
        wait_for(has_saved(two, lost_at + 5, launchers, tmp_path / "again"), PATIENCE)
        stop_a_trainer(tmp_path / "again" / "1")  # both hosts end, at one step, though one alone was told
        assert all(launcher.wait(PATIENCE) != 0 for launcher in launchers)
    said = (two / "train.log").read_text()
    assert f"resuming from {two}/checkpoints/step_{lost_at:06d}" in said
    assert said.count("DeepSpeed ZeRO-2 is active: 2 process(es)") == 2
    num_steps = newest(two)
    assert f"stopped and saved after step {num_steps}" in (tmp_path / "again" / "0.log").read_text()

    preload()
    environments = environments_once([*ZERO2, "--num_processes", "2", "train.py"])
    alone = Workers(environments, [*SETTINGS, *SAVING, f"output_dir={one}"], tmp_path / "alone.log")
    try:
        wait_for(lambda: newest(one) >= num_steps or alone.poll() is not None, PATIENCE)
        os.kill(alone.pids[1], signal.SIGTERM)
        assert alone.wait(PATIENCE) == 4, (tmp_path / "alone.log").read_text()[-3000:]
    finally:
        alone.kill()
    assert losses(two, num_steps) == losses(one, num_steps)
    assert [row["step"] for row in losses(two, num_steps)] == list(range(1, num_steps + 1))
    in_both = [folder for folder in checkpoints(two) if (one / "checkpoints" / folder.name).exists()]
    assert step_of(in_both[0]) > lost_at
    for folder in in_both:
        assert digests(folder) == digests(one / "checkpoints" / folder.name)


@pytest.mark.slow
def test_agents_over_two_hosts_are_the_run_of_one_host_bit_by_bit(hosts: list[Host], tmp_path: Path):
    """An agent on each host: projections travel between them, and no gradient."""
    for name, on in (("two", hosts), ("one", hosts[:1])):
        folder, output_dir = tmp_path / f"{name}-logs", tmp_path / name
        with running(on, folder, output_dir, "agent_parallel_size=2") as launchers:
            wait_for(has_saved(output_dir, 5, launchers, folder), PATIENCE)
            stop_a_trainer(folder / "0")
            assert all(launcher.wait(PATIENCE) != 0 for launcher in launchers)
    two, one = tmp_path / "two", tmp_path / "one"
    assert "agents over 2 processes: 0 on this one" in (two / "train.log").read_text()
    assert losses(two, 5) == losses(one, 5)
    assert digests(two / "checkpoints" / "step_000005") == digests(one / "checkpoints" / "step_000005")
