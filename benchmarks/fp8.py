"""Would a base in FP8 pay? One MLP of Gemma-2 with the adapters of K agents, forward and backward.

    python benchmarks/fp8.py                 # on a GPU of Hopper's kind or later
    python benchmarks/fp8.py --shapes tiny   # that it runs

The base's products take bf16, or float8 by `torch._scaled_mm`. What float8 adds is timed with them: inputs
and gradients are scaled by their largest value and cast in every pass. Weights are cast once, into both
layouts that forward and backward need, so that they take as much memory as in bf16. Adapters stay in bf16.
E4M3 for values and E5M2 for gradients: Micikevicius et al. 2022, arXiv 2209.05433; scales for each row need
E4M3 for both.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from results import markdown_table
from shapes import SHAPES
from timing import timed, warm_up
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RANK = 16
Product = Callable[[Tensor], Tensor]


class How(NamedTuple):
    """How a product is computed.

    Attributes:
        per_row: a scale for each row of the input and each output of the weight, or one for each tensor.
        fast: accumulate in the tensor cores' short format, or in float32.
    """

    name: str
    per_row: bool = False
    fast: bool = True


FP8 = (
    How("FP8, a scale a tensor"),
    How("FP8, the same, float32 sums", fast=False),
    How("FP8, a scale a row", per_row=True),
)


def quantised(value_MN: Tensor, dtype: torch.dtype, per_row: bool) -> tuple[Tensor, Tensor]:
    """The value in float8, and the scale that gives it back, [M, 1] or a scalar."""
    largest = value_MN.abs().amax(1, keepdim=True) if per_row else value_MN.abs().amax()
    scale = (largest.float() / torch.finfo(dtype).max).clamp_min(1e-12)
    return (value_MN.float() / scale).to(dtype), scale


def fp8_product(weight_OI: Tensor, how: How) -> Product:
    """x_NI to x_NI W^T of a frozen weight, with the gradient of x."""
    forward_OI, forward_scale = quantised(weight_OI, E4M3, how.per_row)
    transposed_IO, backward_scale = quantised(weight_OI.T.contiguous(), E4M3, how.per_row)
    of_gradients = E4M3 if how.per_row else E5M2

    def scaled(value_MN: Tensor, dtype: torch.dtype, other: Tensor, other_scale: Tensor) -> Tensor:
        own, scale = quantised(value_MN, dtype, how.per_row)
        # The second operand is laid out by columns.
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            own,
            other.T,
            scale_a=scale,
            scale_b=other_scale.T if how.per_row else other_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=how.fast,
        )

    class Fp8(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_NI: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return scaled(x_NI, E4M3, forward_OI, forward_scale)

        @staticmethod
        def backward(ctx: Any, gradient_NO: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return scaled(gradient_NO.contiguous(), of_gradients, transposed_IO, backward_scale)

    return Fp8.apply  # pyright: ignore[reportReturnType]


class Mlp(nn.Module):
    """GeGLU with adapters of K agents; every agent has its rows, side by side."""

    def __init__(self, width: int, inner: int, K: int, how: How | None, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            value = torch.randn(*sizes, generator=generator, device=device) * sizes[-1] ** -0.5
            return value.bfloat16()

        self.K = K
        self.products: list[Product] = []
        for number, (size_in, size_out) in enumerate([(width, inner), (width, inner), (inner, width)]):
            weight_OI = normal(size_out, size_in)
            plain = nn.Linear(size_in, size_out, bias=False, device=device, dtype=torch.bfloat16)
            plain.weight = nn.Parameter(weight_OI, requires_grad=False)
            self.products.append(plain if how is None else fp8_product(weight_OI, how))
            setattr(self, f"A{number}", nn.Parameter(normal(K, RANK, size_in)))
            setattr(self, f"B{number}", nn.Parameter(normal(K, size_out, RANK)))

    def linear(self, number: int, x_NI: Tensor) -> Tensor:
        A_KRI, B_KOR = getattr(self, f"A{number}"), getattr(self, f"B{number}")
        added_KNO = (x_NI.unflatten(0, (self.K, -1)) @ A_KRI.mT) @ B_KOR.mT
        return self.products[number](x_NI) + added_KNO.flatten(0, 1)

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_NI = nn.functional.gelu(self.linear(0, x_ND), approximate="tanh")
        return self.linear(2, gate_NI * self.linear(1, x_ND))


class Measured(NamedTuple):
    ms: float
    output_ND: Tensor
    gradient_ND: Tensor


def measure(mlp: Mlp, x_ND: Tensor, gradient_ND: Tensor, steps: int) -> Measured:
    """Median time of forward and backward, compiled; the outputs, and the gradient of the inputs."""
    compiled = torch.compile(mlp, fullgraph=True, dynamic=False)
    x_ND.requires_grad_(True)

    def step() -> Tensor:
        x_ND.grad = None
        mlp.zero_grad(set_to_none=True)
        output_ND = compiled(x_ND)
        output_ND.backward(gradient_ND)
        return output_ND

    warm_up(step, x_ND.device)
    ms = median(timed(step, steps, x_ND.device))
    output_ND = step().detach().float()
    assert x_ND.grad is not None
    return Measured(ms, output_ND, x_ND.grad.float())


def apart(one: Tensor, other: Tensor) -> float:
    """The norm of the difference over that of `other`."""
    return float((one - other).norm() / other.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["gemma-2-2b", "gemma-2-9b"], choices=list(SHAPES))
    parser.add_argument("--agents", type=int, default=4, help="K")
    parser.add_argument("--tokens", type=int, default=2048, help="of each agent")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [["MLP of", "tokens", "products", "ms", "as fast as bf16", "outputs apart", "gradients apart"]]
    for name in options.shapes:
        width, inner = int(SHAPES[name]["hidden_size"]), int(SHAPES[name]["intermediate_size"])
        rows = options.agents * options.tokens
        x_ND, gradient_ND = torch.randn(2, rows, width, device=device).bfloat16()
        found = {}
        for how in (None, *FP8):
            torch._dynamo.reset()
            mlp = Mlp(width, inner, options.agents, how, device)
            found[how] = measure(mlp, x_ND.detach().clone(), gradient_ND, options.steps)
            plain, own = found[None], found[how]
            apart_by = [apart(own.output_ND, plain.output_ND), apart(own.gradient_ND, plain.gradient_ND)]
            cells = ["bf16" if how is None else how.name, f"{own.ms:.3f}", f"{plain.ms / own.ms:.2f}"]
            lines.append([name, str(rows), *cells, *(f"{value:.1%}" for value in apart_by)])
    print(markdown_table(lines))


if __name__ == "__main__":
    main()
