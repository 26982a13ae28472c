"""Every answerer's results for the harness's requests, computed in the same passes.

The harness evaluates one model after another. The first request computes the result for all answerers; the
others reuse it. Full logits of all members never exist at once: see `ensemble/distributions.py`.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch

from chorus.data.samples import Sample
from chorus.ensemble.decode import generate
from chorus.ensemble.distributions import predict, token_states
from chorus.ensemble.lanes import Member
from chorus.ensemble.load import Ensemble
from chorus.ensemble.next_token import Answerer

TextKey = tuple[int, ...]


class Continuation(NamedTuple):
    """Token ids to read, and how many of the last ones are scored."""

    ids: tuple[int, ...]
    num_scored: int


class Likelihood(NamedTuple):
    """Of a continuation: the sum of log-probabilities, nats, and whether greedy search writes it."""

    log_likelihood: float
    is_greedy: bool


class TextRequest(NamedTuple):
    """A prompt, and how it is to be continued."""

    prompt: tuple[int, ...]
    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float


Request = TypeVar("Request", bound=Hashable)
Found = TypeVar("Found")


class SharedPasses:
    """Likelihoods and texts of all answerers, each request once.

    Args:
        answerers: the base, agents and mixtures, all of this ensemble.
        end_id: the token that ends a text.
        batch_size: requests that are read or continued at a time; None takes what fits.
        progress: called with the number of finished requests.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        answerers: Sequence[Answerer],
        end_id: int,
        batch_size: int | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.ensemble, self.answerers, self.end_id = ensemble, answerers, end_id
        self.batch_size, self.progress = batch_size, progress
        members = dict.fromkeys(member for answerer in answerers for member in answerer.members)
        self.members: list[Member] = list(members)
        self._likelihoods: dict[Continuation, list[Likelihood]] = {}
        self._texts: dict[TextRequest, list[str]] = {}

    def likelihoods(self, answerer: int, wanted: Sequence[Continuation]) -> list[Likelihood]:
        """Of every continuation under the answerer of this index."""
        new = sorted(self._new(wanted, self._likelihoods), key=lambda one: -len(one.ids))
        for part in self._parts(new):
            self._likelihoods |= zip(part, self._read(part), strict=True)
            self.progress(len(part))
        return [self._likelihoods[one][answerer] for one in wanted]

    def texts(self, answerer: int, wanted: Sequence[TextRequest]) -> list[str]:
        """Of every prompt, what the answerer of this index writes."""
        alike: dict[tuple[Hashable, ...], list[TextRequest]] = {}
        for one in self._new(wanted, self._texts):
            alike.setdefault(one[1:], []).append(one)
        for requests in alike.values():
            for part in self._parts(sorted(requests, key=lambda one: -len(one.prompt))):
                self._texts |= zip(part, self._written(part), strict=True)
                self.progress(len(part))
        return [self._texts[one][answerer] for one in wanted]

    @staticmethod
    def _new(wanted: Sequence[Request], known: dict[Request, Found]) -> list[Request]:
        return [one for one in dict.fromkeys(wanted) if one not in known]

    def _parts(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        size = self.batch_size or len(requests) or 1
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    @torch.no_grad()
    def _read(self, part: Sequence[Continuation]) -> list[list[Likelihood]]:
        """[continuation][answerer]"""
        agents = self.ensemble.agents
        samples = [
            Sample(torch.tensor(one.ids), torch.arange(len(one.ids)) >= len(one.ids) - one.num_scored)
            for one in part
        ]
        head = agents.head()
        states = token_states(agents, self.members, samples)
        found = predict(
            (chunk for state in states for chunk in state.chunks(head)),
            self.answerers,
            self.members,
            [[answerer.temperature] for answerer in self.answerers],
            len(part),
        )
        return [
            [
                Likelihood(float(rows[n].log_prob_N.double().sum()), bool(rows[n].is_top_N.all()))
                for (rows,) in found
            ]
            for n in range(len(part))
        ]

    def _written(self, part: Sequence[TextRequest]) -> list[list[str]]:
        """[request][answerer], of requests that differ in their prompts alone."""
        answers = generate(
            self.ensemble.agents,
            self.answerers,
            [one.prompt for one in part],
            max_new_tokens=part[0].max_new_tokens,
            end_ids={self.end_id},
            temperature=part[0].temperature,
            top_p=part[0].top_p,
            stop=part[0].stop,
            tokenizer=self.ensemble.tokenizer,
            prompts_per_wave=self.batch_size,
        )
        return [[own[n].text for own in answers] for n in range(len(part))]
