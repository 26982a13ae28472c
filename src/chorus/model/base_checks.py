"""Checks of a base before training: complete, finite, every weight from its files, with its own tokenizer.

Each check raises InputError with one line. transformers initialises a missing weight at random, and makes an
empty tokenizer for a folder without one; training would run with both.
"""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from chorus.errors import InputError, first_line, out_of_memory

AGAIN = "download the base again, or convert it again"
MEDIA_TOKEN = re.compile(r"(image|video|audio|boi|eoi|boa|eoa)_token_(id|index)")  # names in a config
LFS_POINTER = b"version https://git-lfs"


@contextmanager
def model_errors_named(model_name: str) -> Iterator[None]:
    """Turn the loaders' errors into one line that names the key and, if a file is damaged, the file.

    Out-of-memory errors pass through: they are not the model's fault.
    """
    _refuse_no_model(model_name)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error) is not None:
            raise
        if "custom code" in str(error):  # transformers' words
            raise InputError(
                f"key 'model_name': {model_name} brings code of its own, which Chorus does not run; take a "
                "base whose architecture is part of transformers"
            ) from error
        damaged = _damaged_file(model_name)
        if damaged is not None:
            raise InputError(f"key 'model_name': {damaged}") from error
        reason = first_line(error)
        if isinstance(error, ImportError):  # Gemma 3n's tower needs timm, though no text passes through it
            reason = " ".join(str(error).split())  # how to install it comes in the lines after the first
            raise InputError(f"key 'model_name': {model_name} cannot be loaded: {reason}") from error
        raise InputError(
            f"key 'model_name': {model_name} cannot be loaded: {reason} "
            "(give a local folder, or a hub id that this machine can reach)"
        ) from error


def _refuse_no_model(model_name: str) -> None:
    folder = Path(model_name)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        if (folder / CONFIG_NAME).is_file():
            raise InputError(
                f"key 'model_name': {folder / ADAPTER_CONFIG_NAME}: the folder holds an adapter beside the "
                "base, and transformers would put it on; move the adapter to a folder of its own, or merge "
                "it into the base"
            )
        base = _base_of_adapter(folder / ADAPTER_CONFIG_NAME)
        raise InputError(
            f"key 'model_name': {model_name} is an adapter, not a base; give the base under it{base}"
        )
    if folder.exists() and not (folder / CONFIG_NAME).is_file():
        raise InputError(f"key 'model_name': {model_name} holds no config.json; give a folder with a model")
    looks_local = model_name.startswith((".", "/", "~")) or model_name.count("/") > 1
    if not folder.exists() and looks_local:
        raise InputError(f"key 'model_name': folder {model_name} does not exist; check the path")


def _base_of_adapter(file: Path) -> str:
    try:
        return f", {json.loads(file.read_text(encoding='utf-8'))['base_model_name_or_path']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _damaged_file(model_name: str) -> str | None:
    """The first weight file that is missing, truncated or not in safetensors format, with the remedy; None if
    all are intact.

    Only headers are read. safetensors refuses a file that is not exactly as long as its header says.
    """
    folder = Path(model_name)
    is_local = folder.is_dir()
    if not is_local:
        cached = try_to_load_from_cache(model_name, CONFIG_NAME)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        names = [SAFE_WEIGHTS_NAME]
        if is_local and not (folder / SAFE_WEIGHTS_NAME).exists():
            return _no_safetensors(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{index} is damaged; {AGAIN}"
    for name in names:
        file = folder / str(name)
        try:
            with file.open("rb") as opened:
                if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                    return f"{file} is a pointer of Git LFS and not the weights; fetch them with git lfs pull"
            with safe_open(file, framework="pt"):
                pass
        except FileNotFoundError:
            if is_local:  # a hub id: not downloaded yet, and the loader's own message says why
                return f"{file} is missing: it is named in {index.name}; {AGAIN}"
        except Exception as error:  # safetensors' own, an OSError
            reason = str(error).partition("\n")[0] or type(error).__name__
            return f"{file} is incomplete or damaged ({reason}); {AGAIN}"
    return None


def _no_safetensors(folder: Path) -> str:
    others = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(pattern)
    )
    found = f"; {others[0]} is not read: give the base as safetensors" if others else f"; {AGAIN}"
    return f"{folder} holds no {SAFE_WEIGHTS_NAME}{found}"


