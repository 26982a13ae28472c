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
    """The next token of X texts, with its statistics; see `texts.Answer`.

    member_log_prob_R has one number for every row of the batch, that is for every text and member. The last
    two have N columns, the most probable tokens; 0 columns where they are not wanted.
    """

    token_X: Tensor
    log_prob_X: Tensor
    entropy_X: Tensor
    mutual_information_X: Tensor
    member_log_prob_R: Tensor
    top_token_XN: Tensor
    top_log_prob_XN: Tensor


class Draws(NamedTuple):
    """How the next token of each of X texts is drawn; see `draw`.

    Attributes:
        temperature_X: 0 takes the most probable token.
        top_p_X: None where it is 1 for all texts, which saves a sort of the vocabulary.
    """

    uniform_X: Tensor
    temperature_X: Tensor
    top_p_X: Tensor | None

    def part(self, texts: slice) -> "Draws":
        """Those of some texts."""
        return Draws(*(None if one is None else one[texts] for one in self))  # pyright: ignore


@dataclass(frozen=True)
class NextTokenRule:
    """How next tokens are chosen.

    Attributes:
        weights: of each answerer's members, on the device.
        head: of the base.
    """

    answerers: tuple[Answerer, ...]
    weights: tuple[Tensor, ...]
    head: Head

    def choose(
        self, logits_RV: Tensor, texts_A: Sequence[int], draws: Draws | None, num_tops: int = 0
    ) -> Choice:
        """The next token of every text.

        Args:
            logits_RV: the head's output. Rows lie answerer by answerer, then member by member, then text by
            text.
            texts_A: texts of each answerer.
            draws: None where every text takes its most probable token.
            num_tops: how many of the most probable tokens are named.
        """
        parts, row, text = [], 0, 0
        for count, index in self._runs():
            answerer, texts = self.answerers[index], sum(texts_A[index : index + count])
            K = len(answerer.members)
            if texts == 0:
                continue
            logits_KNV = logits_RV[row : row + K * texts].unflatten(0, (K, texts))
            own = None if draws is None else draws.part(slice(text, text + texts))
            parts.append(self._choose(logits_KNV, self.weights[index], answerer.temperature, own, num_tops))
            row, text = row + K * texts, text + texts
        return Choice(*map(torch.cat, zip(*parts, strict=True)))

    def _runs(self) -> Iterator[tuple[int, int]]:
        """(count, first index) of answerers that are handled together: consecutive ones with one member
        each.
        """
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
        self, logits_KNV: Tensor, weight_K: Tensor, temperature: float, draws: Draws | None, num_tops: int
    ) -> Choice:
        how = {"temperature": temperature, "softcap": self.head.softcap, "scale": self.head.scale}
        is_whole = draws is not None or num_tops > 0
        statistics = mixture_statistics(logits_KNV, weight_K, **how, want_log_prob=is_whole)
        token_N, log_prob_N, member_KN = statistics[:3]
        if draws is not None:
            assert statistics.log_prob_NV is not None
            is_drawn_N = draws.temperature_X > 0
            drawn_N = draw(
                statistics.log_prob_NV, draws._replace(temperature_X=draws.temperature_X.where(is_drawn_N, 1))
            )
            token_N = drawn_N.where(is_drawn_N, token_N)
            norms = (statistics.log_norm_KN, statistics.log_partition_N)
            log_prob_N, member_KN = chosen_log_probs(logits_KNV, token_N, weight_K, *norms, **how)
        tops = _tops(statistics.log_prob_NV, token_N, num_tops)
        figures = (log_prob_N, statistics.entropy_N, statistics.mutual_information_N, member_KN.flatten())
        return Choice(token_N, *figures, *tops)


def _tops(log_prob_NV: Tensor | None, token_N: Tensor, num_tops: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens of each distribution, with their log-probabilities, the first one first."""
    if log_prob_NV is None or num_tops == 0:
        return token_N.new_empty(len(token_N), 0), token_N.new_empty(len(token_N), 0, dtype=torch.float32)
    top = log_prob_NV.topk(min(num_tops, log_prob_NV.shape[-1]))
    return top.indices, top.values


def next_token_rule(agents: Agents, answerers: Sequence[Answerer]) -> NextTokenRule:
    """The rule for these answerers.

    Raises:
        ValueError: weights that are not one a member or do not sum to 1, or a temperature not above 0.
    """
    for answerer in answerers:
        if len(answerer.weights) != len(answerer.members) or abs(sum(answerer.weights) - 1) > 1e-4:
            raise ValueError(
                f"{answerer.name}: weights {answerer.weights} of {len(answerer.members)} members"
            )
        if not answerer.temperature > 0:
            raise ValueError(f"{answerer.name}: temperature {answerer.temperature} is not above 0")
    device = next(agents.parameters()).device
    weights = [torch.tensor(answerer.weights, device=device) for answerer in answerers]
    return NextTokenRule(tuple(answerers), tuple(weights), agents.head())


def _is_plain(answerer: Answerer) -> bool:
    return len(answerer.members) == 1 and answerer.temperature == 1


def draw(log_prob_NV: Tensor, draws: Draws) -> Tensor:
    """One token of each of N distributions, by inversion of its cumulative distribution.

    Args:
        log_prob_NV: natural logarithms.
        draws: N numbers from [0, 1), which decide the draw, the same on every device; temperatures above 0,
            by which the distribution is p^(1/temperature), normalised; and top_p above 0: the draw is from
            the fewest most probable tokens that hold this much probability together (Holtzman et al. 2020),
            1 is all.
    """
    uniform_N, temperature_N, top_p_N = draws
    prob_NV = (log_prob_NV.double() / temperature_N[:, None]).softmax(-1)
    if top_p_N is not None:
        sorted_NV, order_NV = prob_NV.sort(dim=-1, descending=True, stable=True)
        before_NV = sorted_NV.cumsum(-1) - sorted_NV
        is_out_NV = (before_NV >= top_p_N[:, None]) & (top_p_N[:, None] < 1)
        # Back in vocabulary order: a draw without top-p must not depend on top-p of other texts.
        prob_NV = prob_NV.masked_fill(torch.empty_like(is_out_NV).scatter_(-1, order_NV, is_out_NV), 0)
    sum_NV = prob_NV.cumsum(-1)
    # Rounding must not move the target beyond the last cumulative sum.
    target_N1 = (uniform_N[:, None] * sum_NV[:, -1:]).minimum(sum_NV[:, -1:] * (1 - 1e-15))
    return torch.searchsorted(sum_NV, target_N1, right=True)[:, 0]


def uniforms(seed: int, answerer: str, prompt: int, count: int) -> Tensor:
    """The uniform random numbers of one answer, independent of the other answers in the batch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "sampled tokens", answerer, prompt))
    return torch.rand(count, generator=generator, dtype=torch.float64)
