"""The frozen base and what of it Chorus computes itself."""

from pathlib import Path

import pytest
import torch
from toy import max_difference, tiny_gemma
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from chorus.errors import InputError
from chorus.model.base import (
    base_tensors,
    check_positions,
    head_of,
    load_model,
    load_skeleton,
    load_tokenizer,
    trunk_of,
)

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def saved(model: PreTrainedModel, folder: Path, **how: object) -> str:
    model.save_pretrained(folder, **how)  # pyright: ignore[reportArgumentType]
    return str(folder)


@pytest.mark.parametrize(
    "make",
    [
        tiny_gemma,
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    ],
    ids=["gemma-2", "llama", "gpt-neox"],
)
def test_head_of_trunk_is_the_models_own_logits(make, tmp_path: Path):
    model = load_model(saved(make(), tmp_path), torch.float32, CPU)
    ids_BT = torch.arange(3, 15)[None]
    hidden_BTD = trunk_of(model)(input_ids=ids_BT).last_hidden_state
    assert max_difference(head_of(model).logits(hidden_BTD), model(input_ids=ids_BT).logits) < 1e-6


def test_the_skeleton_has_every_module_and_no_weight(tmp_path: Path):
    folder = saved(tiny_gemma(), tmp_path)
    (tmp_path / "model.safetensors").unlink()  # not needed for it
    skeleton = load_skeleton(folder)
    assert [name for name, _ in skeleton.named_modules()] == [
        name for name, _ in tiny_gemma().named_modules()
    ]
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_a_sharded_folder_loads_frozen_and_in_the_dtype_asked_for(tmp_path: Path):
    folder = saved(tiny_gemma(), tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load_model(folder, torch.bfloat16, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(dict(base_tensors(model))) == len(list(model.parameters())) + len(list(model.buffers()))


def test_the_bases_own_dropout_is_off_so_that_training_mode_draws_nothing(tmp_path: Path):
    rates = {"attention_dropout": 0.5, "hidden_dropout": 0.5}
    model = load_model(
        saved(GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **rates)), tmp_path), torch.float32, CPU
    )
    model.train()
    ids_BT = torch.arange(3, 15)[None]
    state = torch.random.get_rng_state()
    assert torch.equal(model(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits)
    assert torch.equal(state, torch.random.get_rng_state())


def test_logits_that_the_head_does_not_give_are_refused_rather_than_trained_wrongly(tmp_path: Path):
    folder = saved(
        LlamaForCausalLM(LlamaConfig(**SMALL, logits_scaling=4.0)), tmp_path
    )  # which Llama does not read
    with pytest.raises(
        InputError, match=r"key 'model_name': .*LlamaForCausalLM does more between trunk and logits"
    ):
        load_model(folder, torch.float32, CPU)


def test_rows_longer_than_the_bases_positions_are_refused_with_both_numbers():
    config = LlamaConfig(**SMALL, max_position_embeddings=64)
    check_positions(config, 64)
    with pytest.raises(InputError, match="key 'max_seq_length' is 65, but the base has 64 positions"):
        check_positions(config, 65)


def test_gemma_2_is_given_eager_attention_because_sdpa_drops_its_soft_cap(tmp_path: Path):
    folder = saved(tiny_gemma(), tmp_path)
    assert load_model(folder, torch.float32, CPU).config._attn_implementation == "eager"
    with pytest.raises(InputError, match="soft-cap"):
        load_model(folder, torch.float32, CPU, "sdpa")


def test_a_base_without_attention_is_refused_for_packing_and_only_for_that(tmp_path: Path):
    recurrent = MambaForCausalLM(
        MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    folder = saved(recurrent, tmp_path)
    load_model(folder, torch.float32, CPU)
    with pytest.raises(
        InputError, match="key 'packing': MambaForCausalLM does not keep a row's samples apart"
    ):
        load_model(folder, torch.float32, CPU, packing=True)


def test_a_missing_folder_a_folder_without_a_model_and_pickled_weights_are_one_line_each(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    model = tiny_gemma()
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    for name, words in ((f"{tmp_path}/none", "does not exist"), (f"{tmp_path}/empty", "config.json")):
        with pytest.raises(InputError, match=words):
            load_tokenizer(name)
    with pytest.raises(InputError, match=r"holds no model.safetensors; pytorch_model.bin is not") as refused:
        load_model(str(pickled), torch.float32, CPU)
    assert "\n" not in str(refused.value)


def test_a_model_that_brings_its_own_code_is_refused_and_the_code_does_not_run(tmp_path: Path):
    marker = tmp_path / "ran"
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}'
    )
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(InputError, match=r"'model_name'.* brings code of its own, which .*; take a base"):
        load_model(str(tmp_path), torch.float32, CPU)
    assert not marker.exists()
