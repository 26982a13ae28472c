"""Counts the memory of compiled layers without compiling them: a torch.compile backend for
`live_bytes.LiveBytes`.

The backend saves for backward what inductor would save. Intermediates inside a fused kernel take no memory:
counted separately, the dozen fp32 intermediates of GeGLU's backward would be a tenth of gemma-2-9b's memory.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._python_dispatch import _disable_current_modes

COUNTED = "chorus_counted"
aten = torch.ops.aten
PRODUCTS = frozenset({aten.mm, aten.bmm, aten.addmm, aten.baddbmm})


@torch._dynamo.register_backend(name=COUNTED)  # pyright: ignore
def compile_for_counting(trace: GraphModule, example_inputs: list[Any]) -> Any:
    """The backend. It runs the traced graph and generates no code."""
    compile_trace = aot_autograd(
        fw_compiler=_counted,
        bw_compiler=_counted,
        decompositions=select_decomp_table,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    )
    return compile_trace(trace, example_inputs)


def _counted(trace: GraphModule, example_inputs: list[Any]) -> Any:
    kernels = _Kernels(trace)

    def run(inputs: list[Any]) -> Any:
        made = kernels.boxed_run(inputs)  # clears the list: each input is freed after its last use
        kernels.env.clear()
        return made

    run._boxed_call = True  # the caller then passes a list  # pyright: ignore[reportFunctionMemberAccess]
    return run


class _Kernels(Interpreter):
    """Runs a traced graph operator by operator, and hides intermediates of fused kernels from `LiveBytes`."""

    def __init__(self, trace: GraphModule):
        super().__init__(trace)
        self.inside = inside_of_kernels(trace.graph)

    def run_node(self, n: Node) -> Any:
        with _disable_current_modes() if n in self.inside else nullcontext():
            return super().run_node(n)


def inside_of_kernels(graph: Graph) -> set[Node]:
    """Elementwise results that only operators of the same kernel use.

    Inductor fuses everything between two operators that it cannot fuse (matrix products, custom operators)
    into one kernel.
    """
    kernel_of, kernel = {}, 0
    for node in graph.nodes:
        kernel += _stands_alone(node)
        kernel_of[node] = kernel
    return {
        node
        for node in graph.nodes
        if torch.Tag.pointwise in getattr(node.target, "tags", ())
        and all(kernel_of[user] == kernel_of[node] for user in _users_behind_views(node))
    }


def _stands_alone(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return node.op == "output"
    packet = node.target.overloadpacket
    return node.target.namespace not in ("aten", "prims") or packet in PRODUCTS


def _users_behind_views(node: Node) -> Iterator[Node]:
    for user in node.users:
        if getattr(user.target, "is_view", False):
            yield from _users_behind_views(user)
        else:
            yield user
