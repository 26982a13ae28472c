"""The members' predictive distributions: of every token of given answers, or over the choices of a question.

Logits of all tokens never exist at once. Hidden states are kept, and a chunk's logits are computed when it is
read; a fit with several passes pays only for the head.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.data.batches import collate
from chorus.data.samples import Sample
from chorus.ensemble.lanes import Member, lanes_of
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.scoring import Choices, choice_log_probs, hidden_states, passes
from chorus.ensemble.uncertainty import Predictions, predictions
from chorus.model.agents import Agents
from chorus.model.base import Head
from chorus.model.token_nll import CHUNK_ELEMENTS


class Chunk(NamedTuple):
    """Distributions of M members over N outcomes.

    Attributes:
        log_prob_MNV: over V outcomes, normalised, fp32.
        target_N: the actual outcomes.
        row_N: the row of each, on the CPU.
    """

    log_prob_MNV: Tensor
    target_N: Tensor
    row_N: Tensor


Chunks = Callable[[], Iterator[Chunk]]  # each call iterates over all of them again


class TokenStates(NamedTuple):
    """hidden_MND after the final norm, before each of N target
    tokens, for M members; see `Chunk` for the others."""

    hidden_MND: Tensor
    target_N: Tensor
    row_N: Tensor

    def chunks(self, head: Head) -> Iterator[Chunk]:
        """Their distributions over the vocabulary."""
        size = max(1, CHUNK_ELEMENTS // (len(self.hidden_MND) * len(head.weight_VD)))
        for start in range(0, len(self.target_N), size):
            part = slice(start, start + size)
            log_prob_MNV = head.logits(self.hidden_MND[:, part]).log_softmax(-1)
            yield Chunk(log_prob_MNV, self.target_N[part], self.row_N[part])


@torch.no_grad()
def token_states(
    agents: Agents,
    members: Sequence[Member],
    samples: Sequence[Sample],
    after_pass: Callable[[], object] = lambda: None,
) -> Iterator[TokenStates]:
    """Pass by pass, the states before the target tokens of all samples, under every member."""
    lanes = lanes_of(agents, members)
    device = next(agents.parameters()).device
    lengths = [len(sample.ids) - 1 for sample in samples]
    for indices in passes(agents, len(members), lengths, None, after_pass):
        batch = collate([samples[index] for index in indices], pad_id=0).to(device)
        hidden_MND = hidden_states(agents, lanes, batch.input_BT).flatten(1, 2)[:, batch.target_rows_N]
        row_N = torch.tensor(indices)[batch.target_rows_N.cpu() // batch.input_BT.shape[1]]
        yield TokenStates(hidden_MND, batch.target_BT.flatten()[batch.target_rows_N], row_N)


def token_chunks(
    agents: Agents,
    members: Sequence[Member],
    samples: Sequence[Sample],
    after_pass: Callable[[], object] = lambda: None,
) -> Chunks:
    """The target tokens of all samples, read once; their hidden states are kept."""
    states = list(token_states(agents, members, samples, after_pass))
    head = agents.head()
    return lambda: (chunk for state in states for chunk in state.chunks(head))


def choice_chunks(
    agents: Agents,
    members: Sequence[Member],
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    targets: Sequence[int],
    after_pass: Callable[[], object] = lambda: None,
) -> Chunks:
    """One distribution a question, over the same choices for
    all: their likelihoods, normalised over the choices."""
    questions = [Choices(prompt, choices) for prompt in prompts]
    found = choice_log_probs(agents, members, questions, after_pass=after_pass) if questions else []
    if not found:
        return lambda: iter(())
    log_prob_MNV = torch.stack(found, 1).log_softmax(-1)
    chunk = Chunk(log_prob_MNV, torch.tensor(targets), torch.arange(len(questions)))
    return lambda: iter([chunk])


@torch.no_grad()
def predict(
    chunks: Iterator[Chunk],
    answerers: Sequence[Answerer],
    members: Sequence[Member],
    temperatures_A: Sequence[Sequence[float]],
    num_rows: int,
) -> list[list[list[Predictions]]]:
    """What every answerer predicts, at each of its temperatures, of every row.

    Args:
        members: of the chunks, in order; an answerer's are among them.

    Returns:
        [answerer][temperature][row], on the CPU, the outcomes of a row in their order.
    """
    place = {member: index for index, member in enumerate(members)}
    parts: list[list[list[Tensor]]] = [[[] for _ in temperatures] for temperatures in temperatures_A]
    rows = []
    for log_prob_MNV, target_N, row_N in chunks:
        rows.append(row_N)
        for index, answerer in enumerate(answerers):
            own = log_prob_MNV[[place[member] for member in answerer.members]]
            weight_K = torch.tensor(answerer.weights, device=own.device)
            found = predictions(own, weight_K, target_N, temperatures_A[index])
            for kept, figures in zip(parts[index], found, strict=True):
                kept.append(torch.stack([figure_N.float() for figure_N in figures]).cpu())
    row_N = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    counts = row_N.bincount(minlength=num_rows).tolist()
    order_N = row_N.argsort(stable=True)
    return [
        [[Predictions(*figures_6N) for figures_6N in _by_row(kept, order_N, counts)] for kept in of_answerer]
        for of_answerer in parts
    ]


def _by_row(kept: list[Tensor], order_N: Tensor, counts: list[int]) -> Sequence[Tensor]:
    figures_6N = torch.cat(kept, 1)[:, order_N] if kept else torch.empty(len(Predictions._fields), 0)
    return figures_6N.split(counts, 1)
