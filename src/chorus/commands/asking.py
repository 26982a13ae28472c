"""Shared by `chorus generate` and `chorus chat`: the choice of answerers, and their answers."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chorus.ensemble.answers import ANSWER_MARK, final_answer
from chorus.ensemble.live_batch import LiveBatch
from chorus.ensemble.texts import Ending, Sampling, Text
from chorus.ensemble.uncertainty import uncertainty_of
from chorus.errors import InputError
from chorus.progress import announced
from chorus.serving.opened import BASE, MIXTURE, Opened, open_ensemble


def open_of(options: argparse.Namespace, paths: Sequence[str]) -> Opened:
    """The ensemble that the options name, once the options are checked.

    Raises:
        InputError: it cannot be opened, or has no such member.
    """
    if "" in options.stop:
        raise InputError("--stop: an empty text ends every answer at once; name another")
    opened = open_ensemble(paths, options.model, options.precision, options.device, options.form)
    num_agents = len(opened.ensemble.names)
    if options.member is not None and not 0 <= options.member < num_agents:
        raise InputError(f"--member {options.member}: the agents are 0 to {num_agents - 1}; name one of them")
    return opened


def name_of(options: argparse.Namespace) -> str:
    """The name of the answerer, where there is a single one."""
    if options.member is not None:
        return f"agent_{options.member}"
    return BASE if options.base else MIXTURE


@dataclass
class Asked:
    """A prompt and its answerers: one of them, or every agent for a vote.

    Attributes:
        names: the answerer of each text.
    """

    prompt: str
    names: list[str]
    texts: list[Text]

    @property
    def is_done(self) -> bool:
        return all(text.has_ended for text in self.texts)

    def votes(self) -> list[tuple[str, int]]:
        """The agents' answers with their counts, the most frequent first; among ties the first agent's.

        Answers are compared as exact match compares them, see `answers.final_answer`.
        """
        keys = [_compared(text.answer.text) for text in self.texts]
        counts = Counter(keys)
        return sorted(counts.items(), key=lambda pair: (-pair[1], keys.index(pair[0])))

    @property
    def chosen(self) -> int:
        """The text of the answer; of a vote, the first text with the majority's answer."""
        if len(self.texts) == 1:
            return 0
        keys = [_compared(text.answer.text) for text in self.texts]
        return keys.index(self.votes()[0][0])


def _compared(text: str) -> str:
    return final_answer(text, ANSWER_MARK in text) or ""


def ask(opened: Opened, options: argparse.Namespace, prompts: Sequence[tuple[str, list[int]]]) -> list[Asked]:
    """The texts to generate for some prompts: the prompts as text and as tokens.

    Raises:
        InputError: a prompt that leaves no room for an answer.
    """
    tokenizer = opened.ensemble.tokenizer
    ending = Ending(options.max_new_tokens, opened.form.end_ids, tuple(options.stop), tokenizer)
    agents = [f"agent_{agent}" for agent in opened.ensemble.agents.agents]
    names = agents if options.vote else [name_of(options)]
    asked = []
    for number, (prompt, ids) in enumerate(prompts):
        opened.refuse_too_long(len(ids), options.max_new_tokens, opened.positions)
        sampling = Sampling(options.temperature, options.top_p, options.seed, number)
        texts = [Text(opened.index_of(name), tuple(ids), ending, sampling) for name in names]
        asked.append(Asked(prompt, names, texts))
    return asked


def write(opened: Opened, asked: Sequence[Asked]) -> Iterator[None]:
    """Generate all texts together; yields after each step, so that the caller may show them."""
    batch = LiveBatch(opened.ensemble.agents, opened.answerers)
    with announced("reading the prompts"):
        batch.join(text for one in asked for text in one.texts)
    yield
    while batch.texts:
        batch.advance()
        yield


def described(asked: Asked) -> dict[str, Any]:
    """One prompt's answers, for JSON."""
    answers = [_answer(name, text) for name, text in zip(asked.names, asked.texts, strict=True)]
    if len(answers) == 1:
        return {"prompt": asked.prompt, **answers[0]}
    votes = [{"text": text, "count": count} for text, count in asked.votes()]
    return {
        "prompt": asked.prompt,
        "text": asked.texts[asked.chosen].answer.text,
        "votes": votes,
        "answers": answers,
    }


def _answer(name: str, text: Text) -> dict[str, Any]:
    answer = text.answer
    figures = zip(
        *(answer.log_probs, answer.entropies, answer.mutual_informations, answer.member_log_probs),
        strict=True,
    )
    pieces = [*zip(answer.token_ids, text.ending.pieces(answer), strict=True), (None, "")]  # the end token
    return {
        "model": name,
        "text": answer.text,
        "ended": answer.ended,
        "uncertainty": uncertainty_of(answer)._asdict(),
        "tokens": [
            {
                "id": token,
                "text": piece,
                "log_prob": log_prob,
                "entropy": entropy,
                "mutual_information": mutual,
                "member_log_probs": members,
            }
            for (token, piece), (log_prob, entropy, mutual, members) in zip(pieces, figures, strict=False)
        ],
    }
