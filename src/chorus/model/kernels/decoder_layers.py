"""How decoder layers run in training: compiled, recomputed, both or neither; and recomputed passes."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InductorError
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from chorus.config.execution import Recompute
from chorus.errors import InputError, RunError, first_line, out_of_memory
from chorus.model.adapters import AdapterRouter
from chorus.model.kernels.joined_linears import joining
from chorus.model.kernels.lora_linear import ONE, SEVERAL

logger = logging.getLogger(__name__)

CACHE_KEY = "TORCHINDUCTOR_CACHE_DIR"  # torch's own environment variable

# What selective recomputation keeps: products with the base's weights, which take nearly all of a forward
# pass's time. Attention's own products grow with the square of the length and are recomputed.
KEPT = frozenset(
    {ONE, SEVERAL, torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
)  # the latter two: linears without an adapter


@dataclass
class _Compilation:
    """The state of one model's compilation.

    Attributes:
        may_fall_back: if a layer cannot be compiled, warn, and run all layers uncompiled from then on.
        lengths: row lengths so far, in tokens.
    """

    may_fall_back: bool
    has_failed: bool = False
    lengths: set[int] = field(default_factory=set)


def prepare_layers(
    model: PreTrainedModel,
    router: AdapterRouter,
    *,
    recompute: Recompute,
    compiled: bool | str,
    may_fall_back: bool = False,
) -> None:
    """Compile each decoder layer, and recompute it in backward with the adapter context of its forward pass.

    Layers are wrapped, not the model: equal layers share one compilation. In evaluation mode the layers run
    uncompiled, because shapes change with every batch. transformers' own recomputation is not used: it is
    inside a layer's forward and would be compiled with it.

    Args:
        recompute: none of a layer; selective: all but its products with weights; full: all of it.
        may_fall_back: a layer that cannot be compiled is a warning, not an error.

    Raises:
        InputError: the architecture does not support gradient checkpointing.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for key, wanted, off in (
        ("gradient_checkpointing", recompute != "none", "none, and use_gradient_checkpointing to null"),
        ("compile", compiled, "false"),
    ):
        if wanted and not layers:
            raise InputError(f"key {key!r}: {type(model).__name__} does not support it; set it to {off}")
    if compiled or model.config._attn_implementation == "flex_attention":
        # Kinds of layers x shapes; exceeding the limit must be an error, not a silent return to uncompiled
        # code.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    if compiled:
        _keep_what_is_compiled()
    compilation = _Compilation(may_fall_back, has_failed=not compiled)
    for layer in layers:
        if compiled or recompute != "none":
            uncompiled = _in_training(layer.forward, router, recompute, False)
            in_training = _in_training(layer.forward, router, recompute, compiled) if compiled else uncompiled
            layer.forward = partial(_run, layer, layer.forward, in_training, uncompiled, compilation)


def _keep_what_is_compiled() -> None:
    """Keep inductor's code between runs: by default it is in a temporary folder."""
    folder = os.environ.setdefault(CACHE_KEY, str(Path.home() / ".cache" / "chorus" / "compiled"))
    logger.info("compiled layers are kept in %s (%s names another folder)", folder, CACHE_KEY)


def _in_training(
    plain: Callable, router: AdapterRouter, recompute: Recompute, compiled: bool | str
) -> Callable:
    # No random draw comes from the global generators, so their state need not be preserved.
    recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    backend = compiled if isinstance(compiled, str) else "inductor"
    compile_whole = partial(torch.compile, fullgraph=True, backend=joining(backend))
    if recompute == "selective" and compiled:
        # Inside, where the compiler sees what is kept: its backward does not run the layer, so it needs no
        # adapter context.
        return compile_whole(partial(recomputed, plain, context_fn=_selective_contexts))
    run = compile_whole(plain) if compiled else plain
    match recompute:
        case "none":
            return run
        case "selective":
            return partial(recomputed, run, context_fn=partial(_selective_contexts, router))
        case "full":
            return partial(recomputed, run, context_fn=router.checkpoint_contexts)


def _selective_contexts(
    router: AdapterRouter | None = None,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` for torch's checkpoint: what is in `KEPT` is kept, the rest is recomputed."""
    keeping, taking = create_selective_checkpoint_contexts(_policy)
    if router is None:
        return keeping, taking
    return keeping, _both(router.checkpoint_contexts()[1], taking)


def _policy(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


def _keep_rows_static(arguments: object) -> None:
    """Compile layers for a fixed number of rows.

    With both rows and length dynamic, torch takes many minutes to simplify the sizes of nine heads over three
    key heads.
    """
    for value in tree_leaves(arguments):
        if isinstance(value, Tensor) and value.ndim > 1:
            torch._dynamo.mark_static(value, 0)


def _run(
    layer: nn.Module,
    plain: Callable,
    in_training: Callable,
    uncompiled: Callable,
    compilation: _Compilation,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not layer.training:
        return plain(*args, **kwargs)
    if compilation.has_failed:
        return uncompiled(*args, **kwargs)
    compilation.lengths.add((args[0] if args else kwargs["hidden_states"]).shape[1])
    if len(compilation.lengths) > 1:  # not for packed rows: their length is fixed and their number varies
        _keep_rows_static((args, kwargs))
    try:
        return in_training(*args, **kwargs)
    except FailOnRecompileLimitHit as error:
        raise RunError(
            f"key 'compile': more than {torch._dynamo.config.recompile_limit} kinds of layers and lengths "
            "to compile; set a larger pad_to_multiple_of, or compile to false"
        ) from error
    except (TorchDynamoException, InductorError) as error:
        if out_of_memory(error) is not None:
            raise
        reason = first_line(error)
        if not compilation.may_fall_back:
            raise RunError(
                f"key 'compile': {type(layer).__name__} cannot be compiled whole: {reason}; set it to false"
            ) from error
        logger.warning(
            "compile auto: %s cannot be compiled, so layers run uncompiled: %s", type(layer).__name__, reason
        )
        compilation.has_failed = True
    return uncompiled(*args, **kwargs)


def recomputed(
    run: Callable[[], tuple[Tensor, ...]], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, ...]:
    """`run()` with recomputation: forward keeps only the outputs, backward runs it again.

    The parameters are inputs of one autograd node, so their gradients are its ordinary outputs: one backward
    serves all agents, and the hooks of DDP and DeepSpeed see each gradient once.
    """
    return _Recomputed.apply(run, *parameters)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[], tuple[Tensor, ...]], *parameters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)  # without the diversity term the hidden states get no gradient
        ctx.save_for_backward(*parameters)
        return run()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        with torch.enable_grad():
            outputs = ctx.run()
        due = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None
        ]
        outputs, gradients = zip(*due, strict=True)
        return None, *torch.autograd.grad(outputs, ctx.saved_tensors, gradients)
