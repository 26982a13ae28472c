"""How the tokens of a batch of texts are drawn: each text's uniform random numbers, temperature and top-p."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from chorus.ensemble.next_token import Answerer, Draws, uniforms
from chorus.ensemble.texts import Text


@dataclass
class DrawingPlan:
    """Of X texts, each with numbers for N tokens.

    Attributes:
        drawn_X: tokens that each text has so far.
        is_drawn: whether any text is drawn, which needs the whole distribution of every text.
        is_cut: whether any has top_p below 1, which needs a sort of the vocabulary.
        num_tops: how many of the most probable tokens are named.
    """

    uniform_XN: Tensor
    temperature_X: Tensor
    top_p_X: Tensor
    drawn_X: Tensor
    is_drawn: bool
    is_cut: bool
    num_tops: int

    @staticmethod
    def of(
        answerers: Sequence[Answerer], texts: Sequence[Text], count: int, device: torch.device
    ) -> "DrawingPlan":
        """The plan of these texts, for up to `count` tokens each."""
        samplings = [text.sampling for text in texts]
        is_drawn = any(one.temperature > 0 for one in samplings)
        rows = [_uniforms(answerers, text, count + 1) for text in texts] if is_drawn else []
        uniform_XN = torch.stack(rows) if rows else torch.empty(len(texts), 0, dtype=torch.float64)
        temperature_X = torch.tensor([one.temperature for one in samplings], dtype=torch.float64)
        top_p_X = torch.tensor([one.top_p for one in samplings], dtype=torch.float64)
        return DrawingPlan(
            *(uniform_XN.to(device), temperature_X.to(device), top_p_X.to(device)),
            torch.zeros(len(texts), dtype=torch.int64, device=device),
            is_drawn,
            any(one.temperature > 0 and one.top_p < 1 for one in samplings),
            max(text.num_tops for text in texts),
        )

    def draws(self) -> Draws | None:
        """The next token's; None where every text takes its most probable token."""
        if not self.is_drawn:
            return None
        uniform_X = self.uniform_XN.gather(1, self.drawn_X[:, None])[:, 0]
        return Draws(uniform_X, self.temperature_X, self.top_p_X if self.is_cut else None)

    def count(self) -> None:
        """Advance every text by one token. One that has ended advances too, without random numbers."""
        self.drawn_X.add_(1)
        if self.is_drawn:
            self.drawn_X.clamp_(max=self.uniform_XN.shape[1] - 1)

    def covers(self, other: "DrawingPlan") -> bool:
        """Whether this plan already computes everything that texts of the other plan need."""
        is_wide = self.is_drawn >= other.is_drawn and self.is_cut >= other.is_cut
        return is_wide and self.num_tops >= other.num_tops

    def widen(self, other: "DrawingPlan") -> None:
        """From now on also compute what texts of the other plan need; both then have equally many numbers."""
        self.is_drawn |= other.is_drawn
        self.is_cut |= other.is_cut
        self.num_tops = max(self.num_tops, other.num_tops)
        width = max(self.uniform_XN.shape[1], other.uniform_XN.shape[1])
        for plan in (self, other):
            if plan.uniform_XN.shape[1] < width:
                plan.uniform_XN = pad(plan.uniform_XN, (0, width - plan.uniform_XN.shape[1]))

    def put(self, to_X: Tensor, other: "DrawingPlan", from_X: Tensor) -> None:
        """Put texts of another plan in the place of these, in the same tensors."""
        for own, new in zip(self._tensors(), other._tensors(), strict=True):
            own[to_X] = new[from_X]

    def chosen(self, index_X: Tensor, other: "DrawingPlan | None") -> "DrawingPlan":
        """The plan of chosen texts; those of `other` are counted after these."""
        tensors = self._tensors()
        if other is not None:
            tensors = [torch.cat(pair) for pair in zip(tensors, other._tensors(), strict=True)]
        uniform_XN, temperature_X, top_p_X, drawn_X = (one[index_X] for one in tensors)
        needs = (self.is_drawn, self.is_cut, self.num_tops)
        return DrawingPlan(uniform_XN, temperature_X, top_p_X, drawn_X, *needs)

    def _tensors(self) -> list[Tensor]:
        return [self.uniform_XN, self.temperature_X, self.top_p_X, self.drawn_X]


def _uniforms(answerers: Sequence[Answerer], text: Text, count: int) -> Tensor:
    """The text's random numbers; zeros beyond its limit, where drawn tokens are discarded."""
    temperature, _, seed, number = text.sampling
    own = min(count, text.ending.max_new_tokens)
    if temperature == 0:
        return torch.zeros(count, dtype=torch.float64)
    return pad(uniforms(seed, answerers[text.answerer].name, number, own), (0, count - own))
