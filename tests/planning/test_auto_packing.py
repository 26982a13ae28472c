"""`packing: auto`: only where it is exact and pays; a resumed run stays what it was."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from runs import config_of, save_run
from transformers import AutoConfig, PretrainedConfig

from chorus.config import Config
from chorus.data.order import epoch_order
from chorus.data.packing import one_a_row, packed
from chorus.errors import InputError
from chorus.planning import auto_packing
from chorus.planning.auto_packing import decide_packing, packs_by_itself, share_of_tokens

BASE = AutoConfig.from_pretrained("assets/tiny-gemma-2")
MIXED = np.array([20, 30, 40, 120] * 50)
GPU = {"max_seq_length": 128, "batch_size": 8, "pad_to_multiple_of": 16}


def decided(
    lengths: np.ndarray = MIXED, device: str = "cuda", base: PretrainedConfig = BASE, **keys: object
) -> tuple[bool, str]:
    config = Config.model_validate({**GPU, **keys})
    return packs_by_itself(config, lengths, base, torch.device(device), in_shards=False)


def test_rows_of_unlike_lengths_are_packed_on_a_gpu_and_rows_of_one_length_are_not() -> None:
    state = torch.random.get_rng_state()
    packs, why = decided()
    assert packs
    assert why.startswith("batches of these rows would have ")
    assert torch.equal(state, torch.random.get_rng_state())  # the toy base draws from no global generator
    packs, why = decided(np.full(200, 128))
    assert (packs, why) == (
        False,
        "batches of these rows would have 100% of the tokens, and it pays from 80% on",
    )


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"device": "cpu"}, "no GPU (cpu)"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"lora_dropout": 0.1}, "lora_dropout is above 0"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2 would let"),
        ({"max_seq_length": 2048, "attn_implementation": "sdpa"}, "rows of 1024 tokens or more"),
        ({"max_seq_length": 2048, "compile": False}, "rows of 1024 tokens or more"),
    ],
    ids=str,
)
def test_nothing_is_packed_where_it_is_not_exact_or_not_known_to_pay(keys: dict, why: str) -> None:
    packs, said = decided(**keys)
    assert not packs
    assert why in said


def test_a_base_that_does_not_keep_samples_apart_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: object) -> None:
        raise InputError("key 'packing': X does not keep a row's samples apart; set it to false")

    monkeypatch.setattr(auto_packing, "check_packing", refuse)
    packs, why = decided()
    assert not packs
    assert why.endswith("of the tokens, but X does not keep a row's samples apart")


def test_the_share_of_tokens_is_that_of_the_batches_of_the_first_epoch() -> None:
    config = Config.model_validate(GPU)
    order = epoch_order(len(MIXED), config.seed, 0, True)
    apart, together = 0, 0
    for rows in order.split(8):
        lengths = (MIXED[rows] - 1).tolist()
        apart += 8 * one_a_row(lengths, 16).T
        layout = packed(lengths, 127, 16)
        together += layout.B * layout.T
    assert share_of_tokens(config, MIXED - 1) == pytest.approx(together / apart)


def test_batches_of_each_agents_own_are_all_as_large_as_the_largest() -> None:
    own = {"num_agents": 2, "per_agent_batches": True, "lambda_sw": 0}
    config = Config.model_validate(GPU | own)
    apart, together = 0, 0
    for rows in epoch_order(len(MIXED), config.seed, 0, True).split(2 * 8):
        parts = [(MIXED[part] - 1).tolist() for part in rows.split(8)]
        apart += len(rows) * one_a_row([length for part in parts for length in part], 16).T
        layouts = [packed(lengths, 127, 16) for lengths in parts]
        together += len(parts) * max(layout.B for layout in layouts) * layouts[0].T
    assert share_of_tokens(config, MIXED - 1) == pytest.approx(together / apart)


def test_what_is_given_stays_and_a_resumed_run_keeps_what_its_checkpoint_has(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    for packing in (True, False):
        config = Config(packing=packing)
        assert decide_packing(config, MIXED, BASE, accelerator) == (config, "")
    fresh, why = decide_packing(Config(resume_from_checkpoint=None), MIXED, BASE, accelerator)
    assert (fresh.packing, fresh.packs, why) == (False, False, "packing auto: off; no GPU (cpu)")
    save_run(config_of(tmp_path, packing=True), accelerator, 1)
    resumed = Config(output_dir=str(tmp_path), resume_from_checkpoint="auto")
    resumed, why = decide_packing(resumed, MIXED, BASE, accelerator)
    assert (resumed.packing, why) == (True, "packing auto: on; as in the checkpoint")
