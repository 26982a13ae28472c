"""Answers of many answerers in one batched pass: the base, every agent, and mixtures of them.

All answerers decode together, so that the base's weights are read once for each token. A mixture writes one
text, which each of its members reads: with a mixture a member has at most twice as many rows. Prompts are
sorted by length and taken in waves; texts that have ended leave the batch.
"""

import logging
from collections.abc import Callable, Collection, Sequence

from transformers import PreTrainedTokenizerBase

from chorus.ensemble.decoding_batch import fitting_prompts
from chorus.ensemble.live_batch import LiveBatch
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.texts import Answer, Ending, Sampling, Text
from chorus.errors import InputError
from chorus.model.agents import Agents
from chorus.model.base import positions_of

logger = logging.getLogger(__name__)

TOKENS_AT_A_TIME = 16  # between two calls of `after_tokens`: a second on a GPU


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
    after_tokens: Callable[[], object] = lambda: None,
) -> list[list[Answer]]:
    """Continue every prompt by every answerer.

    Args:
        agents: in evaluation mode, of any mode.
        answerers: all answer together.
        prompts: token ids, at least one each; of any lengths.
        max_new_tokens: of an answer, its end token included; fewer where the base's positions end (warned).
        end_ids: tokens that end an answer.
        temperature: 0 takes the most probable token; above, one is drawn from p^(1/temperature).
        top_p: draw from the fewest most probable tokens that hold this probability together.
        seed: of the draws. They depend on it, the answerer's name and the prompt's index, not on the batch.
        stop: strings that end an answer; they need `tokenizer`.
        tokenizer: decodes the answers' texts.
        prompts_per_wave: prompts answered at a time; None: as many as fit.
        captured: replay a step as a CUDA graph; None does so on a GPU. It changes no result.
        after_tokens: called after every `TOKENS_AT_A_TIME` tokens of a wave.

    Returns:
        The answers, [answerer][prompt].

    Raises:
        InputError: a prompt has more tokens than the base has positions.
    """
    limits = _limits(agents, prompts, max_new_tokens)
    endings = [Ending(limit, frozenset(end_ids), tuple(stop), tokenizer) for limit in limits]
    batch = LiveBatch(agents, answerers, captured=captured)
    texts = [
        [
            Text(index, tuple(prompt), endings[number], Sampling(temperature, top_p, seed, number))
            for number, prompt in enumerate(prompts)
        ]
        for index in range(len(answerers))
    ]
    size = prompts_per_wave or fitting_prompts(agents, answerers, prompts, max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    for start in range(0, len(prompts) if max_new_tokens > 0 else 0, size):
        batch.join(own[index] for own in texts for index in by_length[start : start + size])
        num_tokens = 0
        while batch.texts:
            batch.advance()
            num_tokens += 1
            if num_tokens % TOKENS_AT_A_TIME == 0:
                after_tokens()
    return [[text.answer for text in own] for own in texts]


def _limits(agents: Agents, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """The most tokens of each prompt's answer. The last token of a text is never read, so it needs no
    position.
    """
    positions = positions_of(agents.config)
    if positions is None:
        return [max_new_tokens] * len(prompts)
    longest = max(map(len, prompts), default=0)
    if longest > positions:
        raise InputError(f"a prompt has {longest} tokens, and the base has {positions} positions; shorten it")
    limits = [min(max_new_tokens, positions + 1 - len(prompt)) for prompt in prompts]
    count = sum(limit < max_new_tokens for limit in limits)
    if count:
        logger.warning(
            "%d of %d answers end before %d tokens, where the base has no further position: it has %d",
            *(count, len(prompts), max_new_tokens, positions),
        )
    return limits
