"""The frozen base: a hub id, a local folder or the bundled tiny Gemma, with its tokenizer and its head."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chorus.config import Config
from chorus.data.tokenise import tell_unreadable
from chorus.errors import InputError
from chorus.model.attention import check_packing, choose_attention
from chorus.model.base_checks import (
    check_finite,
    check_report,
    check_tokenizer,
    loading_report_unprinted,
    model_errors_named,
    unreadable_tokens,
)
from chorus.model.quantisation import (
    check_saved_quantisation,
    keep_differentiable,
    quantisation_of,
    saved_quantisation,
)
from chorus.progress import announced

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """The frozen output layer: logits = softcap · tanh(z / softcap) of z = scale · (hidden Wᵀ + b), or z
    itself.

    Gemma has a soft-cap, Cohere and Granite have a scale, most have neither.
    """

    linear: nn.Linear
    softcap: float | None
    scale: float = 1.0

    @property
    def weight_VD(self) -> Tensor:
        return self.linear.weight

    @property
    def bias_V(self) -> Tensor | None:
        return self.linear.bias

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """fp32 logits_BTV. For the last token of a few rows; the training loss computes them in chunks."""
        logits_BTV = nn.functional.linear(hidden_BTD, self.weight_VD, self.bias_V).float()
        if self.scale != 1:
            logits_BTV = logits_BTV * self.scale
        return logits_BTV if self.softcap is None else self.softcap * torch.tanh(logits_BTV / self.softcap)


def base_reference(model_name: str) -> str:
    """The name of a base in files elsewhere: its absolute path, if it is a local folder, or its hub id.

    A relative path would depend on the reader's working directory.
    """
    return str(Path(model_name).absolute()) if Path(model_name).is_dir() else model_name


@announced("reading the tokenizer")
def load_tokenizer(model_name: str) -> PreTrainedTokenizerBase:
    """The base's own tokenizer. Cheap: detects a wrong `model_name` before any weight is read.

    Raises:
        InputError: `model_name` is neither a folder with a model nor a reachable hub id, or its tokenizer
            does not belong to the base.
    """
    with model_errors_named(model_name):
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
    check_tokenizer(tokenizer, config, model_name)
    tell_unreadable(tokenizer, unreadable_tokens(tokenizer, config))
    return tokenizer


@announced("reading the headers of the base's files")
def check_base(model_name: str) -> None:
    """Check that the base's files hold the model that its config.json describes. Reads headers, not weights.

    Of a base saved quantised only the config is checked here; its files are checked when they are loaded.

    Raises:
        InputError: no such model, one with custom code or quantised, a file that is damaged, a weight that is
            missing, left over or of another shape.
    """
    with model_errors_named(model_name):
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
        check_saved_quantisation(config, model_name, asked_for=False)
        if saved_quantisation(config) is None:
            _from_files(model_name, config, device_map="meta")


def _from_files(model_name: str, config: PretrainedConfig, **how: object) -> PreTrainedModel:
    """The model with every weight from its safetensors files."""
    with loading_report_unprinted():
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            model_name,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # then they are in the report; `check_report` refuses them
            output_loading_info=True,
            **how,
        )
    check_report(report, model, model_name)
    return model


@announced("reading the base's config")
def load_skeleton(model_name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The base's modules without weights, on the meta device: takes a second and shows the architecture.

    With eager attention. dtype None: that of the weights.

    Raises:
        InputError: no such model, or one with custom code.
    """
    with model_errors_named(model_name), torch.device("meta"):
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
        _switch_dropout_off(config)
        more = {} if dtype is None else {"dtype": dtype}
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation="eager", **more
        )


