"""Counts live bytes while code runs on the meta device, and replaces what cannot run there.

On the meta device tensors have shapes and storages of a size, but no values: a model of any size takes no
memory.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from chorus.config.per_agent import of_agent
from chorus.model.kernels.cuda_graphs import Pass, Rows
from chorus.model.regularisation import Noise, Regularisation

ALLOCATION = 512  # CUDA's allocator hands out multiples of it


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class ExpertProducts(TorchDispatchMode):
    """Tells the result of torch's product of tokens with the experts that they have chosen, which without
    values is there for bf16 alone."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return args[0].new_empty(len(args[0]), args[1].shape[-1])  # frozen experts: no other product
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make within its context, for as long as anything holds them.

    Attributes:
        now: bytes that live.
        peak: the most that ever did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._shapes: dict[Hashable, tuple[Any, ...]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # count what compiled code allocates, not what the compiler allocates

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # code reads a value, such as whether a mask is all True
        kwargs = kwargs or {}
        for tensor in _tensors_in(args, kwargs.values()):
            self._note(tensor, counts=False)  # made outside of the context: it and its views do not count
        made = self._made(func, args, kwargs)
        for tensor in _tensors_in((made,)):
            self._note(tensor, counts=True)
        return made

    def _made(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the operator makes.

        torch works out many shapes in Python. Layers and agents ask for the same ones again, so what is known
        is not asked for: that makes a forecast several times faster.
        """
        key = _key(func, args, kwargs)
        if key in self._shapes:
            shape, stride, dtype = self._shapes[key]
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        made = func(*args, **kwargs)
        if key is not None and type(made) is Tensor and made.is_meta:
            again = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device="meta")
            if again.untyped_storage().nbytes() == made.untyped_storage().nbytes():
                self._shapes[key] = made.shape, made.stride(), made.dtype
        return made

    def _note(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            size = ceil(storage.nbytes() / ALLOCATION) * ALLOCATION if counts else 0
            self._known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors_in(*parts: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, in lists and tuples too."""
    for part in parts:
        for one in part:
            if isinstance(one, Tensor):
                yield one
            elif isinstance(one, list | tuple):
                yield from _tensors_in(one)


def _key(func: Any, args: tuple, kwargs: dict[str, Any]) -> Hashable | None:
    """What the shape of an operator's result depends on; None where the result may share an argument's
    storage, or where values may decide."""
    if any(one.alias_info is not None for one in (*func._schema.arguments, *func._schema.returns)):
        return None
    parts = [_part(one) for one in (*args, *kwargs.values())]
    return None if None in parts else (func, tuple(kwargs), *parts)


def _part(argument: Any) -> Hashable | None:
    if isinstance(argument, Tensor):
        if not argument.is_meta or type(argument) not in (Tensor, Parameter):
            return None
        return argument.shape, argument.stride(), argument.dtype
    if isinstance(argument, list | tuple):
        parts = tuple(map(_part, argument))
        return None if None in parts else parts
    if argument is None or isinstance(argument, _PLAIN):
        return type(argument), argument
    return None


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Undrawn(Noise):
    """Noise of the right shapes: the meta device has no random generator."""

    def drop(self, x_NI: Tensor, agent: int, path: str) -> Tensor:
        p = of_agent(self.dropout_p, agent)
        if p == 0:
            return x_NI
        return x_NI * torch.empty_like(x_NI, dtype=torch.bool) / (1 - p)


def undrawn_noise(adapters: Mapping[int, Tensor], rates: Regularisation, step: int) -> Undrawn:
    """As `agents.draw_noise`, without drawing."""
    keep = {
        agent: torch.empty_like(adapter_F, dtype=torch.bool)
        for agent, adapter_F in adapters.items()
        if of_agent(rates.dropconnect_p, agent) > 0
    }
    return Undrawn(rates.seed, step, 0, keep, rates.dropconnect_p, rates.dropout_p)


class CountedPasses:
    """Replaces `CapturedPasses` on the meta device, where there are no CUDA graphs.

    A captured pass keeps its peak memory, and its inputs and outputs in addition. Outside of `counted_by` a
    pass runs with precomputed masks and keeps nothing, so that layers are compiled: making masks within the
    pass reads a value, which prevents compilation.

    Args:
        is_captured: count what a CUDA graph keeps. False: count the pass as it runs without graphs.
    """

    def __init__(self, masks_of: Callable[[Rows], Any], is_captured: bool):
        self.masks_of, self.is_captured = masks_of, is_captured
        self.live: LiveBytes | None = None
        self.held: dict[Hashable, list[Tensor]] = {}
        self.awaiting: weakref.ref[Tensor] | None = None

    @contextmanager
    def counted_by(self, live: LiveBytes) -> Iterator[None]:
        """The context of counted passes; enters that of `live`, too."""
        self.live = live
        with live:
            yield
        self.live = None

    def __call__(self, key: Hashable, run: Pass, rows: Rows, flat_KF: Tensor) -> Tensor:
        if self.live is None:
            return run(rows, flat_KF, self.masks_of(rows))
        if not self.is_captured:
            return run(rows, flat_KF, None)
        if self.awaiting is not None and self.awaiting() is not None:
            return run(rows, flat_KF, None)
        if key not in self.held:
            self.held[key] = self._capture(self.live, run, rows, flat_KF)
        hidden_NTD: Tensor = _Replayed.apply(self.held[key][-1], flat_KF)  # pyright: ignore
        if hidden_NTD.requires_grad:
            self.awaiting = weakref.ref(hidden_NTD)
        return hidden_NTD

    @torch.enable_grad()
    def _capture(self, live: LiveBytes, run: Pass, rows: Rows, flat_KF: Tensor) -> list[Tensor]:
        flat_KF = flat_KF.detach().clone().requires_grad_()
        masks = self.masks_of(rows)
        before, live.peak = live.now, live.now
        hidden_NTD = run(rows, flat_KF, masks)
        (gradient_KF,) = torch.autograd.grad(hidden_NTD, flat_KF, torch.empty_like(hidden_NTD))
        inside = live.peak - before - hidden_NTD.nbytes
        if self.held:  # all captures share one pool; outputs are outside of it
            return [masks, flat_KF, gradient_KF, hidden_NTD.detach()]
        del gradient_KF
        return [masks, flat_KF, torch.empty(inside, dtype=torch.uint8, device="meta"), hidden_NTD.detach()]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NTD: Tensor, flat_KF: Tensor) -> Tensor:
        ctx.save_for_backward(flat_KF)
        return hidden_NTD.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, torch.empty_like(ctx.saved_tensors[0])


def fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """The memory of attention without scores (flex, flash, sdpa): inputs, output, a number for each row."""
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None  # pyright: ignore


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, torch.empty_like(query[..., 0], dtype=torch.float32))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
