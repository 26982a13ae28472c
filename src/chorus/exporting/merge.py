"""The weighted mean of the agents' weights: as one adapter, or added to the base.

An adapter adds s B A to the weight of a linear layer. The mean of K of them, sum_k w_k s_k B_k A_k, is again
of this form: [w_1 s_1 B_1, ..., w_K s_K B_K] [A_1; ...; A_K]. The mean of A and B themselves is not.

A model with mean weights is one model. It is not the mixture, which is the mean of the agents' probabilities.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chorus.ensemble.adapter_files import AdapterFile
from chorus.errors import InputError


class MeanAdapter(NamedTuple):
    """One adapter of one rank on every layer, with scaling 1.

    Attributes:
        matrices: fp32 A_RI and B_OR of every layer, by the layer's name in the base.
        rank: R, of all layers; padded with zeros where the agents have less.
    """

    matrices: dict[str, tuple[Tensor, Tensor]]
    rank: int


def mean_adapter(adapters: Sequence[AdapterFile], weights: Sequence[float]) -> MeanAdapter:
    """The adapter that adds sum_k w_k s_k B_k A_k to every layer.

    The agents may differ in rank, scaling and layers; an agent without a layer adds nothing to it.
    """
    layers = dict.fromkeys(layer for adapter in adapters for layer in adapter.matrices)
    found = {}
    for layer in layers:
        own = [(a, w) for a, w in zip(adapters, weights, strict=True) if layer in a.matrices]
        A_RI = torch.cat([adapter.matrices[layer][0].float() for adapter, _ in own])
        scaled = [adapter.matrices[layer][1].float() * (w * adapter.scaling[layer]) for adapter, w in own]
        found[layer] = (A_RI, torch.cat(scaled, 1))
    rank = max(len(A_RI) for A_RI, _ in found.values())
    # Serving tools read one rank for all layers of a folder, and ignore rank patterns.
    padded = {
        layer: (pad(A_RI, (0, 0, 0, rank - len(A_RI))), pad(B_OR, (0, rank - len(A_RI))))
        for layer, (A_RI, B_OR) in found.items()
    }
    return MeanAdapter(padded, rank)


@torch.no_grad()
def add_to_base(model: PreTrainedModel, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add B A to the weight of every layer, in fp32, and round the sum to the weight's dtype.

    Raises:
        InputError: a weight is not a floating-point tensor, or another part of the model shares it.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer, (A_RI, B_OR) in matrices.items():
        module = model.get_submodule(layer)
        weight = module.weight
        assert isinstance(module, (nn.Linear, Conv1D))
        assert isinstance(weight, nn.Parameter)
        if not weight.is_floating_point():
            raise InputError(
                f"{layer}: its weight is {weight.dtype}, to which nothing can be added; name the base "
                "without quantisation with --base, or export with --merge cat"
            )
        shared = [name for name in owners[id(weight)] if name != f"{layer}.weight"]
        if shared:
            raise InputError(
                f"{layer}: its weight is tied to {shared[0]}, which would change with it; export with "
                "--merge cat, which leaves the base as it is"
            )
        delta_OI = B_OR @ A_RI
        delta = delta_OI.T if isinstance(module, Conv1D) else delta_OI  # GPT-2 stores weights transposed
        weight.copy_((weight.float() + delta).to(weight.dtype))
