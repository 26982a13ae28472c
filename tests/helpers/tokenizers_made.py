"""Tokenizers of the kinds that bases bring, small enough to be told token by token."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNK = range(4)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def make_tokenizer(
    adds: str = "<bos> $A", eos: str | None = "<eos>", has_bytes: bool = True
) -> PreTrainedTokenizerFast:
    """Gemma's kind: BPE over whole texts with a visible space and, if it `has_bytes`, bytes for unknown
    characters; joins b with c."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh:0123456789", "bc", "▁a"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("b", "c"), ("▁", "a")]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=has_bytes, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.add_special_tokens(special)
    bpe.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token="<bos>", pad_token="<pad>")


def byte_level_tokenizer(trims: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind: a space begins the word that follows, no
    beginning token; `trims` white space from offsets."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["\u0120a", "\u0120b", ":\u010a", "\u010a\u010a"]  # " a", " b", ":\n", "\n\n"
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet, *merged])}
    bpe = Tokenizer(models.BPE(vocabulary, [(token[0], token[1]) for token in merged]))
    split = pre_tokenizers.Split(
        r" ?[a-z]+|[^a-z\s]+\n*|\s+", "isolated"
    )  # as newer ones: a line break joins a colon
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trims)
    bpe.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
