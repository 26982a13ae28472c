"""What a compiled layer is said to hold. A whole run's: test_forecast.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chorus.planning.counted_kernels import COUNTED
from chorus.planning.live_bytes import LiveBytes


def test_inside_of_a_kernel_results_have_no_bytes_and_what_crosses_a_product_has():
    weight_DD, x_ND = (torch.empty(256, 256, device="meta") for _ in range(2))

    def one_kernel() -> Tensor:
        h_ND = x_ND @ weight_DD
        return (h_ND.exp() + h_ND.sin() * h_ND.cos()).amax(-1)

    def across_a_product() -> Tensor:
        h_ND = (x_ND @ weight_DD).exp()
        return (h_ND @ weight_DD + h_ND) @ weight_DD

    def peak(function: Callable[[], Tensor]) -> float:
        with LiveBytes() as live:
            function()
            assert live.now == 0  # nor does what ran hold its result
        return live.peak / x_ND.nbytes

    compiled = [torch.compile(function, backend=COUNTED) for function in (one_kernel, across_a_product)]
    with torch.no_grad():
        for function in compiled:
            function()
        assert peak(one_kernel) > 3
        assert peak(compiled[0]) == pytest.approx(1, abs=0.01)  # the product, and a number for each row
        assert (
            peak(compiled[1]) == 3
        )  # h, its product and their sum, which the last product needs as a tensor
