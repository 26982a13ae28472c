"""From the text of rows to token ids and loss masks, and from prompts to the tokens that a model is given.

Prompt and completion are tokenised as one text, and a token is learnt where it begins in what is to be
learnt. So a token that begins in the prompt and reaches into the completion carries no loss: at generation
time the prompt is given without what follows. Such characters are counted, see `Tokenised.merged`.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from chorus.data.chat import ChatForm
from chorus.data.templates import BadRow, Problem
from chorus.errors import InputError

# Marks of a token. MERGED: it begins before what is to be learnt, and reaches into it.
NOT_LEARNT, LEARNT, MERGED = 0, 1, 2
UNREADABLE = "unreadable_by_base"  # attribute of the tokenizer, set by `tell_unreadable`
END_PROBE = "7"  # a placeholder answer that no template contains


class Tokenised(NamedTuple):
    """A tokenised row, not cut.

    Attributes:
        ids: token ids.
        marks: of each token NOT_LEARNT, LEARNT or MERGED.
        merged: characters to be learnt that carry no loss, because their token begins before them.
        answer: how many tokens it takes until the first is learnt that stands for text; 0 where there is
            none.
        strays: beginning tokens that are not at the beginning.
        unknown: tokens that stand for characters unknown to the tokenizer.
    """

    ids: list[int]
    marks: list[int]
    merged: int
    answer: int
    strays: int = 0
    unknown: int = 0


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a tokenizer without character offsets or end token."""
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        lacks = "an end token" if tokenizer.is_fast else "character offsets (it is not a fast one)"
        raise InputError(
            f"key 'model_name': its tokenizer lacks {lacks}; choose a base with a complete tokenizer.json"
        )


def tell_unreadable(tokenizer: PreTrainedTokenizerBase, tokens: Collection[str]) -> None:
    """Record in the tokenizer which of its tokens the base cannot read as text, for `Encoder.check`."""
    setattr(tokenizer, UNREADABLE, sorted(tokens))


