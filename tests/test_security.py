"""No file that a run reads can run code in it, and a run without a network asks for none."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from launching import ROOT, ddp, environment
from peft import PeftModel
from runs import config_of, run_of, save_run
from saving import save
from toy import tiny_gemma, toy_agents

from chorus.checkpoint.export import save_ensemble
from chorus.checkpoint.manifest import write_manifest
from chorus.checkpoint.resume import find_start
from chorus.checkpoint.store import read_tensors, verify
from chorus.config import Config
from chorus.errors import InputError

# ---- the source ----

SOURCES = [*sorted((ROOT / "src").rglob("*.py")), ROOT / "train.py"]


def test_nothing_that_runs_code_from_a_file_is_in_the_source():
    forbidden = re.compile(
        r"torch\.load|\bpickle\b(?!\.$)|yaml\.load\b|(?<![.\w])eval\(|(?<![.\w])exec\(|shell=True|trust_remote_code=True"
        r"|use_safetensors=False|weights_only=False|load_state\(|os\.system"
    )
    allowed = {  # it has a test of its own, in test_import_older.py, with a file that would run code
        "import_older.py": 'torch.load(file, map_location="cpu", weights_only=True)'
    }
    assert len(SOURCES) > 15
    for source in SOURCES:
        for number, line in enumerate(source.read_text().splitlines(), 1):
            found = forbidden.search(line.replace(allowed.get(source.name, "\0"), ""))
            assert not found or "without pickle" in line, f"{source}:{number}: {line}"


def test_every_model_is_loaded_from_safetensors_and_without_code_of_its_own():
    loads = re.compile(r"Auto\w+\.from_(pretrained|config)\((?:[^()]|\([^()]*\))*\)")
    ours = [source for source in SOURCES if source.name != "card.py"]  # a text with examples for people
    found = [match[0] for source in ours for match in loads.finditer(source.read_text())]
    assert len(found) >= 5
    for call in found:
        assert "trust_remote_code=False" in call, call
        assert "use_safetensors=True" in call or not call.startswith(
            "AutoModelForCausalLM.from_pretrained"
        ), call


# ---- a pickle that writes a marker, under every name ----

NAMES_OF_OTHERS = (
    *(
        "adapter_model.bin",
        "pytorch_model.bin",
        "model.pth",
        "optimizer.bin",
        "optimizer.pt",
        "scheduler.bin",
    ),
    *("random_states_0.pkl", "custom_checkpoint_0.pkl", "training_args.bin", "rng_state.pth", "latest"),
    *("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "agent0_weights.pth"),
)


class Bomb:
    """Unpickled, it writes its marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture
def bomb(tmp_path: Path) -> bytes:
    marker = tmp_path / "marker"
    content = pickle.dumps(Bomb(marker))
    pickle.loads(content)
    marker.unlink()  # it is one
    return content


def test_a_resume_runs_no_code_whatever_its_files_hold(tmp_path: Path, bomb: bytes):
    """Under every name that a resume reads, with a manifest that vouches for it."""
    folder = save(tmp_path, 1)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        kept = file.read_bytes(), (folder / "MANIFEST.json").read_bytes()
        file.write_bytes(bomb)
        if file.name != "MANIFEST.json":
            write_manifest(folder, num_agents=2)
        if file.name != "adapter_config.json":  # nothing of it is read
            with pytest.raises(Exception):  # noqa: B017, PT011
                read_tensors(folder, verify(folder).optimizer_step)
        file.write_bytes(kept[0])
        (folder / "MANIFEST.json").write_bytes(kept[1])
    assert not (tmp_path / "marker").exists()


