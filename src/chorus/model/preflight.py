"""The checks of a base, its tokenizer and the target modules that need no weights."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chorus.config.model import ModelSettings
from chorus.model.adapters import LoraShape
from chorus.model.base import check_base, check_positions, load_skeleton, load_tokenizer
from chorus.model.quantisation import check_asked_quantisation


def check_without_weights(
    settings: ModelSettings, max_seq_length: int, shape: LoraShape
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the base's modules without values, after every check that needs no weights.

    Raises:
        InputError: the folder, the tokenizer, the quantisation, the row length or the target modules cannot
            be used.
    """
    check_asked_quantisation(settings)
    tokenizer = load_tokenizer(settings.model_name)
    check_base(settings.model_name)
    skeleton = load_skeleton(settings.model_name)
    check_positions(skeleton.config, max_seq_length)
    shape.targets(skeleton)
    return tokenizer, skeleton
