"""A base in 4 and 8 bits against the dense base of its
dequantised weights; what is refused, and what it takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from promises import EVERY_MODE
from torch import nn
from toy import ALPHA, RANK, VOCABULARY, hash_of, max_difference, run, seeded, toy_batch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chorus.config.model import ModelSettings
from chorus.errors import InputError
from chorus.model import quantisation
from chorus.model.adapters import LoraShape
from chorus.model.agents import Agents, Mode, Regularisation, build_agents
from chorus.model.base import load_model
from chorus.model.quantisation import quantisation_of, spared_bytes

SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


CPU = torch.device("cpu")


def base() -> PreTrainedModel:
    return seeded(LlamaForCausalLM, LlamaConfig(**SIZE, vocab_size=VOCABULARY, initializer_range=0.2))


def saved(folder: Path) -> str:
    base().save_pretrained(folder)
    return str(folder)


def agents_on(model: PreTrainedModel, mode: Mode) -> Agents:
    agents = build_agents(mode, model, 2, LoraShape(RANK, ALPHA, "auto", False, 0), Regularisation(0, 0, 7))
    for identity, tensor in agents.adapter_tensors().items():
        generator = torch.Generator().manual_seed(hash_of(str(identity)))
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return agents


@EVERY_MODE
def test_over_four_bits_every_agent_gets_the_gradients_of_the_dequantised_base(mode: Mode, tmp_path: Path):
    functional = pytest.importorskip("bitsandbytes").functional
    settings = quantisation_of(ModelSettings(load_in_4bit=True), torch.float32)
    model = load_model(saved(tmp_path), torch.float32, CPU, quantisation=settings)
    dense = base()
    for name, module in dense.named_modules():
        weight = getattr(model.get_submodule(name), "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "quant_state"):
            module.weight.data = functional.dequantize_4bit(weight.data, weight.quant_state)
    assert max_difference(dense.lm_head.weight, base().lm_head.weight) == 0, "the head is not quantised"
    assert (
        max_difference(dense.model.layers[0].mlp.up_proj.weight, base().model.layers[0].mlp.up_proj.weight)
        > 1e-2
    )
    agents, batch = agents_on(model, mode), toy_batch()
    agents.eval()
    with torch.no_grad():
        agents(batch)  # evaluation comes before training
    agents.train()
    output, gradients = run(agents, batch)
    expected, expected_gradients = run(agents_on(dense, mode), batch)
    assert max_difference(output.nll_KBT, expected.nll_KBT) < 1e-5
    for identity, gradient in expected_gradients.items():
        assert max_difference(gradients[identity], gradient) < 1e-4, identity


def test_over_eight_bits_all_modes_agree_and_stay_near_the_dense_base(tmp_path: Path):
    """LLM.int8 also rounds what goes in, so that no dense base gives the same numbers."""
    pytest.importorskip("bitsandbytes")
    folder, batch = saved(tmp_path), toy_batch()
    settings = quantisation_of(ModelSettings(load_in_8bit=True), torch.float32)

    def loss_of(mode: Mode) -> torch.Tensor:
        model = load_model(folder, torch.float32, CPU, quantisation=settings)
        output, gradients = run(agents_on(model, mode), batch)
        assert all(bool(gradient.any()) for gradient in gradients.values())
        return output.nll_KBT

    fused = loss_of("fused")
    assert max_difference(loss_of("sequential"), fused) < 1e-3
    assert max_difference(loss_of("parallel"), fused) < 1e-3
    assert 0 < max_difference(agents_on(base(), "fused")(batch).nll_KBT, fused) < 0.1


@pytest.mark.parametrize(("bits", "share"), [(4, 0.516 / 4), (8, 0.27)])
def test_the_forecast_knows_what_is_stored(bits: int, share: float):
    model = base()
    linears = [
        one.weight for one in model.modules() if isinstance(one, nn.Linear) and one is not model.lm_head
    ]
    whole = sum(weight.nbytes for weight in linears)
    spared, largest = spared_bytes(model, bits)
    assert (whole - spared) / whole == pytest.approx(share, rel=0.05)
    assert largest == 4 * 64 * 128


@pytest.mark.parametrize("bits", [4, 8])
def test_a_transposed_linear_is_stored_as_any_other(bits: int):
    """GPT-2's, which bitsandbytes turns round."""

    class OneLayer(nn.ModuleList):
        def get_output_embeddings(self) -> None:
            return None

    plain, transposed = OneLayer([nn.Linear(64, 256)]), OneLayer([Conv1D(256, 64)])
    assert spared_bytes(transposed, bits) == spared_bytes(plain, bits)  # pyright: ignore[reportArgumentType]


def test_a_base_saved_in_another_way_is_refused_before_any_weight_is_read(tmp_path: Path):
    model = base()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"was saved quantised \(gptq\), which Chorus cannot train over; name the base"
    ):
        load_model(str(tmp_path), torch.float32, CPU)


def test_without_the_package_both_ways_in_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="key 'load_in_4bit' needs the package bitsandbytes"):
        quantisation_of(ModelSettings(load_in_4bit=True), torch.float32)
    model = base()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="needs the package bitsandbytes"):
        load_model(str(tmp_path), torch.float32, CPU)