def test_a_resume_reads_no_file_of_other_tools_beside_its_own(
    tmp_path: Path, accelerator: Accelerator, bomb: bytes
):
    config = config_of(tmp_path / "run")
    folder = save_run(config, accelerator, 1)
    for name in NAMES_OF_OTHERS:
        for place in (tmp_path / "run", folder.parent, folder, folder / "agents" / "agent_0"):
            (place / name).write_bytes(bomb)
    begin = find_start(config, run_of(config, accelerator), accelerator)
    assert begin.folder == folder
    read_tensors(folder, verify(folder).optimizer_step)
    assert not (tmp_path / "marker").exists()


def test_a_folder_of_pickles_alone_is_no_checkpoint(tmp_path: Path, accelerator: Accelerator, bomb: bytes):
    for name in (*NAMES_OF_OTHERS, "state.json", "MANIFEST.json"):
        (tmp_path / name).write_bytes(bomb)
    config = config_of(tmp_path / "run", resume_from_checkpoint=str(tmp_path))
    with pytest.raises(InputError):
        find_start(config, run_of(config, accelerator), accelerator)
    assert not (tmp_path / "marker").exists()


def test_stock_peft_reads_an_exported_adapter_without_unpickling_anything(tmp_path: Path, bomb: bytes):
    tensors = {
        identity: tensor.detach() for identity, tensor in toy_agents("parallel").adapter_tensors().items()
    }
    config = Config(num_agents=3, lora_rank=3, lora_alpha=6.0)
    save_ensemble(tmp_path / "run", tensors, [1 / 3] * 3, config, {})
    folder = tmp_path / "run" / "agents" / "agent_0"
    for name in NAMES_OF_OTHERS:
        (folder / name).write_bytes(bomb)
    PeftModel.from_pretrained(tiny_gemma(), str(folder))
    (folder / "adapter_model.safetensors").write_bytes(bomb)
    with pytest.raises(Exception):  # noqa: B017, PT011
        PeftModel.from_pretrained(tiny_gemma(), str(folder))
    assert not (tmp_path / "marker").exists()


# ---- no connection ----

HOOK = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["WATCHED"], "a") as file:
            print(event, arguments[1] if event == "socket.connect" else arguments[0], file=file)
sys.addaudithook(watch)
"""
SMALL = (
    *("num_agents=2", "debug_subset_size=40", "batch_size=2", "max_train_steps=2", "save_steps=1"),
    *("eval_samples=2", "max_new_tokens_eval=2"),
)


def online() -> dict[str, str]:
    """Nobody has said that there is no network."""
    return {key: value for key, value in environment().items() if key != "HF_HUB_OFFLINE"}


@pytest.mark.launch
def test_a_run_with_a_local_base_opens_no_connection_even_where_it_could(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    watched = tmp_path / "watched"
    probe = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    more = {"PYTHONPATH": path, "WATCHED": str(watched)}
    for program in (["-c", probe], ["train.py", *SMALL, f"output_dir={tmp_path}/run"]):
        subprocess.run(
            [sys.executable, *program], cwd=ROOT, env=online() | more, check=True, capture_output=True
        )
    assert watched.read_text() == "socket.connect ('127.0.0.1', 9)\n", "the probe's, and no other"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace")
def test_two_processes_connect_to_each_other_over_loopback_and_to_nothing_else(tmp_path: Path):
    """All system calls, libraries' in C++ included. torch's
    rendezvous asks the resolver what 127.0.0.1 is called."""
    trace = tmp_path / "trace"
    run = [*ddp(2), *SMALL, "batch_size=1", f"output_dir={tmp_path}/run"]
    run.remove("batch_size=2")
    watched = ["strace", "-f", "-q", "-e", "trace=connect", "-o", str(trace), *run]
    subprocess.run(watched, cwd=ROOT, env=online(), check=True, capture_output=True)
    connects = [
        line for line in trace.read_text().splitlines() if "AF_INET" in line and "htons(53)" not in line
    ]
    assert connects, "the two have found each other"
    for line in connects:
        assert '"127.0.0.1"' in line or '"::ffff:127.0.0.1"' in line or '"::1"' in line, line
