"""Whether an answer is right, by its text. Answers and references are parsed in the same way."""

import logging
import re
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from itertools import takewhile
from typing import cast

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ANSWER_MARK = "####"  # GSM8K's mark: the result follows it
# The minus of 3-5 is not a sign, and the 2 of H2O is not a number.
NUMBER = re.compile(
    r"(?<![\w./])(?:(?<!\))[-+] ?)?(?:\d+(?:\.\d+)?(?:/\d+)?|\.\d+)(?![\d/]|\.\d|[eE][-+]?\d)"
)
MINUSES = str.maketrans("\u2212\u2010\u2011\u2012\u2013\uff0d", "------")  # as typesetters write it
MOST_DIGITS = 60  # a longer text is compared as a text


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
    """Whether the results agree where the reference or the text marks one with `####`, otherwise the whole
    texts.

    A reference without the mark is a result then: agents that learnt to write the mark are also asked
    questions whose file has results alone. White space is normalised between words and ignored at both ends.
    """
    reference = _marked_as(text, reference)
    return answer_to(reference, text) == answer_to(reference, reference)


def _marked_as(text: str, reference: str) -> str:
    is_result = ANSWER_MARK in text and ANSWER_MARK not in reference
    return f"{ANSWER_MARK} {reference}" if is_result else reference


def answer_to(reference: str, text: str) -> str | None:
    """`final_answer` of a text, as the reference is answered.

    Where its result is a number, the one number in the text's result is the answer, whatever stands around
    it: `1000 apples`, `\\boxed{1000}`. GSM8K's own scoring likewise leaves words out.
    """
    reference = _marked_as(text, reference)
    is_marked = ANSWER_MARK in reference
    found = final_answer(text, is_marked)
    if not is_marked or not found or _number(final_answer(reference, True) or "") is None:
        return found
    numbers = [one.group() for one in NUMBER.finditer(_plain(found))]
    only = _number(numbers[0]) if len(numbers) == 1 else None
    return found if only is None else only


def final_answer(text: str, marked: bool) -> str | None:
    """What stands behind the last `####`, up to the end of its line (None without one); or the whole text.

    A number behind the mark is written in one way: `$1,000.00`, `1000.` and `1000` are one answer, and so are
    `1/2` and `0.5`, `50%` and `50`, and a minus of any kind.
    """
    if not marked:
        return " ".join(text.split())
    _, mark, result = text.rpartition(ANSWER_MARK)
    if not mark:
        return None
    line = result.strip().splitlines()[0] if result.strip() else ""
    number = _number(line)
    return line.strip(" .$").replace(",", "") if number is None else number


def _plain(text: str) -> str:
    """Without dollar signs, and without the commas and narrow spaces that group digits; with the keyboard's
    minus."""
    return re.sub(r"(?<=\d)[,\u00a0\u202f](?=\d{3}(?!\d))", "", text.translate(MINUSES)).replace("$", "")


def _number(text: str) -> str | None:
    """The number that the whole text is, written in one way; None of another text."""
    text = re.sub(r"^([-+]) ", r"\1", _plain(text).strip(" ,%").rstrip(" .,%"))
    if len(text) > MOST_DIGITS or NUMBER.fullmatch(text) is None:
        return None
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
    shifted = value * 10**MOST_DIGITS
    if shifted.denominator != 1:  # such as a third, which no decimal is
        return str(value)
    digits = f"{abs(shifted.numerator):0{MOST_DIGITS + 1}}"
    decimal = f"{digits[:-MOST_DIGITS]}.{digits[-MOST_DIGITS:]}".rstrip("0").rstrip(".")
    return f"-{decimal}" if value < 0 else decimal


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
