"""Greedy text from one agent, from the base, or from a mixture of agents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from chorus.ensemble.mixture import mixture_log_prob
from chorus.model.agents import Agents


@torch.no_grad()
def generate(
    agents: Agents,
    members: Sequence[int | None],
    weight_K: Tensor,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_id: int,
) -> list[list[int]]:
    """Continue each prompt with the token that the members' mixture finds most probable, until the end token.

    Args:
        agents: in evaluation mode.
        members: whose probabilities are mixed; None is the base without an adapter.
        weight_K: their weights, summing to 1.
        prompts: token ids, at least one each; of any lengths.

    Returns:
        The new tokens of each prompt, without the end token.
    """
    device = weight_K.device
    length = max(map(len, prompts))
    # Padding on the left, so that every row's next token stands in the last column.
    ids_BT = torch.tensor([[eos_id] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    caches: list[object] = [None] * len(members)
    new_BT = ids_BT[:, :0]
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
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
        next_B = mixture_log_prob(torch.stack(log_probs), weight_K).argmax(-1)
        done_B = done_B | (next_B == eos_id)
        next_B = next_B.masked_fill(done_B, eos_id)
        new_BT = torch.cat([new_BT, next_B[:, None]], 1)
        if bool(done_B.all()):
            break
        ids_BT = next_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(prompts), 1)], 1)
    return [row[: row.index(eos_id)] if eos_id in row else row for row in new_BT.tolist()]