def check_report(report: Mapping[str, Collection[Any]], model: PreTrainedModel, model_name: str) -> None:
    """Refuse a model if a parameter did not come from the files, or if the files hold one that the model
    lacks.

    Args:
        report: transformers' loading info: missing_keys, mismatched_keys, unexpected_keys. It omits tied
            weights and keys that an architecture declares harmless.
    """
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, in_file, in_model = mismatched[0]
        raise InputError(
            f"key 'model_name': {model_name}: {name} is {list(in_file)} in the files and {list(in_model)} by "
            f"config.json{_and_more(mismatched)}; config.json and weights are not of one model: {AGAIN}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"key 'model_name': {model_name}: {missing[0]} is not in the files{_and_more(missing)}, so it "
            f"would be drawn at random; {AGAIN}"
        )
    # A tower that a text model lacks, such as one for images, is separate. An unexpected key among the
    # model's own modules was trained with them: a layer beyond the config's number, an adapter, the scale of
    # a quantised weight.
    stems = {_stem(name) for name in model.state_dict()}
    left_over = sorted(name for name in report["unexpected_keys"] if _stem(name) in stems)
    if left_over:
        raise InputError(
            f"key 'model_name': {model_name}: {left_over[0]} is in the files and not in the model that "
            f"config.json describes{_and_more(left_over)}; {AGAIN}"
        )


def _stem(name: str) -> str:
    """`model.layers.7.mlp.up_proj.weight` -> `model.layers`."""
    return ".".join(re.split(r"\.\d+\.", name)[0].split(".")[:2])


def _and_more(names: Collection[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@torch.no_grad()
def check_finite(model: PreTrainedModel, model_name: str) -> None:
    """Refuse a model with a NaN or Inf among its weights. Reads them once and waits for the device once."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    # By the largest magnitude of each: a mask of an embedding would take half a gigabyte.
    largest = [torch.linalg.vector_norm(weight, torch.inf).float() for _, weight in named if weight.numel()]
    is_finite_N = torch.stack(largest).isfinite().tolist()
    names = [name for name, weight in named if weight.numel()]
    bad = [name for name, is_finite in zip(names, is_finite_N, strict=True) if not is_finite]
    if bad:
        weight = dict(named)[bad[0]]
        count = int((~weight.isfinite()).sum())
        why = "take mixed_precision bf16 or no" if weight.dtype == torch.float16 else AGAIN
        raise InputError(
            f"key 'model_name': {model_name}: {bad[0]} holds {count} NaN or Inf as {str(weight.dtype)[6:]}"
            f"{_and_more(bad)}; {why}"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, model_name: str) -> None:
    """Refuse a tokenizer that is not the base's: empty, slow, without an end token, with ids beyond the
    embedding.

    The latter includes special tokens missing from the vocabulary: transformers appends them.
    """

    def refuse(
        what: str, remedy: str = "put the tokenizer files of the base, tokenizer.json, into its folder"
    ) -> None:
        raise InputError(f"key 'model_name': {model_name}: its tokenizer {what}; {remedy}")

    vocabulary = tokenizer.get_vocab()
    special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if len(vocabulary.keys() - special) < 2:
        refuse(f"is empty: it knows {len(vocabulary)} special tokens and no text")
    if not tokenizer.is_fast:
        refuse("is not a fast one, and gives no character offsets")
    if tokenizer.eos_token_id is None:
        refuse("has no end token", "set eos_token in tokenizer_config.json")
    rows = getattr(config.get_text_config(), "vocab_size", None)
    beyond = [] if rows is None else [token for token in vocabulary if vocabulary[token] >= rows]
    wrong = [token for token in beyond if token not in _never_written(tokenizer)]
    if wrong:
        last = max(wrong, key=vocabulary.__getitem__)
        refuse(
            f"has {last!r} at id {vocabulary[last]}, beyond the {rows} rows of the embedding",
            "give base and tokenizer of one model, or a base whose embedding was resized",
        )


def unreadable_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> list[str]:
    """The tokens that rows and prompts must not contain: ids beyond the embedding, and placeholders of a
    multimodal base for images, audio or video, which rows do not have.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    media = {value for name, value in vars(config).items() if MEDIA_TOKEN.fullmatch(name)}
    return [
        token
        for token, number in tokenizer.get_vocab().items()
        if number in media or (rows is not None and number >= rows)
    ]


def _never_written(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens that neither the tokenizer nor the chat template writes. Gemma 3 1B has one for images
    that its embedding lacks.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token]
    template = str(tokenizer.chat_template or "")
    return {token for token in special if token not in written and token not in template}


@contextmanager
def loading_report_unprinted() -> Iterator[None]:
    """transformers prints its loading report as a table of many lines; `check_report` reads it."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(is_wanted)
    try:
        yield
    finally:
        log.removeFilter(is_wanted)
