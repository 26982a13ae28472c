"""The baseline: K LoRA agents over one base by switching adapters, with stock PEFT and without Chorus'
layers.

Each agent's forward and backward run under its own adapter before the switch to the next: no other order
gives every agent its gradient. The agents are not coupled: that would need all of them at once.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.models.gemma2 import modeling_gemma2

from chorus.data.batches import Batch
from chorus.model.adapters import LoraShape, TensorId, adapter_name
from chorus.model.base import head_of, trunk_of
from chorus.model.token_nll import token_nll


class Switching:
    """One PeftModel whose active adapter is switched from agent to agent.

    tuned=False: the usual code, with full logits; with `recompute`, gradient checkpointing.
    tuned=True: the loss in chunks, over a base with flex attention and fused norms that the caller gives.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        shape: LoraShape,
        initial: Mapping[TensorId, Tensor],
        *,
        tuned: bool,
        recompute: bool,
    ):
        self.tuned = tuned
        self.agents = sorted({identity.agent for identity in initial})
        config = LoraConfig(
            r=shape.rank,
            lora_alpha=shape.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=list(shape.target_modules),
            task_type="CAUSAL_LM",
        )
        self.model: PeftModel = get_peft_model(base, config, adapter_name=adapter_name(0))  # pyright: ignore
        for agent in self.agents[1:]:
            self.model.add_adapter(adapter_name(agent), config)
        named = dict(self.model.named_parameters())
        self.parameters = []
        for identity, tensor in initial.items():
            name = f"{identity.path}.lora_{identity.matrix}.{adapter_name(identity.agent)}.weight"
            named[name].data.copy_(tensor)
            self.parameters.append(named[name])
        if recompute:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        is_fused = self.parameters[0].is_cuda or None
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.01, fused=is_fused)

    def step(self, batch: Batch) -> Tensor:
        """One optimiser step; the mean token NLL of each agent before it."""
        loss_K = torch.stack([self._agent(agent, batch) for agent in self.agents])
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss_K

    def _agent(self, agent: int, batch: Batch) -> Tensor:
        self.model.set_adapter(adapter_name(agent))
        loss_of = self._chunked if self.tuned else self._full
        loss = loss_of(batch)
        loss.backward()
        return loss.detach()

    def _full(self, batch: Batch) -> Tensor:
        logits_BTV = self.model(input_ids=batch.input_BT, use_cache=False).logits.float()
        return cross_entropy(logits_BTV.flatten(0, 1), batch.target_BT.flatten())

    def _chunked(self, batch: Batch) -> Tensor:
        inner: PreTrainedModel = self.model.get_base_model()  # pyright: ignore[reportAssignmentType]
        hidden_BTD = trunk_of(inner)(input_ids=batch.input_BT, use_cache=False).last_hidden_state
        return token_nll(hidden_BTD, batch.target_BT, batch.target_rows_N, head_of(inner)).mean()


def fuse_norms(base: PreTrainedModel) -> str:
    """Put Liger-Kernel's RMSNorm and GeGLU into a Gemma-2, if it is installed; a note for the table."""
    if base.device.type != "cuda":
        return "no fused norms"  # its kernels need a GPU
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_gemma2  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "no fused norms"
    with _names_kept(modeling_gemma2, "Gemma2RMSNorm", "Gemma2MLP"):
        apply: Callable = apply_liger_kernel_to_gemma2
        apply(rope=False, fused_linear_cross_entropy=False, model=base)
    return "Liger norms, GeGLU"


@contextmanager
def _names_kept(module: object, *names: str):
    """Undo what Liger also does: it replaces these classes for models made later."""
    before = {name: getattr(module, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
