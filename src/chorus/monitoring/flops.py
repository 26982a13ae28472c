"""The useful FLOP of a training step, as counted by the profiler and the benchmarks."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from chorus.data.batches import Batch


class Work(NamedTuple):
    """The sizes of a base that determine its useful FLOP.

    Attributes:
        body: weights of its linear layers, without the head.
        head: weights of the head.
        attention: heads x head width, summed over the layers.
    """

    body: int
    head: int
    attention: int

    def useful_flops(self, rows: int, length: int, targets: int) -> float:
        """FLOP of one training pass over `rows` rows (of all agents) with `targets` target tokens among them.

        Each weight takes 2 FLOP a token forward and 2 backward: the base is frozen, so it has no weight
        gradient. The head runs on target tokens only. Attention has two products over the causal half; its
        backward takes twice its forward. The adapters' own products and recomputation do not count. Padding
        is computed, so it counts.
        """
        products = 4.0 * (self.body * rows * length + self.head * targets)
        return products + 3 * (2.0 * length * length * self.attention) * rows

    def of_batch(self, batch: Batch, num_agents: int) -> float:
        """FLOP of one training pass of all agents over a batch, which lies on the CPU.

        In a packed row a token attends to its own sample only.
        """
        B, T = batch.input_BT.shape
        times = num_agents // batch.num_sets  # agents that pass through each row
        rows, targets = times * B, times * len(batch.target_rows_N)
        if batch.sample_BT is None:
            return self.useful_flops(rows, T, targets)
        row_BT = torch.arange(B)[:, None].expand(B, T)
        samples_2N = torch.stack((row_BT, batch.sample_BT))[:, batch.sample_BT >= 0]
        lengths = samples_2N.unique(dim=1, return_counts=True)[1].tolist()
        attention = sum(self._replace(body=0, head=0).useful_flops(times, length, 0) for length in lengths)
        return self._replace(attention=0).useful_flops(rows, T, targets) + attention


def work_of(model: PreTrainedModel) -> Work:
    """Counted from the frozen linear layers, so without adapters."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    # From in_features and out_features: under ZeRO-3 a sharded weight is empty.
    body = sum(
        linear.in_features * linear.out_features for linear in linears if not linear.weight.requires_grad
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim
    assert isinstance(head, nn.Linear), "a language model without a linear head"
    return Work(body, head.in_features * head.out_features, attention)
