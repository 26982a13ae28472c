"""What text becomes: tokens, and those of them that are learnt.
Nothing of a completion is left out in silence."""

import itertools
import random

import pytest
import torch
from rows import TOKENIZER, samples_of
from tokenizers_made import BOS, EOS, byte_level_tokenizer, make_tokenizer
from transformers import PreTrainedTokenizerFast

from chorus.data.samples import Sample
from chorus.data.templates import Problem
from chorus.data.tokenise import MERGED, Encoder
from chorus.errors import InputError


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
        ("ab: ", "ad", ["▁a", "d", "<eos>"]),  # the space that joins the completion goes with it
        ("ab:  ", "ad", ["▁a", "d", "<eos>"]),  # one of two spaces does
        ("ab:\n", "ad", ["a", "d", "<eos>"]),  # a line break does not join
        ("ab: ", "9", ["▁", "9", "<eos>"]),  # whatever follows: when a model is asked that is not known
        ("", "bcd", ["bc", "d", "<eos>"]),
        ("b é🙂", "cé", ["c", "<0xC3>", "<0xA9>", "<eos>"]),  # offsets count characters, not bytes
        (
            "<bos>ab",
            "d<bos>e",
            ["d", "<bos>", "e", "<eos>"],
        ),  # a special token that a template writes is learnt
        ("ab", "d<eos>", ["d", "<eos>"]),  # the end once
        ("ab<eos>", "d", ["d", "<eos>"]),
    ],
)
def test_targets_are_the_tokens_that_begin_in_the_completion_and_one_end_token(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, expected: list[str]
) -> None:
    [sample] = samples_of([Problem(prompt, completion)], tokenizer)
    assert targets(sample, tokenizer) == expected
    whole = tokenizer(prompt + completion)["input_ids"]
    whole = whole[1:] if whole[1] == BOS else whole
    assert sample.ids.tolist() == [*whole, *([EOS] if whole[-1] != EOS else [])]
    assert (sample.ids.dtype, sample.is_target.dtype) == (torch.int64, torch.bool)
    assert sample.num_targets == len(expected)


@pytest.mark.parametrize("adds", ["$A", "<bos> $A", "<bos> $A <eos>"])
def test_what_the_tokenizer_adds_by_itself_changes_no_target(adds: str) -> None:
    own = make_tokenizer(adds)
    [sample] = samples_of([Problem("ab:", "cd")], own)
    assert targets(sample, own) == ["c", "d", "<eos>"]
    [sample] = samples_of([Problem("", "cd")], own)
    assert targets(sample, own) == ["c", "d", "<eos>"]
    # Without a beginning token the end token comes before the first one, or nothing could predict it.
    assert sample.ids[0] == BOS
    assert sample.num_targets == 3


def test_targets_where_tokens_do_not_join_are_the_completion_tokenised_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdé🙂 12", k=draw.randint(1, 9))) for _ in range(2_500)]
    problems = [Problem(f"{prompt}:", f":{completion}") for prompt, completion in itertools.pairwise(texts)]
    for problem, sample in zip(problems, samples_of(problems, tokenizer), strict=True):
        alone = tokenizer(problem.completion, add_special_tokens=False)["input_ids"]
        assert sample.ids[sample.is_target].tolist() == [*alone, EOS]
        assert sample.is_target.tolist() == sorted(sample.is_target.tolist())


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "asked", "learnt"),
    [
        ("c:", " a", "c:", " a"),
        ("c: ", "a", "c:", " a"),  # the space goes with the word that it begins
        ("c:  ", "a", "c: ", " a"),
        ("c\n", "a", "c\n", "a"),  # a token of white space alone, whose offsets may be trimmed to nothing
        ("c", "\n\na", "c", "\n\na"),
        ("c", "a \n", "c", "a \n"),
        ("", "a", "", "a"),
        ("c", "aé🙂\n\n", "c", "aé🙂\n\n"),
    ],
)
def test_every_character_of_a_completion_is_learnt_whatever_the_offsets(
    trims: bool, prompt: str, completion: str, asked: str, learnt: str
) -> None:
    tokenizer = byte_level_tokenizer(trims)
    problem, encoder = Problem(prompt, completion), Encoder(tokenizer)
    [row], [sample] = encoder.rows([problem]), samples_of([problem], tokenizer)
    assert tokenizer.decode(sample.ids[sample.is_target][:-1]) == learnt
    assert (row.merged, sample.ids[-1], sample.num_targets) == (0, EOS, int(sample.is_target.sum()))
    assert (
        encoder.prompt(problem) == (tokenizer(asked)["input_ids"] or [EOS]) == row.ids[: row.marks.index(1)]
    )


@pytest.mark.parametrize("trims", [False, True])
def test_characters_that_a_token_of_the_prompt_takes_along_are_counted_and_marked(trims: bool) -> None:
    encoder = Encoder(byte_level_tokenizer(trims))
    [row] = encoder.rows([Problem("c:", "\na")])
    assert (row.marks, row.merged) == ([0, MERGED, 1, 1], 1)
    [row] = Encoder(make_tokenizer()).rows([Problem("ab", "c")])
    assert (row.marks, row.merged, row.answer) == ([0, 0, MERGED, 1], 1, 0)  # of the answer nothing is learnt


