"""Log-probabilities of given answers under many members, in one pass over the rows of all of them.

Full logits never exist at once: the head runs over a chunk of tokens at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.collectives import on_every_process
from chorus.data.batches import Batch, Sample, collate
from chorus.ensemble.lanes import Lane, Member, lanes_of
from chorus.errors import InputError, RunError
from chorus.model.agents import Agents
from chorus.model.base import Head, positions_of
from chorus.model.token_nll import CHUNK_ELEMENTS, token_nll
from chorus.progress import announced

TOKENS_PER_PASS = {"cuda": 32_768, "cpu": 2_048}  # over the rows of all members; padding counts


@torch.no_grad()
def token_log_probs(
    agents: Agents, members: Sequence[Member], samples: Sequence[Sample], tokens_per_pass: int | None = None
) -> list[Tensor]:
    """Each sample's target tokens under every member, teacher-forced.

    Args:
        agents: in evaluation mode, of any mode.
        members: agents; None is the base without an adapter.
        samples: of any lengths; those of similar length share a pass.
        tokens_per_pass: the most rows x tokens of one pass, over all members; None is what suits the device.

    Returns:
        log_prob_MT of each sample, on the CPU: fp32, nats, the targets in their order.

    Raises:
        InputError: a sample has more tokens than the base has positions.
    """
    lanes = lanes_of(agents, members)
    found: list[Tensor] = [torch.empty(0)] * len(samples)
    lengths = [len(sample.ids) - 1 for sample in samples]
    _check_positions(agents, lengths)
    for indices in passes(agents, len(members), lengths, tokens_per_pass):
        batch = collate([samples[index] for index in indices], pad_id=0).to(_device(agents))
        nll_MBT = _nll(agents, lanes, batch).cpu()
        mask_BT = batch.mask_BT.cpu()
        for row, index in enumerate(indices):
            found[index] = -nll_MBT[:, row, mask_BT[row]]
    return found


class Choices(NamedTuple):
    """A question and what may be answered, as token ids; every choice has one token at least."""

    prompt_ids: Sequence[int]
    choice_ids: Sequence[Sequence[int]]


@torch.no_grad()
def choice_log_probs(
    agents: Agents,
    members: Sequence[Member],
    questions: Sequence[Choices],
    tokens_per_pass: int | None = None,
    after_pass: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """The log-likelihood of every choice under every member: the sum over its tokens, given the prompt.

    Choices with a common beginning share a row where possible: a question whose choices have one token each
    takes one row.

    Returns:
        log_prob_MC of each question, on the CPU: fp32, nats.

    Raises:
        InputError: a question with a choice has more tokens than the base has positions.
    """
    lanes = lanes_of(agents, members)
    counts = [len(question.choice_ids) for question in questions]
    first_of = [0, *accumulate(counts)]  # each question's first column
    total_MC = torch.zeros(len(members), first_of[-1])
    rows, wanted = _rows_of_choices(questions)
    lengths = list(map(len, rows))
    _check_positions(agents, lengths)
    for indices in passes(agents, len(members), lengths, tokens_per_pass, after_pass):
        length = max(len(rows[index]) for index in indices)
        ids_BT = torch.tensor([[*rows[index], *[0] * (length - len(rows[index]))] for index in indices])
        hidden_MBTD = hidden_states(agents, lanes, ids_BT.to(_device(agents)))
        places = [(row, *want) for row, index in enumerate(indices) for want in wanted[index]]
        at = [(row, place) for row, place, *_ in places]
        positions = list(dict.fromkeys(at))
        row_N, place_N = (
            torch.tensor(part, device=hidden_MBTD.device) for part in zip(*positions, strict=True)
        )
        number = {position: n for n, position in enumerate(positions)}
        which_Q = torch.tensor([number[position] for position in at])
        token_Q = torch.tensor([token for *_, token in places])
        log_prob_MQ = _log_probs_at(hidden_MBTD[:, row_N, place_N], agents.head(), which_Q, token_Q)
        column_Q = torch.tensor([first_of[question] + choice for _, _, question, choice, _ in places])
        total_MC.index_add_(1, column_Q, log_prob_MQ)
    return list(total_MC.split(counts, 1))


def _check_positions(agents: Agents, lengths: Sequence[int]) -> None:
    """Learned positions beyond the last one would be an index error, on a GPU one that ends the process."""
    positions, longest = positions_of(agents.config), max(lengths, default=0)
    if positions is not None and longest > positions:
        raise InputError(
            f"a row has {longest} tokens, its answer included, and the base has {positions} positions; "
            "shorten it, or lower key 'max_seq_length'"
        )


def _rows_of_choices(
    questions: Sequence[Choices],
) -> tuple[list[list[int]], list[list[tuple[int, int, int, int]]]]:
    """The rows to read, and for each what is wanted of it:
    (position, question, choice, token that follows there)."""
    rows: list[list[int]] = []
    wanted: list[list[tuple[int, int, int, int]]] = []
    for number, (prompt_ids, choice_ids) in enumerate(questions):
        row_of: dict[tuple[int, ...], int] = {}
        for choice in sorted(
            range(len(choice_ids)), key=lambda choice: len(choice_ids[choice]), reverse=True
        ):
            own = tuple(choice_ids[choice])
            if own[:-1] not in row_of:  # the row of a longer choice with this beginning covers it
                for end in range(len(own)):
                    row_of.setdefault(own[:end], len(rows))
                rows.append([*prompt_ids, *own[:-1]])
                wanted.append([])
            row = row_of[own[:-1]]
            wanted[row] += [(len(prompt_ids) + n - 1, number, choice, token) for n, token in enumerate(own)]
    return rows, wanted


def _log_probs_at(hidden_MND: Tensor, head: Head, which_Q: Tensor, token_Q: Tensor) -> Tensor:
    """log_prob_MQ, on the CPU, of tokens `token_Q` after the positions `which_Q` of N."""
    M, N, _ = hidden_MND.shape
    found_MQ = torch.empty(M, len(which_Q))
    chunk = max(1, CHUNK_ELEMENTS // len(head.weight_VD) // M)
    for start in range(0, N, chunk):
        log_prob_MNV = head.logits(hidden_MND[:, start : start + chunk]).log_softmax(-1)
        (column_Q,) = torch.where((which_Q >= start) & (which_Q < start + chunk))
        place_Q, token = (
            (which_Q[column_Q] - start).to(hidden_MND.device),
            token_Q[column_Q].to(hidden_MND.device),
        )
        found_MQ[:, column_Q] = log_prob_MNV[:, place_Q, token].cpu()
    return found_MQ


def _nll(agents: Agents, lanes: Sequence[Lane], batch: Batch) -> Tensor:
    """nll_MBT, fp32, 0 where no loss is due."""
    hidden_MBTD = hidden_states(agents, lanes, batch.input_BT)
    M, B, T, _ = hidden_MBTD.shape
    first_M = torch.arange(M, device=hidden_MBTD.device) * (B * T)
    rows_N = (first_M[:, None] + batch.target_rows_N).flatten()
    nll_NT = token_nll(hidden_MBTD.flatten(0, 1), batch.target_BT.repeat(M, 1), rows_N, agents.head())
    return nll_NT.view(M, B, T)


def hidden_states(agents: Agents, lanes: Sequence[Lane], ids_BT: Tensor) -> Tensor:
    """hidden_MBTD after the final norm. Padding is on the right, behind everything that is read."""
    parts, groups = [], []
    for lane in lanes:
        G = len(lane.groups)
        with lane.trunk(G * len(ids_BT), ids_BT.shape[1]) as trunk:
            hidden_NTD = trunk(input_ids=ids_BT.repeat(G, 1), use_cache=False).last_hidden_state
        parts.append(hidden_NTD.unflatten(0, (G, -1)))
        groups += lane.groups
    return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.tensor(groups).argsort()]


def passes(
    agents: Agents,
    num_members: int,
    lengths: Sequence[int],
    tokens_per_pass: int | None,
    after_pass: Callable[[], object] = lambda: None,
) -> Iterator[list[int]]:
    """Indices of rows of similar length, longest first, up to the allowed number of tokens in a pass.

    `after_pass` is called when the caller is done with them.
    """
    most = tokens_per_pass or TOKENS_PER_PASS["cuda" if _device(agents).type == "cuda" else "cpu"]
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    start = 0
    while start < len(by_length):
        count = max(1, most // (num_members * max(1, lengths[by_length[start]])))
        yield by_length[start : start + count]
        after_pass()
        start += count


def _device(agents: Agents) -> torch.device:
    return next(agents.parameters()).device


@announced("checking the agents' answers")
def refuse_non_finite_answers(agents: Agents, samples: Sequence[Sample]) -> None:
    """Refuse agents whose NLL of these rows is not finite. A collective call.

    Finite weights do not suffice: large ones overflow in the forward pass.

    Raises:
        RunError: on every process alike, where an agent's NLL is NaN or infinite.
    """
    was_training = agents.training
    agents.eval()
    log_prob_MN = torch.cat(token_log_probs(agents, agents.agents, samples), 1)
    agents.train(was_training)
    bad = [
        agent for agent, own_N in zip(agents.agents, log_prob_MN, strict=True) if not own_N.isfinite().all()
    ]

    def refuse() -> None:
        if bad:
            raise RunError(
                f"agent{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}: the loss on training rows is not "
                "finite (NaN or Inf), so the agents were not exported; lower lr and start over with "
                "resume_from_checkpoint=null"
            )

    on_every_process(refuse)
