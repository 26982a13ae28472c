"""The small base that stands in for one that does not fit."""

from pathlib import Path

import pytest
import torch
from families import of_family

from chorus.model.base import load_model, load_tokenizer
from chorus.model.toy_base import write_toy_like


@pytest.mark.parametrize(
    "family", ["gemma-4 multimodal shared", "gemma-4 experts", "gemma-3n", "deepseek-v3", "gpt2"]
)
def test_a_toy_of_every_family_loads_and_has_its_kinds_of_layers(family: str, tmp_path: Path):
    of_family(family).config.save_pretrained(tmp_path / "base")
    write_toy_like(str(tmp_path / "base"), load_tokenizer("assets/tiny-gemma-2"), tmp_path / "toy")
    toy = load_model(str(tmp_path / "toy"), torch.float32, torch.device("cpu"))
    kinds = getattr(of_family(family).config.get_text_config(), "layer_types", None) or ()
    assert set(getattr(toy.config.get_text_config(), "layer_types", None) or ()) == set(kinds)
    assert type(toy) is type(of_family(family))
