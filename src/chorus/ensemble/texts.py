"""Texts that are being generated: prompt, sampling, end conditions and answer."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # what a tokenizer decodes an incomplete character to


@dataclass
class Answer:
    """One answerer's answer to one prompt. Logarithms are natural; T tokens, K members.

    Attributes:
        token_ids: what was written, without the end token.
        ended: by the end token, by a stop string, or by the limit of tokens.
        log_probs: of every token that was chosen, under the answerer's distribution before any sampling
            temperature; an end token is one more than `token_ids` has.
        entropies: of these distributions, nats: the total uncertainty.
        mutual_informations: nats, the part of it that is the members' disagreement; 0 for a single member.
        member_log_probs: of the chosen tokens under each member, T lists of K.
        tops: of each distribution the most probable tokens with their log-probabilities, where they were
            asked for.
        text: decoded, without special tokens and without the stop string; empty without a tokenizer.
    """

    token_ids: list[int] = field(default_factory=list)
    ended: Literal["end", "stop", "length"] = "length"
    log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    mutual_informations: list[float] = field(default_factory=list)
    member_log_probs: list[list[float]] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""

    def cut(self, tokens: int, chosen: int) -> None:
        """Keep the first tokens of the text, and the statistics of the first chosen tokens."""
        del self.token_ids[tokens:]
        for figures in (self.log_probs, self.entropies, self.mutual_informations):
            del figures[chosen:]
        del self.member_log_probs[chosen:], self.tops[chosen:]


@dataclass(frozen=True)
class Ending:
    """When an answer ends.

    Attributes:
        max_new_tokens: the most tokens of an answer, an end token included.
        end_ids: tokens that end it.
        stop: strings that end it; they need the tokenizer.
    """

    max_new_tokens: int
    end_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def apply(self, answer: Answer) -> bool:
        """Cut the answer where it ends, and say whether it has."""
        # The last steps on a GPU are taken together, and may reach beyond the limit.
        answer.cut(self.max_new_tokens, self.max_new_tokens)
        end = next((n for n, token in enumerate(answer.token_ids) if token in self.end_ids), None)
        if end is not None:
            answer.cut(end, end + 1)
            answer.ended = "end"
        if self.stop and self.tokenizer is not None:
            place = self._stopped_after(answer.token_ids)
            if place is not None:
                answer.cut(place, place)
                answer.ended = "stop"
        return answer.ended != "length" or len(answer.token_ids) >= self.max_new_tokens

    def text_of(self, answer: Answer) -> str:
        """The answer's text, up to the first stop string."""
        if self.tokenizer is None:
            return ""
        text = self._decoded(answer.token_ids)
        places = [text.find(stop) for stop in self.stop if stop in text]
        return text[: min(places)] if places else text

    def settled_text_of(self, answer: Answer) -> str:
        """The part of an unfinished answer's text that no further token can change.

        The last character may be incomplete, and the last characters may be the beginning of a stop string.
        """
        text = self.text_of(answer).rstrip(HALF)
        longest = max(map(len, self.stop), default=0)
        for count in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self.stop):
                return text[:-count]
        return text

    def ends_of_tokens(self, answer: Answer, first: int = 0) -> list[int]:
        """How many characters the answer's text has after each token, from `first` on."""
        counts = range(first + 1, len(answer.token_ids) + 1)
        return [len(self._decoded(answer.token_ids[:count]).rstrip(HALF)) for count in counts]

    def pieces(self, answer: Answer) -> list[str]:
        """What each token adds to the answer's text: together they are the text."""
        whole = self.text_of(answer)
        ends = [min(end, len(whole)) for end in self.ends_of_tokens(answer)]
        ends[-1:] = [len(whole)] if ends else []
        starts = [0, *ends[:-1]]
        return [whole[start : max(start, end)] for start, end in zip(starts, ends, strict=True)]

    def _stopped_after(self, token_ids: list[int]) -> int | None:
        """The fewest first tokens whose text holds a stop string."""
        if not any(stop in self._decoded(token_ids) for stop in self.stop):
            return None
        counts = range(1, len(token_ids) + 1)
        return next(n for n in counts if any(stop in self._decoded(token_ids[:n]) for stop in self.stop))

    def _decoded(self, token_ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


class Sampling(NamedTuple):
    """How the tokens of a text are chosen.

    Attributes:
        temperature: 0 takes the most probable token; above, one is drawn from p^(1/temperature).
        top_p: draw from the fewest most probable tokens that hold this probability together.
        seed: of the draws. They depend on it, the answerer's name and `number`, not on the batch.
        number: of the text, among those of one seed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    number: int = 0


GREEDY = Sampling()


@dataclass
class Text:
    """A text to be written.

    Attributes:
        answerer: its index.
        prompt: token ids, at least one.
        num_tops: how many of the most probable tokens are named beside each one.
    """

    answerer: int
    prompt: tuple[int, ...]
    ending: Ending
    sampling: Sampling = GREEDY
    num_tops: int = 0
    answer: Answer = field(default_factory=Answer)
    has_ended: bool = False

    def __post_init__(self) -> None:
        temperature, top_p, *_ = self.sampling
        if not (temperature >= 0 and 0 < top_p <= 1):
            raise ValueError(
                f"temperature {temperature} must be 0 or more, top_p {top_p} above 0 and at most 1"
            )
        if not self.prompt:
            raise ValueError("a prompt has no token")

    @property
    def num_read(self) -> int:
        """Tokens that its caches hold: all but the last one."""
        return len(self.prompt) + len(self.answer.token_ids) - 1

    @property
    def most_tokens(self) -> int:
        """Tokens that it may come to have, prompt included."""
        return len(self.prompt) + self.ending.max_new_tokens
