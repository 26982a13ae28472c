"""Damaged bases: each is one line that names what is wrong, before a weight is read."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, LlamaConfig, LlamaForCausalLM

from chorus.data.tokenise import unreadable
from chorus.errors import InputError
from chorus.model.base import check_base, load_model, load_tokenizer
from chorus.model.base_checks import model_errors_named, unreadable_tokens

BUNDLED = Path("assets/tiny-gemma-2")
NAME = "model.layers.1.mlp.down_proj.weight"
CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLED, tmp_path / "base"))


def weights(base: Path, change: Callable[[dict], object]) -> None:
    """Write other weights over the base's."""
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def settings(base: Path, file: str, **more: object) -> None:
    written = json.loads((base / file).read_text()) | more
    (base / file).write_text(json.dumps({key: value for key, value in written.items() if value is not None}))


def shards(base: Path) -> None:
    AutoModelForCausalLM.from_pretrained(BUNDLED).save_pretrained(base, max_shard_size="1MB")
    (base / "model.safetensors").unlink()
    sorted(base.glob("model-*.safetensors"))[1].unlink()


def cut(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing weight": (
        lambda base: weights(base, lambda own: own.pop(NAME)),
        rf"{NAME} is not in the files, so it would be drawn at random",
    ),
    "another shape": (
        lambda base: weights(base, lambda own: own.update({NAME: own[NAME][:, :-1].contiguous()})),
        rf"{NAME} is \[160, 447\] in the files and \[160, 448\] by config.json",
    ),
    "an adapter's weights": (
        lambda base: weights(
            base, lambda own: own.update({"model.layers.1.mlp.down_proj.lora_A.weight": own[NAME].clone()})
        ),
        r"down_proj.lora_A.weight is in the files and not in the model",
    ),
    "fewer layers": (
        lambda base: settings(base, "config.json", num_hidden_layers=3, layer_types=None),
        r"model.layers.3.* is in the files and not in the model .*\(and 10 more\)",
    ),
    "another number of heads": (
        lambda base: settings(base, "config.json", num_attention_heads=8),
        r"is \[\d+, \d+\] in the files",
    ),
    "half a download": (cut, r"model.safetensors is incomplete or damaged \(.*\); download the base again"),
    "a missing shard": (
        shards,
        r"model-00002-of-\d+.safetensors is missing: it is named in model.safetensors.index",
    ),
    "a broken index": (
        lambda base: (
            (base / "model.safetensors.index.json").write_text("{") and (base / "model.safetensors").unlink()
        ),
        r"model.safetensors.index.json is damaged",
    ),
    "a pointer of Git LFS": (
        lambda base: (base / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        r"model.safetensors is a pointer of Git LFS .* git lfs pull",
    ),
    "an adapter beside": (
        lambda base: (base / "adapter_config.json").write_text("{}"),
        r"adapter_config.json: the folder holds an adapter beside the base",
    ),
    "an adapter alone": (
        lambda base: (
            (base / "config.json").rename(base / "adapter_config.json")
            and settings(base, "adapter_config.json", base_model_name_or_path="google/gemma-2-2b")
        ),
        r"is an adapter, not a base; give the base under it, google/gemma-2-2b$",
    ),
    "stored quantised": (
        lambda base: settings(base, "config.json", quantization_config={"quant_method": "gptq"}),
        r"was saved quantised \(gptq\)",
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_base_that_is_not_what_its_config_says_is_refused_before_and_at_loading(
    damage: Callable[[Path], object], words: str, base: Path, capfd: pytest.CaptureFixture[str]
):
    damage(base)
    with pytest.raises(InputError, match=words) as before:
        check_base(str(base))
    with pytest.raises(InputError) as at_loading:
        load_model(str(base), torch.float32, CPU)
    assert str(before.value) == str(at_loading.value)
    assert str(before.value).startswith("key 'model_name': ")
    assert "\n" not in str(before.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_weights_are_looked_at_by_their_headers(base: Path):
    """A weight that is not finite is not known yet: nothing has been read."""
    weights(base, lambda own: own[NAME].view(-1)[5:7].fill_(float("nan")))
    check_base(str(base))


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (float("nan"), torch.float32, r"holds 2 NaN or Inf as float32; download"),
        (float("-inf"), torch.bfloat16, r"holds 2 NaN or Inf as bfloat16; download"),
        (1e6, torch.float16, r"holds 2 NaN or Inf as float16; take mixed_precision bf16 or no"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(value: float, dtype: torch.dtype, words: str, base: Path):
    weights(base, lambda own: own[NAME].view(-1)[5:7].fill_(value))
    with pytest.raises(InputError, match=f"{NAME} {words}"):
        load_model(str(base), dtype, CPU)


def test_a_tower_beside_the_model_and_a_tied_head_are_no_damage(base: Path):
    weights(base, lambda own: own.update({"vision_tower.layers.0.weight": own[NAME].clone()}))
    check_base(str(base))
    load_model(str(base), torch.float32, CPU)


def test_a_head_that_is_neither_tied_nor_in_the_files_is_refused(tmp_path: Path):
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**small, intermediate_size=24)).save_pretrained(tmp_path)
    weights(tmp_path, lambda own: own.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lm_head.weight is not in the files"):
        check_base(str(tmp_path))


TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (
        lambda base: (base / "tokenizer.json").unlink(),
        r"is empty: it knows 5 special tokens and no text",
    ),
    "a larger vocabulary": (
        lambda base: settings(base, "config.json", vocab_size=512),
        r"has '.*' at id 1023, beyond the 512 rows of the embedding",
    ),
    "no end token": (
        lambda base: settings(
            base, "tokenizer_config.json", eos_token=None, tokenizer_class="PreTrainedTokenizerFast"
        ),
        r"has no end token; set eos_token in tokenizer_config.json",
    ),
    "an end token of another model": (
        lambda base: settings(base, "tokenizer_config.json", eos_token="<|im_end|>"),
        r"has '<\|im_end\|>' at id 1024, beyond the 1024 rows of the embedding",
    ),
    "a slow one": (
        lambda base: (
            [file.unlink() for file in base.glob("tokenizer*")]
            and (base / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
        ),
        r"is not a fast one",
    ),
}


@pytest.mark.parametrize(("damage", "words"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_tokenizer_that_is_not_the_bases_is_refused(
    damage: Callable[[Path], object], words: str, base: Path
):
    damage(base)
    with pytest.raises(InputError, match=rf"key 'model_name': .*: its tokenizer {words}") as refused:
        load_tokenizer(str(base))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("same", ["eos_token", "pad_token"])
def test_one_token_may_stand_for_the_unknown_and_for_the_end_or_padding(same: str, base: Path):
    """GPT-2 has one token for the end and the unknown, some of Llama-2 one for padding and the unknown."""
    settings(base, "tokenizer_config.json", **{same: "<unk>"})
    assert load_tokenizer(str(base)).special_tokens_map[same] == "<unk>"


@pytest.mark.parametrize("is_in_template", [False, True])
def test_a_special_token_beyond_the_embedding_is_refused_where_it_would_be_written(
    is_in_template: bool, base: Path
):
    """Gemma 3 1B has such a token, for images; a template with tokens of another model would write them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    if is_in_template:
        tokenizer.chat_template = "<image_soft_token>{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(base)
    words = "has '<image_soft_token>' at id 1024, beyond the 1024 rows"
    with pytest.raises(InputError, match=words) if is_in_template else nullcontext():
        assert unreadable(load_tokenizer(str(base))) == ["<image_soft_token>"]


def test_tokens_in_whose_place_a_base_puts_an_image_are_no_text():
    """Gemma 3 4B has rows of its embedding for them."""
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny-gemma-2")
    config = Gemma3Config(image_token_index=7, boi_token_index=5, eoi_token_index=6)
    assert {*unreadable_tokens(tokenizer, config)} == {*tokenizer.convert_ids_to_tokens([5, 6, 7])}


def test_a_package_that_is_missing_is_named_with_how_to_install_it():
    """As transformers says it, over several lines."""
    with pytest.raises(InputError) as caught, model_errors_named(str(BUNDLED)):
        raise ImportError(
            "The tower requires the timm library. You can install it with pip:\n`pip install timm`"
        )
    assert str(caught.value).endswith("You can install it with pip: `pip install timm`")
