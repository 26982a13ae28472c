import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from saving import CONFIG, save, state_of
from toy import toy_agents, toy_batch

from chorus.checkpoint import export, store
from chorus.checkpoint.store import (
    Checkpointer,
    checkpoints,
    read_tensors,
    set_aside_later,
    verify,
    write_checkpoint,
)
from chorus.checkpoint.untrusted_files import Damaged
from chorus.config import Config
from chorus.errors import InputError, RunError
from chorus.training.engine import start_engine
from chorus.training.state import MOMENTS


def assert_holds(folder: Path, step: int) -> None:
    saved = verify(folder)
    state = read_tensors(folder, saved.optimizer_step)
    expected = state_of(float(step))
    assert saved.step == state.optimizer_step == step
    pairs = [(state.weights, expected.weights), *((state.moments[m], expected.moments[m]) for m in MOMENTS)]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[identity], theirs[identity]) for identity in theirs)


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


# ---- what it holds ----


def test_what_was_written_is_read_back_bitwise_in_the_names_of_peft(tmp_path: Path):
    folder = save(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "step_000007"
    assert_holds(folder, 7)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    of_agent = ("adapter_config.json", "adapter_model.safetensors")
    agent_files = [f"agents/agent_{k}/{name}" for k in range(2) for name in of_agent]
    assert files == ["MANIFEST.json", *agent_files, "optimizer.safetensors", "state.json"]
    saved = load_file(folder / "agents" / "agent_1" / "adapter_model.safetensors")
    assert set(saved) == {f"base_model.model.{name}.lora_{m}.weight" for name in "xy" for m in ("A", "B")}


def test_it_holds_12_bytes_for_each_trainable_number_and_nothing_of_the_base(
    tmp_path: Path, accelerator: Accelerator
):
    agents = toy_agents("parallel")
    engine = start_engine(accelerator, agents, Config(lambda_sw=0.0))
    with engine.micro_batch(is_last=True):
        engine.backward(engine.module(toy_batch(), step=0).nll_KBT.mean())
    engine.step(CONFIG.lr)
    config = CONFIG.model_copy(update={"num_agents": 3})
    Checkpointer(tmp_path, config, {}).save(engine, step=1, epoch=0, skips_in_a_row=0)
    trainable = sum(tensor.numel() for tensor in agents.adapter_tensors().values())
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 12 * trainable <= size <= 12 * trainable + 100_000
    assert len(agents.frozen_tensors()) > 10


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, accelerator: Accelerator):
    agents = toy_agents("parallel")
    engine = start_engine(accelerator, agents, Config(lambda_sw=0.0))
    with engine.micro_batch(is_last=True):
        engine.backward(engine.module(toy_batch(), step=0).nll_KBT.mean())
    engine.step(CONFIG.lr)
    moment = engine.optimizer.state[agents.adapters()[0]]["exp_avg_sq"]
    moment[0] = torch.inf
    with pytest.raises(RunError, match="agent 0: "):
        Checkpointer(tmp_path, CONFIG, {}).save(engine, step=1, epoch=0, skips_in_a_row=0)
    assert not list(tmp_path.iterdir())


# ---- how many are kept ----


@pytest.mark.parametrize(("limit", "kept"), [(2, [3, 4]), (3, [2, 3, 4]), (None, [1, 2, 3, 4])])
def test_the_newest_are_kept(tmp_path: Path, limit: int | None, kept: list[int]):
    for step in range(1, 5):
        save(tmp_path, step, CONFIG.model_copy(update={"save_total_limit": limit}))
    assert names(tmp_path) == [f"step_{step:06d}" for step in kept]
    assert [folder.name for folder in checkpoints(tmp_path)] == names(tmp_path)[::-1]


def test_steps_are_in_the_order_of_numbers_beyond_six_digits(tmp_path: Path):
    for step in (999_999, 1_000_000, 5):
        save(tmp_path, step, CONFIG.model_copy(update={"save_total_limit": None}))
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_1000000", "step_999999", "step_000005"]


def test_later_checkpoints_step_aside_and_none_is_lost(tmp_path: Path):
    for _ in range(2):
        for step in (1, 2):
            save(tmp_path, step) if step > 1 or not checkpoints(tmp_path) else None
        set_aside_later(tmp_path, 1)
    assert names(tmp_path) == ["set_aside", "step_000001"]
    aside = tmp_path / "checkpoints" / "set_aside"
    assert sorted(path.name for path in aside.iterdir()) == ["step_000002", "step_000002.1"]
    assert_holds(aside / "step_000002.1", 2)


