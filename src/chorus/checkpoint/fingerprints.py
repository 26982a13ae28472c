"""Digests that show whether base and tokenizer are those of the run that saved a checkpoint."""

import hashlib
import json

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chorus.collectives import sampled


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the content of `tokenizer.json`, or over the vocabulary of a tokenizer without one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(f"{tokenizer.eos_token_id}\n{text}".encode()).hexdigest()


def base_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over every parameter's name, shape and 16 evenly spaced values, and the model's configuration.

    Hashing all weights would read gigabytes; this is cheap. It detects another model, or a base that was
    trained further, but not a change of a few weights.
    """
    # The path, the library version and the attention kernel are not part of the model's identity.
    beside = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in beside}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
    for values in sampled(list(model.parameters())):
        digest.update(values)
    return digest.hexdigest()
