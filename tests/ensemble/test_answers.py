"""What counts as a right answer: special tokens, tokens that
end a turn and white space count on neither side."""

import copy

import pytest
from rows import TOKENIZER

from chorus.ensemble.answers import answer_text, final_answer, is_exact, pieces, warn_of_long_references

EOS = TOKENIZER.eos_token_id


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "reference", [" 4 apples", " 4 apples<eos>", "4 apples <eos>", "<bos>4  apples\n<eos><eos>"]
)
@pytest.mark.parametrize(
    "written", [" 4 apples", " 4 apples<eos>", " 4 apples<eos> and more", "<pad>4 apples\n"]
)
def test_what_closes_an_answer_counts_on_neither_side(reference: str, written: str):
    texts = [answer_text(ids_of(text), TOKENIZER, [EOS]) for text in (written, reference)]
    assert is_exact(*texts)
    assert not is_exact(answer_text(ids_of("5 apples<eos>"), TOKENIZER, [EOS]), texts[1])


@pytest.mark.parametrize("is_special", [True, False])
def test_a_token_that_ends_a_turn_ends_an_answer_special_or_not(is_special: bool):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens(["<end_of_turn>"], special_tokens=is_special)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for text in (" 4<end_of_turn>", " 4<end_of_turn>\n", " 4<end_of_turn><eos>", " 4", " 4<eos>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert answer_text(ids, tokenizer, [EOS, end]).strip() == "4", text


def test_answers_that_are_longer_than_what_is_written_are_counted(caplog: pytest.LogCaptureFixture):
    references = [ids_of(text) for text in (" 1 2", " 1 2<eos>", " 1 2 3 4")]
    assert warn_of_long_references(references, [EOS], len(references[0])) == 1
    assert (
        f"1 of 3 held-out answers are longer than max_new_tokens_eval {len(references[0])} tokens"
        in caplog.text
    )
    caplog.clear()
    assert warn_of_long_references(references, [EOS], len(references[2])) == 0
    assert not caplog.messages


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        # the reference marks a result: only results are compared
        ("12 + 7 = 19\n#### 19", "7 + 12 = 19\n#### 19", True),
        ("#### 19", "#### 18", False),
        ("19", "#### 19", False),  # no result without the mark
        ("", "#### 19", False),
        ("####", "#### 19", False),
        ("#### 19\n", " #### 19", True),
        ("####19", "#### 19", True),
        ("#### 1 #### 19", "#### 19", True),  # the last one counts
        ("#### 19 #### 1", "#### 19", False),
        ("#### 19\nQuestion: what next?", "#### 19", True),  # up to the end of its line
        ("####\n19", "#### 19", True),
        ("#### 1,234", "#### 1234", True),
        ("#### $1,234.", "#### 1234", True),
        ("#### 5 $", "#### $5", True),
        ("#### -5", "#### 5", False),
        ("#### 2.5", "#### 25", False),
        ("#### 19 apples", "#### 19", True),  # words beside the one number
        ("#### \\boxed{19}", "#### 19", True),
        ("#### $19$", "#### 19", True),
        ("#### 19 or 20", "#### 19", False),
        ("#### 9-19", "#### 19", False),
        ("#### H19", "#### 19", False),
        ("#### 19e2", "#### 19", False),
        ("#### July 4", "#### June 4", False),  # the reference is not a number
        ("#### 4", "#### June 4", False),
        # a number is one however it is written
        ("#### 19.00", "#### 19", True),
        ("#### .5", "#### 5", False),
        ("#### .5", "#### 0.50", True),
        ("#### 1/2", "#### 0.5", True),
        ("#### 1/3", "#### 2/6", True),
        ("#### 1/0", "#### 0", False),
        ("#### 50%", "#### 50", True),
        ("#### \u22125", "#### -5", True),
        ("#### -$5", "#### - 5", True),
        ("#### x = -5", "#### -5", True),
        ("#### 10-5", "#### -5", False),
        ("#### 1\u202f234", "#### 1,234", True),
        ("#### 1 234", "#### 1234", False),
        ("#### 12,34", "#### 1234", True),  # as GSM8K's scoring has it
        ("#### 123456789012345678901234567890", "#### 123456789012345678901234567891", False),
        ("#### 190", "#### 19", False),
        # no mark at all: whole texts, but for white space
        (" yes ", "yes", True),
        ("a  b\nc", "a b c", True),
        ("Yes", "yes", False),
        ("yes, 1,000", "yes, 1000", False),
        ("", "yes", False),
        # the mark in the text alone: the reference is the result
        ("#### yes", "yes", True),
        ("212 + 30 = 242\n#### 242", "242", True),
        ("#### 1,000 apples", "$1000", True),
        ("242 #### 24", "242", False),
        ("#### 242", "212 + 30 = 242", False),
    ],
)
def test_an_answer_is_right_where_its_result_is(text: str, reference: str, right: bool):
    assert is_exact(text, reference) is right


@pytest.mark.parametrize(
    ("text", "marked", "answer"),
    [
        ("6 * 7 = 42\n#### $1,042.\nmore", True, "1042"),
        ("#### 42 apples", True, "42 apples"),
        ("no result", True, None),
        ("done ####  ", True, ""),
        (" the  whole\ntext #### 1 ", False, "the whole text #### 1"),
    ],
)
def test_the_final_answer(text: str, marked: bool, answer: str | None):
    assert final_answer(text, marked) == answer


def test_what_each_token_adds_is_the_text_when_it_is_joined():
    """Also where a character is spread over several tokens, none of which is text alone."""
    text = "Ben has 215 ribbons, 猫 and ünï 🙂 \n#### 55"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found = pieces(ids, lambda some: TOKENIZER.decode(some, skip_special_tokens=True))
    assert len(found) == len(ids)
    assert "".join(found) == TOKENIZER.decode(ids)
    assert "\ufffd" not in "".join(found)
