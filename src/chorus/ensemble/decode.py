"""Answers of many answerers in one batched pass: the base, every agent, and mixtures of them.

All of them decode together, so that the base's weights are read once a token for everybody. A mixture writes
one text, which each of its members reads: a member answers at most twice as many rows when a mixture is
asked, too. Prompts are sorted by length and taken in waves; texts that have ended leave the batch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from chorus.ensemble.decoding_batch import DecodingBatch, fitting_prompts, is_capturable
from chorus.ensemble.next_token import Answerer, next_token_rule, uniforms
from chorus.model.agents import Agents


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
        text: decoded, without special tokens and without the stop string; empty without a tokenizer.
    """

    token_ids: list[int] = field(default_factory=list)
    ended: Literal["end", "stop", "length"] = "length"
    log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    mutual_informations: list[float] = field(default_factory=list)
    member_log_probs: list[list[float]] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class Ending:
    """When an answer ends.

    Attributes:
        end_ids: tokens that end it.
        stop: strings that end it; they need the tokenizer.
        max_new_tokens: the most tokens of an answer, an end token included.
    """

    max_new_tokens: int
    end_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def apply(self, answer: Answer) -> bool:
        """Cut the answer where it ends, and say whether it has.

        A batch takes several steps between two looks, so an answer may be longer than its limit here. What
        lies beyond the limit ends nothing: the limit comes first.
        """
        _cut(answer, self.max_new_tokens, self.max_new_tokens)
        end = next((n for n, token in enumerate(answer.token_ids) if token in self.end_ids), None)
        if end is not None:
            _cut(answer, end, end + 1)
            answer.ended = "end"
        if self.stop and self.tokenizer is not None:
            place = self._stopped_after(answer.token_ids)
            if place is not None:
                _cut(answer, place, place)
                answer.ended = "stop"
        return answer.ended != "length" or len(answer.token_ids) >= self.max_new_tokens

    def text_of(self, answer: Answer) -> str:
        """The answer's text, up to the first stop string."""
        if self.tokenizer is None:
            return ""
        text = self._decoded(answer.token_ids)
        places = [text.find(stop) for stop in self.stop if stop in text]
        return text[: min(places)] if places else text

    def _stopped_after(self, token_ids: list[int]) -> int | None:
        """The fewest first tokens whose text holds a stop string."""
        if not any(stop in self._decoded(token_ids) for stop in self.stop):
            return None
        counts = range(1, len(token_ids) + 1)
        return next(n for n in counts if any(stop in self._decoded(token_ids[:n]) for stop in self.stop))

    def _decoded(self, token_ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


def _cut(answer: Answer, tokens: int, chosen: int) -> None:
    del answer.token_ids[tokens:]
    for figures in (answer.log_probs, answer.entropies, answer.mutual_informations, answer.member_log_probs):
        del figures[chosen:]


@torch.no_grad()
def generate(
    agents: Agents,
    answerers: Sequence[Answerer],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts_per_wave: int | None = None,
    captured: bool | None = None,
) -> list[list[Answer]]:
    """Continue every prompt by every answerer.

    Args:
        agents: in evaluation mode, of any mode.
        answerers: all answer together.
        prompts: token ids, at least one each; of any lengths.
        max_new_tokens: the most tokens of an answer, an end token included.
        end_ids: tokens that end an answer.
        temperature: 0 takes the most probable token; above, one is drawn from p^(1/temperature).
        top_p: draw from the fewest most probable tokens that hold this probability together.
        seed: of the draws. They depend on it, the answerer's name and the prompt's index, not on the batch.
        stop: strings that end an answer; they need `tokenizer`.
        tokenizer: decodes the answers' texts.
        prompts_per_wave: prompts that are answered at a time; None takes what fits.
        captured: replay a step as a CUDA graph; None does so on a GPU. It changes no result.

    Returns:
        The answers, [answerer][prompt].
    """
    ending = Ending(max_new_tokens, frozenset(end_ids), tuple(stop), tokenizer)
    answers = [[Answer() for _ in prompts] for _ in answerers]
    captured = is_capturable(agents) if captured is None else captured
    rule = next_token_rule(agents, answerers, temperature, top_p)
    size = prompts_per_wave or fitting_prompts(agents, answerers, prompts, max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    for start in range(0, len(prompts) if max_new_tokens > 0 else 0, size):
        wave = by_length[start : start + size]
        own = [[row[index] for index in wave] for row in answers]
        draws = [
            [uniforms(seed, answerer.name, index, max_new_tokens) for index in wave] for answerer in answerers
        ]
        own_prompts = [prompts[index] for index in wave]
        # Given away: while a wave is read, the caches of the one before it must be gone.
        _finish(DecodingBatch.of(agents, rule, own_prompts, max_new_tokens, draws, captured), own, ending)
    for answer in (answer for row in answers for answer in row):
        answer.text = ending.text_of(answer)
    return answers


def _finish(batch: DecodingBatch, answers: Sequence[Sequence[Answer]], ending: Ending) -> None:
    """Take steps until every answer of the wave has ended."""
    while True:
        _append(batch, answers)
        live = [
            [prompt for prompt in prompts if prompt is not None and not ending.apply(answers[index][prompt])]
            for index, prompts in enumerate(batch.seating.prompts_A)
        ]
        if not any(live):
            return
        batch.leave(live)
        batch.advance()


def _append(batch: DecodingBatch, answers: Sequence[Sequence[Answer]]) -> None:
    """Add what the batch has just written to the answers."""
    figures = [figure.tolist() for figure in batch.written()]
    row, text = 0, 0
    for index, prompts in enumerate(batch.seating.prompts_A):
        K = len(batch.rule.answerers[index].members)
        for slot, prompt in enumerate(prompts):
            if prompt is not None:
                answer = answers[index][prompt]
                token_ids, log_probs, entropies, mutual, _ = figures
                answer.token_ids += token_ids[text + slot]
                answer.log_probs += log_probs[text + slot]
                answer.entropies += entropies[text + slot]
                answer.mutual_informations += mutual[text + slot]
                members = [figures[4][row + k * len(prompts) + slot] for k in range(K)]
                answer.member_log_probs += [list(of_token) for of_token in zip(*members, strict=True)]
        row, text = row + K * len(prompts), text + len(prompts)
