"""Whether an answer is right, by its text. Answers and references are parsed in the same way."""

import logging
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import cast

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ANSWER_MARK = "####"  # GSM8K's mark: the result follows it


def answer_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]) -> str:
    """The text of an answer or a reference, up to the first end token, without special tokens."""
    end = next((place for place, token in enumerate(ids) if token in end_ids), len(ids))
    return cast(str, tokenizer.decode(list(ids[:end]), skip_special_tokens=True))


def pieces(ids: Sequence[int], text: Callable[[Sequence[int]], str]) -> list[str]:
    """The piece of text that each token adds; joined, the pieces are the text.

    A token decoded alone may lack its leading space, or be part of a character, which here belongs to the
    last of its tokens.

    Args:
        text: decodes some tokens.
    """
    found = []
    for n in range(len(ids)):
        before, after = (text(ids[max(0, n - 4) : end]).rstrip("\ufffd") for end in (n, n + 1))
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
        found.append(after[len(list(shared)) :])
    return found


def is_exact(text: str, reference: str) -> bool:
    """Whether the results agree where the reference marks one with `####`, otherwise the whole texts.

    White space is normalised between words and ignored at both ends.
    """
    is_marked = ANSWER_MARK in reference
    return final_answer(text, is_marked) == final_answer(reference, is_marked)


def final_answer(text: str, marked: bool) -> str | None:
    """The text after the last `####`, without commas and dollar signs (None: no mark); or the whole text."""
    if not marked:
        return " ".join(text.split())
    _, mark, result = text.rpartition(ANSWER_MARK)
    if not mark:
        return None
    return result.strip().splitlines()[0].strip(" .$").replace(",", "") if result.strip() else ""


def warn_of_long_references(
    references: Sequence[Sequence[int]], end_ids: Collection[int], max_new_tokens: int
) -> int:
    """Warn about references with more than `max_new_tokens` tokens, which no answer can match."""
    lengths = [next((n for n, token in enumerate(ids) if token in end_ids), len(ids)) for ids in references]
    count = sum(length > max_new_tokens for length in lengths)
    if count:
        logger.warning(
            "%d of %d held-out answers are longer than max_new_tokens_eval %d tokens, and so count as "
            "wrong whatever is written; the longest has %d",
            *(count, len(lengths), max_new_tokens, max(lengths)),
        )
    return count
