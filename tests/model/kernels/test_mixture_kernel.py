import pytest
import torch
from torch import Tensor

from chorus.model.kernels.mixture_kernel import MixtureStatistics, mixture_statistics, torch_statistics

CASES = [(1, 2, 300, 1.0, None), (4, 3, 5000, 1.7, 30.0), (3, 5, 2048, 0.6, None), (16, 2, 4100, 1.0, 30.0)]


def logits_and_weights(K: int, N: int, V: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(K)
    logits_KNV = 3 * torch.randn(K, N, V, generator=generator)
    weight_K = torch.rand(K, generator=generator)
    if K > 1:
        weight_K[0] = 0
    return logits_KNV.to(device), (weight_K / weight_K.sum()).to(device)


@pytest.mark.parametrize(("K", "N", "V", "temperature", "softcap"), CASES)
def test_statistics_are_those_of_plain_probabilities_in_float64(
    K: int, N: int, V: int, temperature: float, softcap: float | None
):
    logits_KNV, weight_K = logits_and_weights(K, N, V)
    how = {"temperature": temperature, "softcap": softcap, "scale": 0.7}
    found = mixture_statistics(logits_KNV, weight_K, **how, want_log_prob=True)
    x_KNV = 0.7 * logits_KNV.double()
    if softcap:
        x_KNV = softcap * torch.tanh(x_KNV / softcap)
    p_KNV = x_KNV.softmax(-1)
    p_NV = (weight_K.double()[:, None, None] * p_KNV).sum(0)
    q_NV = p_NV ** (1 / temperature) / (p_NV ** (1 / temperature)).sum(-1, keepdim=True)
    token_N = q_NV.argmax(-1)
    mutual_N = entropy(p_NV) - (weight_K.double()[:, None] * entropy(p_KNV)).sum(0)
    assert torch.equal(found.token_N, token_N)
    assert_close(found.log_prob_N, q_NV.gather(1, token_N[:, None])[:, 0].log())
    assert_close(found.member_log_prob_KN, p_KNV.gather(2, token_N.expand(K, N)[:, :, None])[:, :, 0].log())
    assert_close(found.entropy_N, entropy(q_NV))
    assert_close(found.mutual_information_N, mutual_N.clamp(min=0))
    assert_close(found.log_norm_KN, x_KNV.exp().sum(-1).log())
    assert_close(found.log_partition_N, (p_NV ** (1 / temperature)).sum(-1).log())
    assert found.log_prob_NV is not None
    assert_close(found.log_prob_NV, q_NV.log())


def test_equal_members_have_no_mutual_information_and_opposed_ones_the_most_there_is():
    same_KNV = torch.randn(1, 4, 50).expand(3, 4, 50)
    assert float(mixture_statistics(same_KNV, torch.ones(3) / 3).mutual_information_N.max()) < 1e-6
    opposed_KNV = torch.full((2, 1, 50), -1e4)
    opposed_KNV[0, 0, 3] = opposed_KNV[1, 0, 7] = 1e4
    found = mixture_statistics(opposed_KNV, torch.tensor([0.5, 0.5]))
    assert float(found.mutual_information_N) == pytest.approx(torch.tensor(2.0).log().item())
    assert float(found.log_prob_N) == pytest.approx(-torch.tensor(2.0).log().item())


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "N", "V", "temperature", "softcap"), [*CASES, (5, 3, 256_000, 1.3, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_triton_kernel_gives_what_its_plain_twin_gives(
    K: int, N: int, V: int, temperature: float, softcap: float | None, dtype: torch.dtype
):
    logits_KNV, weight_K = logits_and_weights(K, N, V, "cuda")
    how = {"temperature": temperature, "softcap": softcap, "scale": 0.7, "want_log_prob": True}
    twin = torch_statistics(logits_KNV.to(dtype), weight_K, **how)
    kernel = mixture_statistics(logits_KNV.to(dtype), weight_K, **how)
    assert torch.equal(twin.token_N, kernel.token_N)
    for name, one, other in zip(MixtureStatistics._fields, twin, kernel, strict=True):
        assert one.dtype == other.dtype, name
        assert_close(one, other.double())


def entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-4)
