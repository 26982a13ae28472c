"""What samples become: a batch of them."""

import itertools

import pytest
import torch
from samples import PAD, make_samples

from chorus.data.batches import Batch, Sample, collate, collate_apart


@pytest.mark.parametrize("pad_to_multiple_of", [1, 8, 64])
@pytest.mark.parametrize("points_per_row", [1, 2, 3, 16])
def test_a_batch_says_of_each_token_what_follows_it(pad_to_multiple_of: int, points_per_row: int) -> None:
    samples = [Sample(torch.randperm(1_000)[: len(s.ids)], s.is_target) for s in make_samples(7, longest=30)]
    batch = collate(samples, 1_001, pad_to_multiple_of, points_per_row)
    T = batch.input_BT.shape[1]
    assert T % pad_to_multiple_of == 0
    assert 0 <= T - (max(len(sample.ids) for sample in samples) - 1) < pad_to_multiple_of
    flat = []
    for row, (ids, is_target) in enumerate(samples):
        for t in range(T):
            due = t + 1 < len(ids) and bool(is_target[t + 1])
            assert batch.input_BT[row, t] == (ids[t] if t < len(ids) - 1 else 1_001)
            assert batch.target_BT[row, t] == (ids[t + 1] if t < len(ids) - 1 else 1_001)
            assert batch.mask_BT[row, t] == due
            flat += [row * T + t] * due
    assert batch.target_rows_N.tolist() == flat
    assert [tensor.dtype for tensor in batch[:5]] == [
        torch.int64,
        torch.int64,
        torch.bool,
        torch.int64,
        torch.int64,
    ]
    assert batch.points_SM.shape == (7, points_per_row)


@pytest.mark.parametrize("points_per_row", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("num_targets", [1, 2, 3, 4, 5, 6, 15, 16, 17, 100])
def test_points_are_evenly_spaced_targets_from_first_to_last(points_per_row: int, num_targets: int) -> None:
    is_target = torch.tensor([False] + [False, True, False] * num_targets)
    batch = collate([Sample(torch.arange(len(is_target)), is_target)], PAD, points_per_row=points_per_row)
    places = batch.mask_BT[0].nonzero().flatten().tolist()
    points = [point for point in batch.points_SM[0].tolist() if point != -1]
    count = min(points_per_row, num_targets)
    assert batch.points_SM[0].tolist() == points + [-1] * (points_per_row - count)
    ranks = [places.index(point) for point in points]
    assert len(ranks) == count
    assert ranks[-1] == num_targets - 1
    if count > 1:
        assert ranks[0] == 0
        gaps = [after - before for before, after in itertools.pairwise(ranks)]
        assert 1 <= min(gaps) <= max(gaps) <= min(gaps) + 1


def places_of_points(batch: Batch) -> list[list[int]]:
    """The place along its row of each point of each sample; rows hold one sample."""
    T = batch.input_BT.shape[1]
    return [
        [point - row * T if point >= 0 else -1 for point in points]
        for row, points in enumerate(batch.points_SM.tolist())
    ]


def test_the_points_of_a_row_depend_on_the_row_only() -> None:
    samples = make_samples(6, longest=40)
    alone = [places_of_points(collate([sample], PAD, 1, 4))[0] for sample in samples]
    assert places_of_points(collate(samples, PAD, 64, 4)) == alone
    assert places_of_points(collate(samples[::-1], PAD, 1, 4)) == alone[::-1]


@pytest.mark.parametrize("pad_to_multiple_of", [1, 8])
def test_no_rows_make_one_row_of_padding(pad_to_multiple_of: int) -> None:
    batch = collate([], PAD, pad_to_multiple_of, 3)
    assert batch.input_BT.tolist() == batch.target_BT.tolist() == [[PAD] * pad_to_multiple_of]
    assert not batch.mask_BT.any()
    assert batch.target_rows_N.tolist() == []
    assert batch.points_SM.tolist() == [[-1, -1, -1]]
    assert [tensor.dtype for tensor in batch[:5]] == [
        torch.int64,
        torch.int64,
        torch.bool,
        torch.int64,
        torch.int64,
    ]


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate_apart([make_samples(2), make_samples(2)], PAD)._replace(weight_KS=torch.ones(2, 2))
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert {part.device.type for part in moved if isinstance(part, torch.Tensor)} == {"meta"}
    assert moved.own_targets == batch.own_targets
