"""The frozen base: a hub id, a local folder or the bundled tiny Gemma, with its tokenizer and its head."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
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
        """fp32 logits_BTV. For the last token of a few rows; the training loss never makes them whole."""
        logits_BTV = nn.functional.linear(hidden_BTD, self.weight_VD, self.bias_V).float()
        if self.scale != 1:
            logits_BTV = logits_BTV * self.scale
        return logits_BTV if self.softcap is None else self.softcap * torch.tanh(logits_BTV / self.softcap)


def base_reference(model_name: str) -> str:
    """How files of other folders name a base: by its absolute path, if it is a local folder, or its hub id.

    A relative path would be searched for in whatever directory the reader works in.
    """
    return str(Path(model_name).absolute()) if Path(model_name).is_dir() else model_name


@announced("reading the tokenizer")
def load_tokenizer(model_name: str) -> PreTrainedTokenizerBase:
    """The base's own tokenizer. Cheap: it tells a wrong `model_name` before any weight is read.

    Raises:
        InputError: `model_name` is neither a folder with a model nor a hub id that answers, or its tokenizer
            cannot be the base's own.
    """
    with model_errors_named(model_name):
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
    check_tokenizer(tokenizer, config, model_name)
    tell_unreadable(tokenizer, unreadable_tokens(tokenizer, config))
    return tokenizer


@announced("reading the headers of the base's files")
def check_base(model_name: str) -> None:
    """Look whether the base's files hold the model that its config.json describes. Reads headers, and no
    weight.

    Of a base that was saved quantised only the config: its files are checked as they are loaded.

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
    """The base's modules without weights, on the meta device: a second's work, which tells what the base has.

    With eager attention. Without a dtype it is that of the weights.

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
    """The base with its weights frozen and its own dropout off: one function, the same in every pass.

    Weights are read from safetensors only, and a model that brings code of its own is refused. What comes
    after `*` decides about attention, see `attention.choose_attention`, and whether weights are quantised as
    they are read.

    Raises:
        InputError: what `check_base` refuses, weights that are not finite, a head or an attention that Chorus
            would compute wrongly.
    """
    with model_errors_named(model_name):
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)  # unset, it would ask
        _switch_dropout_off(config)
        check_saved_quantisation(config, model_name, asked_for=quantisation is not None)
        is_quantised = quantisation is not None or saved_quantisation(config) is not None
        how = {"length": length, "compiled": compiled, "packing": packing}
        attention = choose_attention(attn_implementation, config, device, dtype, **how)
        more = {"quantization_config": quantisation, "device_map": {"": device}} if is_quantised else {}
        model = _from_files(model_name, config, dtype=dtype, attn_implementation=attention, **more)
    model.requires_grad_(False)
    if is_quantised:  # on the device, from which they cannot be moved
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


def check_positions(config: PretrainedConfig, max_seq_length: int) -> None:
    """Raises InputError where rows may be longer than the base has, or has ever seen, positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and max_seq_length > positions:
        raise InputError(
            f"key 'max_seq_length' is {max_seq_length}, but the base has {positions} positions "
            f"(max_position_embeddings); set it to {positions} or less"
        )


def write_toy_like(model_name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `toy_like` and its tokenizer."""
    toy_like(model_name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def toy_like(model_name: str) -> PreTrainedModel:
    """A base of the same architecture and vocabulary on the CPU, in fp32, with a few narrow random layers:
    always the same ones.

    Raises:
        InputError: no such model, or one with custom code.
    """
    with model_errors_named(model_name):
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # pyright: ignore  # random weights are not quantised
        text, toy = config.get_text_config(), _narrow(config.get_text_config())
        if text is config:
            config = toy
        for name, value in list(vars(config).items()):
            if value is text:
                setattr(config, name, toy)
            elif isinstance(value, PretrainedConfig) and hasattr(value, "num_hidden_layers"):
                value.num_hidden_layers = 1  # of a tower, through which no text passes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)


def _narrow(text: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a text model with one layer of each kind, at least two, and small widths."""
    whole = text.to_dict()
    depth, heads = text.num_hidden_layers, min(4, text.num_attention_heads)
    key_heads = whole.get("num_key_value_heads") or text.num_attention_heads
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    layers = max(2, len(kinds))
    of_each_layer = {
        key: value[:layers] for key, value in whole.items() if isinstance(value, list) and len(value) == depth
    }
    if kinds:
        of_each_layer["layer_types"] = (kinds * layers)[:layers]
    small = {
        **{"hidden_size": 16 * heads, "intermediate_size": 32 * heads, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "head_dim": 16, "global_head_dim": 16},
        **{"num_key_value_heads": heads if key_heads == text.num_attention_heads else heads // 2},
        **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "laurel_rank": 8},  # Gemma 3n and 4
        **{"moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},  # DeepSeek
    }
    small = {
        text.attribute_map.get(key, key): value for key, value in small.items()
    }  # n_embd is GPT-2's hidden_size
    known = whole.keys() | ({"global_head_dim"} if "per_layer_config" in whole else set())
    small = {key: value for key, value in small.items() if key in known and whole.get(key, 1)}
    if isinstance(whole.get("intermediate_size"), list):
        del small["intermediate_size"]
        of_each_layer["intermediate_size"] = [32 * heads] * layers
    kept = {
        key: value
        for key, value in whole.items()
        if key not in ("per_layer_config", "num_global_key_value_heads")
    }
    return type(text)(**{**kept, **of_each_layer, **small})


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

    A frozen base with dropout would draw from the global generator: another draw in every mode and at
    recomputation.
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _switch_dropout_off(value)
        elif ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


@torch.no_grad()
def _check_head(model: PreTrainedModel, model_name: str) -> None:
    """Compare head(trunk(x)) with the model's own logits on four
    tokens: an architecture may scale them in between."""
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
