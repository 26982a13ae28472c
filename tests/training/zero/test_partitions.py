"""Each agent's gradient and AdamW state in DeepSpeed's partitions,
in two real processes: a fault is found on both."""

import json
from pathlib import Path

import pytest
from launching import BIN, zero2
from two_processes import check_two_processes

TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", "train.py"]


@pytest.mark.launch
def test_a_fault_on_one_of_two_zero2_processes_is_both_processes(tmp_path: Path):
    check_two_processes(zero2(2), tmp_path)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "on_cpu"), [(1, False), (3, False), (2, True), (3, True)])
def test_a_fault_is_found_at_every_stage_and_with_the_optimizer_on_the_cpu(
    stage: int, on_cpu: bool, tmp_path: Path
):
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if on_cpu else {})
    json_file = tmp_path / "deepspeed.json"
    json_file.write_text(json.dumps({"zero_optimization": zero}))
    check_two_processes(TORCHRUN, tmp_path, str(json_file))