def unreadable(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens recorded by `tell_unreadable`; none by default."""
    return getattr(tokenizer, UNREADABLE, [])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens, which stand for no text: the end token, turn markers and the like."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


class Encoder:
    """Tokenises rows for training and prompts for generation, alike in all that they share.

    One beginning token: of several at the start, written by the text, the tokenizer or both, one is kept;
    where a chat template omits it and the tokenizer would write it, it is added. A text whose first token is
    learnt gets a beginning token, or else an end token, before it, so that something predicts it. One end
    token: none is added where the tokenizer or the template writes it, even if white space follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.backend = cast(Tokenizer, tokenizer.backend_tokenizer)
        # A tokenizer.json may ask for both.
        if self.backend.truncation is not None or self.backend.padding is not None:
            self.backend = Tokenizer.from_str(self.backend.to_str())
            self.backend.no_truncation()
            self.backend.no_padding()
        self.bos, self.eos = cast(int | None, tokenizer.bos_token_id), cast(int, tokenizer.eos_token_id)
        self.beginning = self.eos if self.bos is None else self.bos
        self.special = special_ids(tokenizer)
        self.unreadable = re.compile("|".join(map(re.escape, unreadable(tokenizer))) or r"(?!)")
        # Strays cannot be counted where the end token is also the beginning token.
        self.stray = None if self.bos == self.eos else self.bos
        name = tokenizer.unk_token or getattr(self.backend.model, "unk_token", None)
        unknown = None if name is None else self.backend.token_to_id(str(name))
        self.unknown = None if unknown in (self.bos, self.eos) else unknown
        self.joined: dict[str, int] = {}
        self.is_space: dict[int, bool] = {}
        [probe] = self._encode(["a"], add_special_tokens=True)
        self.adds_bos = (
            self.bos is not None and probe.ids[:1] == [self.bos] and probe.special_tokens_mask[0] == 1
        )

    def check(self, problem: Problem) -> None:
        """Raise BadRow where the text holds a token that the base cannot read as text."""
        found = self.unreadable.search(problem.text)
        if found:
            raise BadRow(f"it holds {found.group()!r}, a token that stands for no text that the base reads")

    def rows(self, problems: Sequence[Problem]) -> Iterator[Tokenised]:
        """The rows for training, in order; all of them plain text, or all of them turns."""
        return self.marked(problems, self.encode(problems))

    def encode(self, problems: Sequence[Problem]) -> list[Encoding]:
        """The first half of `rows`, which releases Python's lock."""
        is_chat = bool(problems and problems[0].learnt)
        return self._encode([problem.text for problem in problems], not is_chat)

    def marked(self, problems: Sequence[Problem], encodings: Sequence[Encoding]) -> Iterator[Tokenised]:
        """The second half of `rows`."""
        for problem, encoding in zip(problems, encodings, strict=True):
            start = len(self.asked(problem.prompt))
            first = None if problem.learnt else _token_at(encoding, start)
            ids, added = self._one_beginning(encoding, bool(problem.learnt))
            if first is not None and added[-1] == 0:  # the tokenizer adds nothing after the text
                first -= len(encoding.ids) - len(ids)
                yield self._tokenised(
                    ids, [NOT_LEARNT] * first + [LEARNT] * (len(ids) - first), added, 0, False
                )
                continue
            text = problem.text
            spans = [(len(self.asked(text[:begin])), stop) for begin, stop in problem.learnt] or [
                (start, len(text))
            ]
            yield self._marked(text, spans, encoding, bool(problem.learnt))

    def prompt(self, problem: Problem) -> list[int]:
        """The tokens from which a model is to write the completion; at least one."""
        is_chat = bool(problem.learnt)
        [encoding] = self._encode([self.asked(problem.prompt)], not is_chat)
        ids, added = self._one_beginning(encoding, is_chat)
        # Some tokenizers close a text with the end token, but a prompt goes on.
        if ids and added[-1] and ids[-1] == self.eos:
            ids = ids[:-1]
        return ids or [self.beginning]

    def answer(self, problem: Problem) -> list[int]:
        """The tokens of the completion after `prompt`, as in training, with the end token."""
        prompt = self.prompt(problem)
        [row] = self.rows([problem._replace(rest="")])
        if row.ids[: len(prompt)] == prompt and len(row.ids) > len(prompt):
            return row.ids[len(prompt) :]
        # A token of the prompt reaches into the completion, so the completion's tokens differ from training.
        [alone] = self._encode([problem.completion], add_special_tokens=False)
        return [*alone.ids, self.eos]

    def asked(self, prompt: str) -> str:
        """The prompt without the spaces at its end that the tokenizer joins to a following word.

        They belong to the completion: in the prompt they would remove the completion's first word from the
        loss, and a model would be asked after a token that training never had in that place.
        """
        bare = prompt.rstrip()
        spaces = prompt[len(bare) :]
        if not spaces:
            return prompt
        if spaces not in self.joined:
            self.joined[spaces] = self._joined(spaces)
        return prompt[: len(prompt) - self.joined[spaces]]

    def _joined(self, spaces: str) -> int:
        """How many of these characters, from the end, are tokenised together with a letter that follows."""
        tries = ["x" + spaces[: len(spaces) - count] for count in range(len(spaces) + 1)]
        whole, *own = (
            one.ids for one in self._encode(["x" + spaces + "a", *tries], add_special_tokens=False)
        )
        return next((count for count, ids in enumerate(own) if whole[: len(ids)] == ids), 0)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[Encoding]:
        """Calls the backend directly: the wrapper would convert every offset into Python objects."""
        return self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)

    def _one_beginning(self, encoding: Encoding, is_chat: bool) -> tuple[list[int], list[int]]:
        """Ids, and for each whether the tokenizer added it by itself, with exactly one beginning token."""
        ids, added = encoding.ids, encoding.special_tokens_mask
        if self.bos is not None:
            if ids[:2] == [self.bos, self.bos]:
                last = next((place for place, one in enumerate(ids) if one != self.bos), len(ids)) - 1
                return ids[last:], added[last:]
            if is_chat and self.adds_bos and ids[:1] != [self.bos]:
                return [self.bos, *ids], [1, *added]
        return ids, added

    def _marked(
        self, text: str, spans: Sequence[tuple[int, int]], encoding: Encoding, is_chat: bool
    ) -> Tokenised:
        ids, added = self._one_beginning(encoding, is_chat)
        starts, ends = _places(encoding.offsets, text)
        shift = len(ids) - len(starts)  # shifted by what was added or removed at the start
        if shift:
            starts, ends = (np.pad(one, (shift, 0)) if shift > 0 else one[-shift:] for one in (starts, ends))
        own = ~np.array(added, dtype=bool)
        marks, merged = np.zeros(len(ids), dtype=np.int8), 0
        for start, stop in spans:
            last = (
                len(text) + 1 if stop == len(text) else stop
            )  # a token of no width may stand at the very end
            marks[own & (starts >= start) & (starts < last)] = LEARNT
            for place in np.flatnonzero(own & (starts < start) & (ends > start)):
                if text[starts[place] : start].isspace():
                    marks[place] = LEARNT
                else:
                    marks[place] = MERGED
                    merged += int(min(ends[place], stop)) - start
        return self._tokenised(ids, marks.tolist(), added, merged, is_chat)

    def _tokenised(
        self, ids: list[int], marks: list[int], added: list[int], merged: int, is_chat: bool
    ) -> Tokenised:
        """With one end, and with a token before a first one that is learnt."""
        start = marks.index(LEARNT) if LEARNT in marks else len(marks)
        places = (place for place in range(start, len(ids)) if marks[place] == LEARNT)
        answer = next((place + 1 for place in places if ids[place] not in self.special), 0)
        ids, marks = self._ended(ids, marks, added, is_chat)
        if marks[0] == LEARNT and ids[0] == self.bos:
            marks = [NOT_LEARNT, *marks[1:]]
        elif marks[0] == LEARNT:
            ids, marks, answer = [self.beginning, *ids], [NOT_LEARNT, *marks], answer and answer + 1
        strays = 0 if self.stray is None else ids.count(self.stray) - (ids[0] == self.stray)
        unknown = 0 if self.unknown is None else ids.count(self.unknown)
        return Tokenised(ids, marks, merged, answer, strays, unknown)

    def _ended(
        self, ids: list[int], marks: list[int], added: list[int], is_chat: bool
    ) -> tuple[list[int], list[int]]:
        """With one end token, which is learnt. Of turns, only where
        no token of the template's closes the last one."""
        if is_chat:
            last = len(marks) - marks[::-1].index(LEARNT) if LEARNT in marks else 0
            is_closed = any(ids[place] in self.special for place in range(max(last - 2, 0), last))
            return (ids, marks) if is_closed or last < len(ids) else ([*ids, self.eos], [*marks, LEARNT])
        if added and added[-1] and ids[-1] == self.eos:  # as if the tokenizer had added none
            ids, marks = ids[:-1], marks[:-1]
        if ids[-1:] == [self.eos]:
            return ids, [*marks[:-1], LEARNT]
        if ids[-2:-1] == [self.eos] and self._stands_for_space(ids[-1]):
            return ids, [*marks[:-2], LEARNT, marks[-1]]
        return [*ids, self.eos], [*marks, LEARNT]

    def _stands_for_space(self, token: int) -> bool:
        if token not in self.is_space:
            self.is_space[token] = cast(str, self.tokenizer.decode([token])).isspace()
        return self.is_space[token]