@pytest.mark.parametrize("prompt", ["<bos>ab:", "ab:"])
@pytest.mark.parametrize("adds", ["<bos> $A", "<bos> $A <eos>", "$A"])
def test_there_is_one_beginning_whoever_writes_it(adds: str, prompt: str) -> None:
    encoder, problem = Encoder(make_tokenizer(adds)), Problem(prompt, "c")
    [row] = encoder.rows([problem])
    assert row.ids.count(BOS) == encoder.prompt(problem).count(BOS) == int("<bos>" in adds + prompt)
    assert row.ids[: row.marks.index(1)] == encoder.prompt(problem)


@pytest.mark.parametrize("adds", ["<bos> $A", "<bos> $A <eos>", "$A"])
def test_a_beginning_written_twice_or_by_the_completion_is_one_that_is_not_learnt(adds: str) -> None:
    encoder = Encoder(make_tokenizer(adds))
    for problem in (Problem("<bos><bos>ab:", "c"), Problem("", "<bos>c")):
        [row] = encoder.rows([problem])
        assert (row.ids.count(BOS), row.ids[0], row.marks[0], row.strays) == (1, BOS, 0, 0)
        assert encoder.prompt(problem) == row.ids[: row.marks.index(1)]


def test_beginnings_in_the_midst_of_a_row_and_unknown_characters_are_counted() -> None:
    encoder = Encoder(make_tokenizer())
    problems = [
        Problem("<bos>ab:", "c"),
        Problem("ab <bos>:", "c"),
        Problem("ab:", "<bos>c"),
        Problem("é", "c"),
    ]
    rows = list(encoder.rows(problems))
    assert [(row.strays, row.unknown) for row in rows] == [(0, 0), (1, 0), (1, 0), (0, 0)]
    [row] = Encoder(make_tokenizer(has_bytes=False)).rows([Problem("a", "éc")])
    assert (row.strays, row.unknown) == (0, 1)


def test_white_space_behind_the_end_brings_no_second_end() -> None:
    problem = Problem("Question: 3 + 4?\nAnswer:", " 7<eos>\n")
    [row] = Encoder(TOKENIZER).rows([problem])
    assert TOKENIZER.decode(row.ids) == TOKENIZER.bos_token + problem.text
    assert row.marks[-3:] == [1, 1, 1]


@pytest.mark.parametrize("end", ["", "<eos>"])
def test_a_right_answer_is_what_training_has_behind_the_prompt(end: str) -> None:
    encoder = Encoder(TOKENIZER)
    problems = [Problem("Thing:", f" apples{end}"), Problem("Thing: ", f"apples{end}")]
    for problem, row in zip(problems, encoder.rows(problems), strict=True):
        assert encoder.prompt(problem) + encoder.answer(problem) == row.ids
        assert TOKENIZER.decode(encoder.answer(problem)) == " apples<eos>"
    joined = Encoder(make_tokenizer())  # the token "bc" begins in the prompt: the answer is "c" all the same
    assert joined.answer(Problem("ab", "c")) == joined.answer(Problem("a:", "c"))


@pytest.mark.parametrize("completion", ["c", "c<eos>"])
@pytest.mark.parametrize("adds", ["$A", "<bos> $A <eos>"])
def test_there_is_one_end_and_it_is_learnt(adds: str, completion: str) -> None:
    [row] = Encoder(make_tokenizer(adds)).rows([Problem("ab:", completion)])
    assert (row.ids.count(EOS), row.ids[-1], row.marks[-1]) == (1, EOS, 1)


def test_a_tokenizer_file_that_truncates_and_pads_changes_no_row_and_stays_as_it_is() -> None:
    tokenizer, plain = make_tokenizer(), make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before, problems = tokenizer.backend_tokenizer.to_str(), [Problem("aaaa", "d"), Problem("a", "d")]
    for one, other in zip(samples_of(problems, tokenizer), samples_of(problems, plain), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
    assert tokenizer.backend_tokenizer.to_str() == before


def test_the_bundled_tokenizer_learns_the_answer_and_its_end() -> None:
    problem = Problem("Question: 3 + 4?\nAnswer:", " 3 + 4 = 7\n#### 7")
    [sample] = samples_of([problem], TOKENIZER)
    assert TOKENIZER.decode(sample.ids[sample.is_target]) == problem.completion + TOKENIZER.eos_token
    assert TOKENIZER.decode(sample.ids[~sample.is_target]) == TOKENIZER.bos_token + problem.prompt


def test_a_tokenizer_without_end_token_or_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="key 'model_name': its tokenizer lacks an end token"):
        Encoder(make_tokenizer(eos=None))
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(InputError, match=r"key 'model_name': its tokenizer lacks character offsets"):
        Encoder(make_tokenizer())
