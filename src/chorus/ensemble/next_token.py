"""The next token of every text: the most probable one, or one drawn with temperature and top-p."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.ensemble.lanes import Member
from chorus.model.agents import Agents
from chorus.model.base import Head
from chorus.model.kernels.mixture_kernel import chosen_log_probs, mixture_statistics
from chorus.seeding import derive_seed


class Answerer(NamedTuple):
    """Who answers: a member alone, or a mixture of members.

    Attributes:
        name: of the answerer, and of its random draws.
        members: agents; None is the base without an adapter.
        weights: of the members' probabilities, summing to 1.
        temperature: of the mixture, after pooling: p^(1/temperature), normalised.
    """

    name: str
    members: tuple[Member, ...]
    weights: tuple[float, ...] = (1.0,)
    temperature: float = 1.0


class Choice(NamedTuple):
    """The next token of X texts and what is to be said of it; see `decode.Answer`.

    member_log_prob_R has a number for every row of the batch, that is for every text and member.
    """

    token_X: Tensor
    log_prob_X: Tensor
    entropy_X: Tensor
    mutual_information_X: Tensor
    member_log_prob_R: Tensor


@dataclass(frozen=True)
class NextTokenRule:
    """How next tokens are chosen.

    Attributes:
        weights: of each answerer's members, on the device.
        head: of the base.
        temperature: 0 takes the most probable token.
        top_p: see `draw`.
    """

    answerers: tuple[Answerer, ...]
    weights: tuple[Tensor, ...]
    head: Head
    temperature: float
    top_p: float

    def choose(self, logits_RV: Tensor, texts_A: Sequence[int], uniform_X: Tensor | None) -> Choice:
        """The next token of every text.

        Args:
            logits_RV: the head's output. Rows lie answerer by answerer, then member by member, then text by
            text.
            texts_A: texts of each answerer.
            uniform_X: see `draw`; None where the most probable token is taken.
        """
        parts, row, text = [], 0, 0
        for count, index in self._runs():
            answerer, texts = self.answerers[index], sum(texts_A[index : index + count])
            K = len(answerer.members)
            if texts == 0:
                continue
            logits_KNV = logits_RV[row : row + K * texts].unflatten(0, (K, texts))
            uniform_N = None if uniform_X is None else uniform_X[text : text + texts]
            parts.append(self._choose(logits_KNV, self.weights[index], answerer.temperature, uniform_N))
            row, text = row + K * texts, text + texts
        return Choice(*map(torch.cat, zip(*parts, strict=True)))

    def _runs(self) -> Iterator[tuple[int, int]]:
        """How many answerers from which on are handled together:
        neighbours of one member each are, as one batch."""
        index = 0
        while index < len(self.answerers):
            count = 1
            while _is_plain(self.answerers[index]) and index + count < len(self.answerers):
                if not _is_plain(self.answerers[index + count]):
                    break
                count += 1
            yield count, index
            index += count

    def _choose(
        self, logits_KNV: Tensor, weight_K: Tensor, temperature: float, uniform_N: Tensor | None
    ) -> Choice:
        how = {"temperature": temperature, "softcap": self.head.softcap, "scale": self.head.scale}
        statistics = mixture_statistics(logits_KNV, weight_K, **how, want_log_prob=uniform_N is not None)
        token_N, log_prob_N, member_KN = statistics[:3]
        if uniform_N is not None:
            assert statistics.log_prob_NV is not None
            token_N = draw(statistics.log_prob_NV, uniform_N, self.temperature, self.top_p)
            norms = (statistics.log_norm_KN, statistics.log_partition_N)
            log_prob_N, member_KN = chosen_log_probs(logits_KNV, token_N, weight_K, *norms, **how)
        return Choice(
            token_N, log_prob_N, statistics.entropy_N, statistics.mutual_information_N, member_KN.flatten()
        )


def next_token_rule(
    agents: Agents, answerers: Sequence[Answerer], temperature: float = 0.0, top_p: float = 1.0
) -> NextTokenRule:
    """The rule for these answerers.

    Raises:
        ValueError: weights that are not one a member or do not sum to 1, or a number out of its range.
    """
    for answerer in answerers:
        if len(answerer.weights) != len(answerer.members) or abs(sum(answerer.weights) - 1) > 1e-4:
            raise ValueError(
                f"{answerer.name}: weights {answerer.weights} of {len(answerer.members)} members"
            )
        if not answerer.temperature > 0:
            raise ValueError(f"{answerer.name}: temperature {answerer.temperature} is not above 0")
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} must be 0 or more, top_p {top_p} above 0 and at most 1")
    device = next(agents.parameters()).device
    weights = [torch.tensor(answerer.weights, device=device) for answerer in answerers]
    return NextTokenRule(tuple(answerers), tuple(weights), agents.head(), temperature, top_p)


def _is_plain(answerer: Answerer) -> bool:
    return len(answerer.members) == 1 and answerer.temperature == 1


def draw(log_prob_NV: Tensor, uniform_N: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token of each of N distributions, by inversion of its cumulative distribution.

    Args:
        log_prob_NV: natural logarithms.
        uniform_N: numbers from [0, 1), which decide the draw: the same on every device.
        temperature: above 0; the distribution is p^(1/temperature), normalised.
        top_p: above 0; the draw is from the fewest most probable tokens that hold this much probability
            together (Holtzman et al. 2020), 1 is all.
    """
    prob_NV = (log_prob_NV.double() / temperature).softmax(-1)
    order_NV = None
    if top_p < 1:
        prob_NV, order_NV = prob_NV.sort(dim=-1, descending=True, stable=True)
        before_NV = prob_NV.cumsum(-1) - prob_NV
        prob_NV = prob_NV.masked_fill(before_NV >= top_p, 0)
    sum_NV = prob_NV.cumsum(-1)
    target_N1 = uniform_N[:, None] * sum_NV[:, -1:]
    place_N1 = torch.searchsorted(sum_NV, target_N1, right=True)
    return (place_N1 if order_NV is None else order_NV.gather(-1, place_N1))[:, 0]


def uniforms(seed: int, answerer: str, prompt: int, count: int) -> Tensor:
    """The numbers that decide one answer's draws: they do not depend on what else is answered beside it."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "sampled tokens", answerer, prompt))
    return torch.rand(count, generator=generator, dtype=torch.float64)
