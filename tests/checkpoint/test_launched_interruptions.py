"""Signals that only a real start shows, and what a start must not leave behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import PLAIN, ROOT, environment, wait_for
from lives import PATIENCE_S
from preloaded import forked

from chorus.checkpoint.store import checkpoints, step_of

pytestmark = pytest.mark.launch
LINE = "stopped by {}: no step is lost; resume_from_checkpoint=auto resumes it"


def test_a_start_under_deepspeed_compiles_nothing_that_a_kill_could_leave_locked(tmp_path: Path):
    """PyTorch locks its folder of compiled extensions by a mere file: one that is left blocks every start."""
    compiled = tmp_path / "compiled"
    settings = ("num_agents=1", "lambda_sw=0", "lora_rank=2", "eval_samples=0", "debug_subset_size=20")
    settings = (*settings, "use_deepspeed=true", "max_train_steps=1", f"output_dir={tmp_path}/run")
    ended = forked([sys.executable, "train.py"], *settings, TORCH_EXTENSIONS_DIR=str(compiled))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not compiled.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's end")
def test_a_signal_to_accelerate_launch_alone_ends_its_one_process_too(tmp_path: Path):
    """It passes none on."""
    output = tmp_path / "said"
    with output.open("w") as said:
        command = [*PLAIN, f"output_dir={tmp_path}/run", "max_train_steps=1000", "save_steps=1"]
        settings = ("debug_subset_size=20", "eval_samples=0", "logging_steps=1", "batch_size=2")
        launcher = subprocess.Popen([*command, *settings], cwd=ROOT, env=environment(), stderr=said)
    wait_for(lambda: "step 2 " in output.read_text(), PATIENCE_S)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(PATIENCE_S) == -signal.SIGTERM
    wait_for(lambda: "stopped and saved after step " in output.read_text(), PATIENCE_S)
    assert step_of(checkpoints(tmp_path / "run")[0]) < 1000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_amid_the_imports_is_one_line_and_code_4(number: signal.Signals, tmp_path: Path):
    command = [sys.executable, "train.py", f"output_dir={tmp_path}/run"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), PATIENCE_S)
    process.send_signal(number)
    said = process.communicate()[1]
    assert said == f"importing torch and transformers ...\n{LINE.format(number.name)}\n"
    assert process.returncode == 4
    assert not (tmp_path / "run").exists()
