import random
import subprocess
import sys
from itertools import product

import torch

from chorus.seeding import derive_seed


def test_equal_inputs_give_equal_seeds_in_another_process():
    """Python's own hash() of a text differs from process to process."""
    call = "from chorus.seeding import derive_seed; print(derive_seed(3, 'dropout', 5, 'layers.0'))"
    printed = {subprocess.check_output([sys.executable, "-c", call], text=True).strip() for _ in range(2)}
    assert printed == {str(derive_seed(3, "dropout", 5, "layers.0"))}


def test_seeds_do_not_change_between_versions():
    """Every number of an earlier run hangs on them: a change must be meant, and belongs in the changelog."""
    assert derive_seed(0) == 7210762507766007076
    assert derive_seed(0, "order", 3) == 386106667988085106


def test_different_inputs_give_different_seeds():
    inputs = [
        *(
            (seed, purpose, step, agent)
            for seed, purpose, step, agent in product(range(4), "abc", range(20), range(8))
        ),
        *[
            (0,),
            (0, "a"),
            (0, "a", 1),
            (0, "a1"),
            (0, "a", "1"),
            (0, 1),
            (1, 0),
            (0, 1, 0),
            (0, "1, 0"),
            (0, "a", ""),
        ],
        *[(0, "a', 'b"), (0, "a", "b"), (0, "ab"), (0, ""), (2**63 - 1,), (2**63 - 1, 0)],
    ]
    assert len({derive_seed(*one) for one in inputs}) == len(inputs)


def test_a_seed_fits_a_torch_generator_and_uses_all_of_its_63_bits():
    seeds = [derive_seed(0, "bits", number) for number in range(400)]
    for seed in seeds:
        torch.Generator().manual_seed(seed)
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):  # each is set in about half of them: 5.5 standard deviations to either side
        assert 145 < sum(seed >> bit & 1 for seed in seeds) < 255


def test_neighbouring_seeds_draw_unrelated_numbers():
    draws = [
        torch.randn(4000, generator=torch.Generator().manual_seed(derive_seed(seed, "x", step)))
        for seed, step in product(range(3), range(3))
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(9)
    assert correlation.abs().max() < 0.08  # five standard deviations


def test_no_global_generator_moves():
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    derive_seed(0, "anything")
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert python_state == random.getstate()
