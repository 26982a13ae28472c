"""Linear layers with the same input, found in torch.compile's trace of a layer and joined into one operator.

Found in the trace, not among the modules: a trace shows which linears share their input, whatever the
architecture and its names, and the model's code stays unchanged.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

from chorus.model.kernels.lora_linear import ONE, SEVERAL


@cache  # one object for all layers: torch.compile recompiles for every new backend object
def joining(backend: str) -> Callable:
    """A torch.compile backend that joins linears with the same input and passes the trace to `backend`."""
    compile_trace: Any = torch._dynamo.lookup_backend(backend)

    def join_and_compile(trace: GraphModule, example_inputs: list[Any]) -> Callable:
        for part in trace.modules():  # what backward recomputes is a subgraph of its own
            if isinstance(part, GraphModule):
                join_linears(part)
        return compile_trace(trace, example_inputs)

    return join_and_compile


def join_linears(trace: GraphModule) -> None:
    """Replace two or more LoRA linears with the same input by one operator, except those with a bias."""
    found: defaultdict[Any, list[Node]] = defaultdict(list)
    for node in trace.graph.find_nodes(op="call_function", target=ONE):
        x_KNI, _, bias_O, _, _, scaling = node.args
        if bias_O is None:
            found[x_KNI.target, x_KNI.args, scaling].append(node)  # each has its own view node
    for nodes in found.values():
        if len(nodes) > 1:
            _join(trace, nodes)
    trace.graph.lint()
    trace.recompile()


def _join(trace: GraphModule, nodes: list[Node]) -> None:
    x_KNI, _, _, _, _, scaling = nodes[0].args
    weights, As, Bs = ([node.args[place] for node in nodes] for place in (1, 3, 4))
    with trace.graph.inserting_before(nodes[0]):
        joined = trace.graph.call_function(SEVERAL, (x_KNI, weights, As, Bs, scaling))
    for place, node in enumerate(nodes):
        for taken in list(node.users):
            if taken.args[1] == 0:  # y_KNO; low_KNR is for backward alone
                taken.args = (joined, place)
            else:
                trace.graph.erase_node(taken)
        trace.graph.erase_node(node)
