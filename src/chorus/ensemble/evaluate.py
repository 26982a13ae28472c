"""How well the base, each agent and their mixture do on held-out problems: exact match and token NLL."""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from accelerate.utils import gather_object
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chorus.data.batches import collate
from chorus.data.rows import HeldOutRow, HeldOutRows
from chorus.ensemble.answers import answer_text, is_exact, warn_of_long_references
from chorus.ensemble.generate import generate
from chorus.ensemble.mixture import dirichlet_weights, mixture_log_prob, uniform_weights
from chorus.model.agents import Agents

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Score(NamedTuple):
    """Of one answerer: the share of problems answered exactly, and the mean NLL of a completion token in nats."""

    exact_match: float
    nll: float


class Evaluation(NamedTuple):
    """Scores of the base, of each agent in order, and of their mixture, with the mixture's weights."""

    base: Score
    agents: list[Score]
    mixture: Score
    weights: list[float]
    num_problems: int

    def scores(self) -> dict[str, Score]:
        """Each answerer's score under the name a reader knows it by."""
        even = len(set(self.weights)) == 1
        mixture = "mean of agents" if even else "mixture " + " ".join(f"{weight:.2f}" for weight in self.weights)
        own = {f"agent {agent}": score for agent, score in enumerate(self.agents)}
        return {"base": self.base, **own, mixture: self.mixture}

    def report(self) -> dict[str, dict[str, float]]:
        """The scores as plain numbers, for JSON; empty where there was no problem to score."""
        return {name: score._asdict() for name, score in self.scores().items()} if self.num_problems else {}


class HeldOut(NamedTuple):
    """This process's share of the held-out rows, and how they are to be scored."""

    rows: list[HeldOutRow]
    end_ids: list[int]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_new_tokens: int


def held_out_share(
    held_out: HeldOutRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
    process_index: int,
    num_processes: int,
) -> HeldOut:
    """Every `num_processes`-th of the rows."""
    rows, end_ids = held_out
    warn_of_long_references([row.answer for row in rows], end_ids, max_new_tokens)
    return HeldOut(rows[process_index::num_processes], end_ids, tokenizer, batch_size, max_new_tokens)


def evaluate(agents: Agents, held_out: HeldOut, alpha: float | None) -> Evaluation:
    """Score every answerer; a collective call, with the same result on every process.

    Args:
        alpha: None mixes the agents evenly; a number fits the mixture's weights to the held-out tokens under a
            symmetric Dirichlet prior, see `aggregate.dirichlet_weights`.
    """
    members: list[int | None] = [None, *agents.agents]
    if held_out.rows:
        logger.info("scoring the base, %d agents and their mixture on held-out problems", len(agents.agents))
    was_training = agents.training
    agents.eval()
    device = next(agents.parameters()).device
    # Scored where the model is, joined on the CPU: every process needs all tokens to fit the weights.
    nll_MN = torch.cat(gather_object([token_nlls(agents, members, held_out, device).cpu()]), 1)
    nll_KN = nll_MN[1:]
    weight_K = uniform_weights(len(nll_KN)) if alpha is None else dirichlet_weights(-nll_KN, alpha)
    mixture_N = -mixture_log_prob(-nll_KN, weight_K)
    nlls = [*nll_MN.mean(1).tolist(), mixture_N.mean().item()]
    one = torch.ones(1, device=device)
    answerers = [([member], one) for member in members] + [(list(agents.agents), weight_K.to(device))]
    right_AP = gather_object([[exact_matches(agents, who, weight, held_out) for who, weight in answerers]])
    matches = [sum(map(sum, rights)) / max(1, sum(map(len, rights))) for rights in zip(*right_AP, strict=True)]
    agents.train(was_training)
    base, *own, mixture = map(Score, matches, nlls)
    return Evaluation(base, own, mixture, weight_K.tolist(), num_problems=sum(len(rights[0]) for rights in right_AP))


@torch.no_grad()
def token_nlls(agents: Agents, members: Sequence[int | None], held_out: HeldOut, device: torch.device) -> Tensor:
    """nll_MN, fp32, nats: for each member, of every target token of this process's held-out rows."""
    parts = [torch.empty(len(members), 0, device=device)]
    for samples in _batches([row.sample for row in held_out.rows], held_out.batch_size):
        batch = collate(samples, pad_id=0).to(device)
        nll_MBT = torch.stack([agents.agent_pass(member, batch)[0] for member in members])
        parts.append(nll_MBT[:, batch.mask_BT])
    return torch.cat(parts, 1)


def exact_matches(agents: Agents, members: list[int | None], weight_K: Tensor, held_out: HeldOut) -> list[bool]:
    """For each of this process's problems, whether the greedy answer of the members' mixture is exactly right."""
    tokenizer, end_ids = held_out.tokenizer, held_out.end_ids
    right = []
    for rows in _batches(held_out.rows, held_out.batch_size):
        prompts = [row.prompt for row in rows]
        answers = generate(agents, members, weight_K, prompts, held_out.max_new_tokens, end_ids[0])
        for written, row in zip(answers, rows, strict=True):
            right.append(is_exact(*(answer_text(ids, tokenizer, end_ids) for ids in (written, row.answer))))
    return right


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def evaluation_table(before: Evaluation, after: Evaluation) -> Table:
    """Exact match and NLL (nats a completion token) of every answerer, before and after training."""
    if not after.num_problems:
        return Table("no held-out problems, nothing scored")
    table = Table(title=f"{after.num_problems} held-out problems")
    table.add_column("")
    for name in ("exact match before", "after", "NLL before", "after"):
        table.add_column(name, justify="right")
    for (name, now), was in zip(after.scores().items(), before.scores().values(), strict=True):
        table.add_row(name, f"{was.exact_match:.1%}", f"{now.exact_match:.1%}", f"{was.nll:.4f}", f"{now.nll:.4f}")
    return table
