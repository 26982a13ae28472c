"""What rows become: tokens and targets, then a batch of them."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from samples import make_samples
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chorus.config import Config
from chorus.data.batches import Batch, Sample, collate, tokenise
from chorus.data.sources import Problem, read_problems
from chorus.errors import InputError

PAD, EOS, BOS, UNK = range(4)


def make_tokenizer(adds: str = "<bos> $A", eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """Gemma's kind: BPE over whole texts with a visible space and bytes for unknown characters; joins b with c."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh:0123456789", "bc", "▁a"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("b", "c"), ("▁", "a")]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.add_special_tokens(special)
    bpe.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token="<bos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def targets(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in sample.ids[sample.is_target].tolist()]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("ab", "cd", ["d", "<eos>"]),  # the token "bc" lies on the boundary and belongs to the prompt
        ("ab:", "cd", ["c", "d", "<eos>"]),
        ("ab:", " ad", ["▁a", "d", "<eos>"]),
        ("ab: ", "ad", ["d", "<eos>"]),  # so does "▁a": a prompt's last space is better left to the completion
        ("", "bcd", ["bc", "d", "<eos>"]),
        ("b é🙂", "cé", ["c", "<0xC3>", "<0xA9>", "<eos>"]),  # offsets count characters, not bytes
        ("<bos>ab", "d<bos>e", ["d", "<bos>", "e", "<eos>"]),  # a special token that a template writes is learnt
        ("ab", "d<eos>", ["d", "<eos>"]),  # the end once
        ("ab<eos>", "d", ["d", "<eos>"]),
    ],
)
def test_targets_are_the_tokens_that_begin_in_the_completion_and_one_end_token(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, expected: list[str]
) -> None:
    [sample] = tokenise([Problem(prompt, completion)], tokenizer, 100)
    assert targets(sample, tokenizer) == expected
    whole = tokenizer(prompt + completion)["input_ids"]
    assert sample.ids.tolist() == [*whole, *([EOS] if whole[-1] != EOS else [])]
    assert (sample.ids.dtype, sample.is_target.dtype) == (torch.int64, torch.bool)
    assert sample.num_targets == len(expected)


@pytest.mark.parametrize("adds", ["$A", "<bos> $A", "<bos> $A <eos>"])
def test_what_the_tokenizer_adds_by_itself_changes_no_target(adds: str) -> None:
    own = make_tokenizer(adds)
    [sample] = tokenise([Problem("ab:", "cd")], own, 100)
    assert targets(sample, own) == ["c", "d", "<eos>"]
    [sample] = tokenise([Problem("", "cd")], own, 100)
    assert targets(sample, own) == ["c", "d", "<eos>"]
    # Nothing comes before the first token, so without a beginning token it is not predicted.
    assert sample.num_targets == (2 if adds == "$A" else 3)


def test_targets_where_tokens_do_not_join_are_the_completion_tokenised_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdé🙂 12", k=draw.randint(1, 9))) for _ in range(2_500)]
    problems = [Problem(f"{prompt}:", f":{completion}") for prompt, completion in itertools.pairwise(texts)]
    for problem, sample in zip(problems, tokenise(problems, tokenizer, 1_000), strict=True):
        alone = tokenizer(problem.completion, add_special_tokens=False)["input_ids"]
        assert sample.ids[sample.is_target].tolist() == [*alone, EOS]
        assert sample.is_target.tolist() == sorted(sample.is_target.tolist())


def test_the_bundled_tokenizer_learns_the_answer_and_its_end() -> None:
    bundled = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "assets" / "tiny-gemma-2")
    problems = read_problems(Config(debug_subset_size=50)).train
    for problem, sample in zip(problems, tokenise(problems, bundled, 1_000), strict=True):
        assert bundled.decode(sample.ids[sample.is_target]) == problem.completion + bundled.eos_token
        assert bundled.decode(sample.ids[~sample.is_target]) == bundled.bos_token + problem.prompt


def test_long_rows_are_cut_on_the_right_and_counted(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = ["a", "aa", "aaa", "aaaa"]  # with the beginning, two targets and the end: 5 to 8 tokens
    samples = tokenise([Problem(prompt, "de") for prompt in prompts], tokenizer, 5)
    assert [targets(sample, tokenizer) for sample in samples] == [["d", "e", "<eos>"], ["d", "e"], ["d"]]
    assert [len(sample.ids) for sample in samples] == [5, 5, 5]
    assert caplog.messages == [
        "cut 3 of 4 training rows to max_seq_length 5 tokens; 1 of them have no target token left and are dropped"
    ]


def test_rows_that_fit_bring_no_warning(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 3  # of which transformers would warn
    assert len(tokenise([Problem("a", "de")] * 3, tokenizer, 5)) == 3
    assert tokenise([], tokenizer, 5) == []
    assert not caplog.messages
    assert not any(capfd.readouterr())


def test_rows_without_a_target_are_refused_where_none_is_left(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"key 'max_seq_length': 3 leaves no target token in any of 2 held-out rows"):
        tokenise([Problem("aaaa", "d")] * 2, tokenizer, 3, "held-out")


def test_a_tokenizer_without_end_token_or_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="key 'model_name': its tokenizer lacks an end token"):
        tokenise([Problem("a", "d")], make_tokenizer(eos=None), 5)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(InputError, match=r"key 'model_name': its tokenizer lacks character offsets"):
        tokenise([Problem("a", "d")], make_tokenizer(), 5)


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
    assert [tensor.dtype for tensor in batch[:5]] == [torch.int64, torch.int64, torch.bool, torch.int64, torch.int64]
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
    assert [tensor.dtype for tensor in batch[:5]] == [torch.int64, torch.int64, torch.bool, torch.int64, torch.int64]


def test_a_batch_moves_as_a_whole() -> None:
    moved = collate(make_samples(2), PAD).to("meta")
    assert isinstance(moved, Batch)
    assert {tensor.device.type for tensor in moved if tensor is not None} == {"meta"}
