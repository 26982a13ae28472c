"""Which attention is chosen, and that packed samples are kept apart or refused."""

import logging
from typing import Any

import pytest
import torch
from toy import small_gpt_neox, small_llama, tiny_gemma
from transformers import PreTrainedModel

from chorus.errors import InputError
from chorus.model import attention
from chorus.model.attention import LONG, check_packing, choose_attention


def choose(wanted: str, model: PreTrainedModel, device: str = "cuda", **how: Any) -> str | None:
    settings = {"dtype": torch.bfloat16, "length": 512, "compiled": True, "packing": False, **how}
    return choose_attention(wanted, model.config, torch.device(device), **settings)


@pytest.fixture
def flash_is_installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    installed: bool = request.param
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    return installed


@pytest.mark.parametrize("flash_is_installed", [False, True], indirect=True, ids=["", "flash-attn"])
@pytest.mark.parametrize(
    ("device", "how", "without_flash", "with_flash"),
    [
        ("cpu", {"length": LONG}, "eager", "eager"),
        ("cuda", {"length": LONG - 1}, "eager", "eager"),
        ("cuda", {"length": LONG}, "flex_attention", "flash_attention_2"),
        ("cuda", {"length": LONG, "packing": True}, "flex_attention", "flex_attention"),
        ("cuda", {"length": LONG, "dtype": torch.float32}, "flex_attention", "flex_attention"),
        ("cuda", {"length": LONG, "compiled": False}, "eager", "flash_attention_2"),
    ],
)
def test_auto_goes_by_device_length_and_what_there_is_and_says_so(
    device: str, how: dict, without_flash: str, with_flash: str, flash_is_installed: bool, caplog
):
    caplog.set_level(logging.INFO)
    expected = with_flash if flash_is_installed else without_flash
    assert choose("auto", tiny_gemma(), device, **how) == expected
    assert caplog.messages[-1].startswith(f"attention: {expected} (")


def test_long_rows_without_a_fast_attention_are_a_warning(caplog: pytest.LogCaptureFixture):
    choose("auto", tiny_gemma(), length=LONG, compiled=False)
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]


def test_auto_leaves_a_base_without_soft_cap_to_transformers():
    assert choose("auto", small_llama(), length=4 * LONG) is None
    assert choose("sdpa", small_llama()) == "sdpa"


@pytest.mark.parametrize("flash_is_installed", [True], indirect=True)
@pytest.mark.parametrize(
    ("wanted", "device", "how", "words"),
    [
        ("sdpa", "cuda", {}, "drops this model's soft-cap"),
        ("flex_attention", "cpu", {}, "has no backward pass on cpu"),
        ("flash_attention_2", "cpu", {}, "needs a CUDA GPU"),
        ("flash_attention_2", "cuda", {"dtype": torch.float32}, "needs bf16 or fp16"),
        ("flash_attention_2", "cuda", {"packing": True}, "see each other"),
    ],
)
def test_what_would_be_wrong_or_fail_is_refused(
    wanted: str, device: str, how: dict, words: str, flash_is_installed: bool
):
    with pytest.raises(
        InputError, match=f"key 'attn_implementation' is {wanted}, which .*{words}.*; set it to auto"
    ):
        choose(wanted, tiny_gemma(), device, **how)


def test_flash_attention_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(InputError, match="flash-attn, which is not installed"):
        choose("flash_attention_2", tiny_gemma())


@pytest.mark.parametrize("base", [tiny_gemma, small_llama, small_gpt_neox])
def test_bases_that_keep_packed_samples_apart_pass(base):
    check_packing(base())


def test_a_base_that_takes_no_masks_is_refused_for_packing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "attention_masks", lambda *about: None)  # as if it ignored them
    model = tiny_gemma()
    plain = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda position_ids=None, **given: plain(**given)
    )  # nor tells them by these
    with pytest.raises(
        InputError, match="key 'packing': Gemma2ForCausalLM does not keep a row's samples apart"
    ):
        check_packing(model)
