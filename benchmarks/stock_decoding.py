"""What decoding is compared with: members one after the other,
and transformers' generate of one merged adapter."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from timing import wait
from torch import Tensor
from transformers import PreTrainedModel

from chorus.model.agents import Agents


@torch.no_grad()
def one_after_the_other(
    agents: Agents, prompts: Sequence[Sequence[int]], new_tokens: int, device: torch.device
) -> float:
    """Seconds in which the base, each agent and the mixture answer, each alone, a pass a member and token."""
    answerers: list[tuple[int | None, ...]] = [(None,), *((k,) for k in agents.agents), agents.agents]
    length = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask_BT = torch.tensor(
        [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    for members in ([(None,)], answerers):  # the first is the warm-up
        wait(device)
        begun = time.perf_counter()
        for own in members:
            _answer(agents, own, ids_BT, mask_BT, new_tokens if members is answerers else 2)
        wait(device)
    return time.perf_counter() - begun


def _answer(
    agents: Agents, members: Sequence[int | None], ids_BT: Tensor, mask_BT: Tensor, new_tokens: int
) -> None:
    caches: list[Any] = [None] * len(members)
    for _ in range(new_tokens):
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        log_probs = []
        for index, member in enumerate(members):
            with agents.trunk(member) as trunk:
                output = trunk(
                    input_ids=ids_BT,
                    attention_mask=mask_BT,
                    position_ids=position_BT,
                    past_key_values=caches[index],
                    use_cache=True,
                )
            caches[index] = output.past_key_values
            log_probs.append(agents.head().logits(output.last_hidden_state[:, -1]).log_softmax(-1))
        ids_BT = torch.stack(log_probs).logsumexp(0).argmax(-1)[:, None]
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], 1)
        bool(ids_BT.sum() < 0)  # every token was looked at for an end


def stock_ms_per_token(
    base: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, device: torch.device
) -> dict[str, float]:
    """transformers' generate with a static cache, which it compiles on a GPU; prompts of one length.

    A merged adapter leaves the base's own shapes, so the base stands for it.
    """
    ids_BT = torch.tensor(list(prompts), device=device)
    base.eval()
    seconds = []
    for tokens in (17, new_tokens + 17, 17, new_tokens + 17):
        wait(device)
        begun = time.perf_counter()
        base.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        wait(device)
        seconds.append(time.perf_counter() - begun)
    ms = 1000 * (seconds[3] - seconds[2]) / new_tokens
    return {"ms_per_token": ms, "whole_seconds": seconds[3], "first_seconds": seconds[0]}