def _places(offsets: Sequence[tuple[int, int]], text: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each token begins and ends in the text.

    Some tokenizers trim white space from a token's offsets, so that a line break may seem to have no width: a
    token begins where the one before it ends, if only white space lies between.
    """
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = places[:, 0].copy(), places[:, 1]
    reached = np.maximum.accumulate(ends)
    for place in np.flatnonzero(starts[1:] > reached[:-1]) + 1:
        if text[reached[place - 1] : starts[place]].isspace():
            starts[place] = reached[place - 1]
    return starts, ends


def _token_at(encoding: Encoding, char: int) -> int | None:
    """The token that begins at a character, if the token before it ends there; None where that is not clear.

    This suffices for most rows, in a third of the time that all offsets take.
    """
    token = encoding.char_to_token(char)
    chars = None if token is None else encoding.token_to_chars(token)
    if token is None or chars is None or chars[0] != char:
        return None
    before = encoding.token_to_chars(token - 1) if token else None
    return token if before is None or before[1] <= char else None


def end_ids(tokenizer: PreTrainedTokenizerBase, form: ChatForm | None) -> list[int]:
    """The tokens that end an answer: the end token and the one that closes an assistant's turn."""
    ends = [cast(int, tokenizer.eos_token_id)]
    if form is not None:
        asked = [{"role": "user", "content": END_PROBE}]
        try:
            whole = form.write_turns([*asked, {"role": "assistant", "content": END_PROBE}])
        except BadRow:
            return ends
        special = special_ids(tokenizer)
        ids = cast(list[int], tokenizer(whole.completion, add_special_tokens=False)["input_ids"])
        closing = [one for one in ids[1:] if one in special]
        ends += [one for one in closing[:1] if one not in ends]
    return ends