@announced("loading the base")
def load_model(
    model_name: str,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "auto",
    *,
    length: int = 1,
    compiled: bool = False,
    packing: bool = False,
    quantisation: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The base with frozen weights and its own dropout off, so that every pass computes the same function.

    Weights are read from safetensors only, and a model with custom code is refused. The arguments after `*`
    decide the attention, see `attention.choose_attention`, and the quantisation of the weights.

    Raises:
        InputError: what `check_base` refuses, weights that are not finite, a head or an attention that Chorus
            would compute wrongly.
    """
    with model_errors_named(model_name):
        config = AutoConfig.from_pretrained(
            model_name, trust_remote_code=False
        )  # unset, it would ask the user
        _switch_dropout_off(config)
        check_saved_quantisation(config, model_name, asked_for=quantisation is not None)
        is_quantised = quantisation is not None or saved_quantisation(config) is not None
        how = {"length": length, "compiled": compiled, "packing": packing}
        attention = choose_attention(attn_implementation, config, device, dtype, **how)
        more = {"quantization_config": quantisation, "device_map": {"": device}} if is_quantised else {}
        model = _from_files(model_name, config, dtype=dtype, attn_implementation=attention, **more)
    model.requires_grad_(False)
    if is_quantised:  # already on the device, and cannot be moved
        keep_differentiable(model)
    else:
        model.to(device)  # pyright: ignore[reportArgumentType]
    check_finite(model, model_name)
    _check_head(model, model_name)
    if packing:
        check_packing(model)
    return model


def load_base(
    config: Config, dtype: torch.dtype, device: torch.device, *, compiled: bool | str
) -> PreTrainedModel:
    """`load_model` as the configuration says; `compiled`: whether its decoder layers will be."""
    return load_model(
        config.model_name,
        dtype,
        device,
        config.attn_implementation,
        length=config.max_seq_length,
        compiled=bool(compiled),
        packing=config.packs,
        quantisation=quantisation_of(config, dtype),
    )


def positions_of(config: PretrainedConfig) -> int | None:
    """The most tokens of a text; None where the configuration sets no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def check_positions(config: PretrainedConfig, max_seq_length: int) -> None:
    """Raises InputError where rows may be longer than the base's number of positions."""
    positions = positions_of(config)
    if positions is not None and max_seq_length > positions:
        raise InputError(
            f"key 'max_seq_length' is {max_seq_length}, but the base has {positions} positions "
            f"(max_position_embeddings); set it to {positions} or less"
        )


def copy_sharing_storage(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same parameters and buffers: its own adapters, no copy of the base."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})


def head_of(model: PreTrainedModel) -> Head:
    """The output layer of a causal language model, with the soft-cap or the scale of its logits that the
    config names.

    Raises:
        InputError: there is no linear output layer.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise InputError(
            f"key 'model_name': {type(model).__name__} has no linear output layer, so no token "
            "loss; take a causal language model"
        )
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if softcap is None:
        softcap = getattr(config, "logits_soft_cap", None)  # RecurrentGemma
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None:
        scale = 1 / getattr(
            config, "logits_scaling", 1.0
        )  # Granite divides; where one multiplies, loading refuses it
    return Head(linear, softcap, scale)


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The model below its head: `trunk(input_ids=...).last_hidden_state` is after the final norm."""
    trunk = model.base_model
    assert trunk is not model, "a causal language model without a trunk of its own"
    return trunk


def _switch_dropout_off(config: PretrainedConfig) -> None:
    """Set every dropout rate of a (possibly nested) model configuration to zero.

    A frozen base with dropout would draw from the global generator: different draws in every mode and on
    recomputation.
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _switch_dropout_off(value)
        elif ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


@torch.no_grad()
def _check_head(model: PreTrainedModel, model_name: str) -> None:
    """Compare head(trunk(x)) with the model's logits on four tokens: there may be more in between."""
    model.eval()
    ids_BT = torch.arange(1, 5, device=model.device)[None]
    own_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    hidden_BTD = trunk_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    ours_BTV = head_of(model).logits(hidden_BTD)
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    difference = (own_BTV - ours_BTV).abs().max() / own_BTV.abs().max().clamp(min=1e-6)
    if not difference <= tolerance:
        raise InputError(
            f"key 'model_name': {model_name}: {type(model).__name__} does more between trunk and logits "
            f"than a linear layer, a scale and a soft-cap (relative difference {difference:.1e}); Chorus "
            "cannot train it exactly; take another base"
        )


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every frozen parameter and buffer, by name."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
    yield from model.named_buffers()