# ---- whole or not there ----

ACTS = [
    *((store, "save_tensors"), (export, "save_tensors"), (store, "sync"), (export, "sync")),
    *((store.shutil, "rmtree"), (os, "unlink"), (os, "rmdir")),
    *((Path, "mkdir"), (Path, "rename"), (Path, "write_text")),
]


def save_in_a_process_killed_before_act(number: int, folder: Path, step: int) -> bool:
    """A save in a process of its own that ends, without any
    clean-up, before its act `number`. Whether it was."""
    child = os.fork()
    if child == 0:
        acts = iter(range(number))

        def mortal(act: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                if next(acts, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*arguments, **more)

            return call

        for owner, name in ACTS:
            setattr(owner, name, mortal(getattr(owner, name)))
        save(folder, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_sigkill_at_every_point_of_the_protocol_and_in_pruning_loses_no_finished_checkpoint(tmp_path: Path):
    """And the next save clears up and goes on."""
    number, was_killed, newest = 0, True, []
    while was_killed:
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder, 1)
        save(folder, 2)
        was_killed = save_in_a_process_killed_before_act(number, folder, 3)
        found = [int(path.name[5:]) for path in checkpoints(folder)]
        for step in found:
            assert_holds(folder / "checkpoints" / f"step_{step:06d}", step)
        assert found in ([2, 1], [3, 2, 1], [3, 2])
        newest.append(found[0])
        save(folder, 4)
        assert names(folder) == [f"step_{step:06d}" for step in (newest[-1], 4)]
        number += 1
        shutil.rmtree(folder)
    assert number > 30
    assert newest == sorted(newest), "once renamed, it stays"
    assert {2, 3} == set(newest)


def test_a_disk_that_is_full_names_the_bytes_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = save(tmp_path, 1)

    def is_full(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store, "save_tensors", is_full)
        said = r"step_000002 could not be written: No space left .*\(576 bytes needed, .* free"
        with pytest.raises(RunError, match=said):
            save(tmp_path, 2)
    assert_holds(folder, 1)
    assert checkpoints(tmp_path) == [folder]
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_000001", "step_000002"]


# ---- damage ----


def damages(file: Path) -> Iterator[str]:
    """Each way to damage a file, done when it is yielded."""
    whole = file.read_bytes()
    file.unlink()
    yield "deleted"
    file.mkdir()  # a mode of 000 says nothing to root
    yield "unreadable"
    file.rmdir()
    for size in (0, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        yield f"cut to {size} bytes"
    file.write_bytes(whole + b" ")
    yield "longer"
    for place in sorted({0, 5, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        yield f"byte {place} flipped"
    file.write_bytes(whole)


def test_any_file_deleted_truncated_unreadable_or_with_a_flipped_byte_is_noticed_and_named(tmp_path: Path):
    folder = save(tmp_path, 1)
    count = 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for damage in damages(file):
            with pytest.raises(Damaged) as caught:
                verify(folder)
            # Where a name or digest in it is flipped, another file is in question.
            if file.name != "MANIFEST.json":
                assert str(caught.value).startswith(f"{file}: "), damage
            assert "\n" not in str(caught.value)
            count += 1
    assert_holds(folder, 1)
    assert count > 60


def test_every_flipped_byte_of_the_manifest_is_noticed(tmp_path: Path):
    folder = save(tmp_path, 1)
    file = folder / "MANIFEST.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(Damaged):
            verify(folder)


def test_any_file_swapped_with_another_step_s_is_noticed(tmp_path: Path):
    one, other = save(tmp_path, 1), save(tmp_path, 2)
    for file in sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file()):
        if (one / file).read_bytes() != (other / file).read_bytes():
            kept = (one / file).read_bytes()
            shutil.copy(other / file, one / file)
            with pytest.raises(Damaged):
                verify(one)
            (one / file).write_bytes(kept)
    assert_holds(one, 1)


def test_another_format_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, state_of(1.0), {"format": 2, "step": 1}, CONFIG)
    with pytest.raises(
        InputError, match="has checkpoint format 2, and this version of Chorus reads format 1"
    ):
        verify(folder)
