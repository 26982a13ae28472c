"""Turns: read from the forms that people have, rendered by a chat template, learnt where TRL learns them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from files_made import write
from rows import TOKENIZER, data_config, read_problems, read_rows, write_lines
from tokenizers_made import make_tokenizer

from chorus.data.samples import Sample
from chorus.errors import InputError

EOS = TOKENIZER.eos_token_id
USER, ANSWER = {"role": "user", "content": "What is 1 plus 1?"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Answer with a number."}
MORE = [{"role": "user", "content": "And 3 more?\n"}, {"role": "assistant", "content": " 5 "}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
TOOL_TURNS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    ANSWER,
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CONVERSATIONS = [[USER, ANSWER], [SYSTEM, USER, ANSWER, *MORE], [USER, ANSWER, *MORE, USER], TOOL_TURNS]
# As Gemma's: no mark of what is generated, and a line break after the token that ends a turn.
UNMARKED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<mask>' + m.role + '\n' + m.content | trim + '<unk>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<mask>assistant\n' }}{% endif %}"
)


def samples_of_rows(
    tmp_path: Path, rows: list[dict], tokenizer: Any = TOKENIZER, **keys: object
) -> list[Sample]:
    return list(read_rows(data_config(write_lines(tmp_path / "rows.jsonl", rows), **keys), tokenizer).train)


def with_template(template: str) -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def learnt_texts(sample: Sample, tokenizer: Any = TOKENIZER) -> list[str]:
    """The text of each run of learnt tokens."""
    texts, before = [], False
    for token, is_target in zip(sample.ids.tolist(), sample.is_target.tolist(), strict=True):
        if is_target:
            texts = (
                [*texts[:-1], texts[-1] + tokenizer.decode([token])]
                if before
                else [*texts, tokenizer.decode([token])]
            )
        before = is_target
    return texts


# ---- the same tokens and the same loss as in TRL ----


def of_trl(
    tmp_path: Path, rows: list[dict], tokenizer: Any, **keys: object
) -> list[tuple[list[int], list[bool]]]:
    """Token ids, and where loss is due, of each row in TRL's SFTTrainer."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    settings = trl.SFTConfig(
        str(tmp_path / "trl"), max_length=None, report_to=[], use_cpu=True, bf16=False, **keys
    )
    trainer = trl.SFTTrainer(
        "assets/tiny-gemma-2",
        settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [(row["input_ids"], [one != -100 for one in row["labels"]]) for row in trainer.train_dataset]


def assert_equal(samples: list[Sample], theirs: list[tuple[list[int], list[bool]]]) -> None:
    ours = [(sample.ids.tolist(), sample.is_target.tolist()) for sample in samples]
    for (ids, learnt), (their_ids, their_learnt) in zip(ours, theirs, strict=True):
        assert TOKENIZER.convert_ids_to_tokens(ids) == TOKENIZER.convert_ids_to_tokens(their_ids)
        assert learnt == their_learnt
        assert any(learnt)
        assert not all(learnt)


def test_turns_get_the_tokens_and_the_loss_of_trl(tmp_path: Path) -> None:
    rows: list[dict] = [{"messages": turns, "tools": None} for turns in CONVERSATIONS]
    rows.append({"messages": [SYSTEM, *TOOL_TURNS, *MORE], "tools": TOOLS})
    theirs = of_trl(tmp_path, rows, copy.deepcopy(TOKENIZER), assistant_only_loss=True)
    assert_equal(samples_of_rows(tmp_path, rows), theirs)


@pytest.mark.parametrize("template", [None, UNMARKED])
def test_prompts_and_completions_of_turns_get_the_tokens_and_the_loss_of_trl(
    tmp_path: Path, template: str | None
) -> None:
    rows: list[dict] = [
        {"prompt": [USER], "completion": [ANSWER], "tools": None},
        {"prompt": [USER, ANSWER, MORE[0]], "completion": [MORE[1]]},  # the first answer is given, not learnt
    ]
    if template is None:
        rows.append({"prompt": [SYSTEM, USER, *TOOL_TURNS[1:3]], "completion": [ANSWER], "tools": TOOLS})
    tokenizer = copy.deepcopy(TOKENIZER) if template is None else with_template(template)
    theirs = of_trl(tmp_path, rows, copy.deepcopy(tokenizer))
    assert_equal(samples_of_rows(tmp_path, rows, tokenizer), theirs)


# ---- what is learnt ----


def test_loss_is_on_every_turn_of_the_assistants_with_its_end_and_on_nothing_else(tmp_path: Path) -> None:
    samples = samples_of_rows(tmp_path, [{"messages": turns} for turns in CONVERSATIONS])
    call = json.dumps(CALL["function"])
    assert [learnt_texts(sample) for sample in samples] == [
        ["2<eos>"], ["2<eos>", "5<eos>"], ["2<eos>", "5<eos>"], [f"\n# Call {call}<eos>", "2<eos>"],
    ]  # fmt: skip
    assert all(sample.ids.tolist().count(TOKENIZER.bos_token_id) == 1 for sample in samples)


def test_without_marks_the_turns_before_and_up_to_an_answer_tell_what_is_learnt(tmp_path: Path) -> None:
    tokenizer = with_template(UNMARKED)
    rows = [{"messages": [USER, ANSWER, *MORE]}]
    [sample] = samples_of_rows(tmp_path, rows, tokenizer)
    assert learnt_texts(sample, tokenizer) == ["2<unk>\n", "5<unk>\n"]
    held_out = read_rows(
        data_config(tmp_path / "rows.jsonl", validation_dataset_name=str(tmp_path / "rows.jsonl")), tokenizer
    )
    scored = held_out.held_out(tokenizer, 1)
    assert scored.end_ids == [EOS, tokenizer.unk_token_id]  # what closes a turn ends an answer


def test_a_turn_of_weight_0_is_not_learnt(tmp_path: Path) -> None:
    turns = [USER, {**ANSWER, "weight": 0}, *MORE]
    assert learnt_texts(samples_of_rows(tmp_path, [{"messages": turns}])[0]) == ["5<eos>"]


def test_a_template_that_closes_no_turn_gets_the_end_token(tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
                        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")  # fmt: skip
    [sample] = samples_of_rows(tmp_path, [{"messages": [USER, ANSWER]}], chat_template=str(template))
    assert learnt_texts(sample) == [" 2\n<eos>"]  # with the space that the tokenizer joins
    assert (
        sample.ids[0] == TOKENIZER.bos_token_id
    )  # which the template does not write, and the tokenizer would


@pytest.mark.parametrize(
    ("marked", "message"),
    [
        (
            "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}",
            r"marks '2', where .* turn is '2<eos>'",
        ),
        (
            "{{ m.content }}{% generation %}{{ eos_token }}{% endgeneration %}",
            r"marks '<eos>', where .* is '2<eos>'",
        ),
    ],
)
def test_marks_and_turns_that_disagree_are_refused(tmp_path: Path, marked: str, message: str) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A\n' }}" + marked +
        "{% else %}{{ 'U\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A\n' }}{% endif %}"
    )  # fmt: skip
    with pytest.raises(InputError, match=rf"rows.jsonl:1: key 'chat_template': {{% generation %}} {message}"):
        samples_of_rows(tmp_path, [{"messages": [USER, ANSWER]}], with_template(template))


def test_a_template_that_renders_earlier_turns_otherwise_needs_marks(tmp_path: Path) -> None:
    """As templates that leave out what was thought in earlier turns."""
    body = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A\n' }}[{{ 'thought' if "
        "loop.last }}"
        "{{ m.content + eos_token }}]{% else %}{{ 'U\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A\n' }}{% endif %}"
    )
    rows = [{"messages": [USER, ANSWER, *MORE]}]
    with pytest.raises(
        InputError, match=r"key 'chat_template': the template renders a turn otherwise once others"
    ):
        samples_of_rows(tmp_path, rows, with_template(body.replace("[", "").replace("]", "")))
    marked = with_template(body.replace("[", "{% generation %}").replace("]", "{% endgeneration %}"))
    assert learnt_texts(samples_of_rows(tmp_path, rows, marked)[0]) == ["2<eos>", "thought 5 <eos>"]


# ---- the forms of rows ----


SHAREGPT = [{"from": "system", "value": SYSTEM["content"]}, {"from": "human", "value": USER["content"]},
            {"from": "gpt", "value": "2"}]  # fmt: skip
PARTS = [SYSTEM, {"role": "user", "content": [{"type": "text", "text": USER["content"]}]}, ANSWER]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER, ANSWER]},
        {"messages": PARTS},
        {"messages": json.dumps([SYSTEM, USER, ANSWER])},
        {"messages": [USER, ANSWER], "system": SYSTEM["content"]},
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": SYSTEM["content"], "id": "7"},
        {"conversations": [SYSTEM, USER, ANSWER]},
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"system": SYSTEM["content"], "instruction": USER["content"], "input": "", "output": "2"},
        {"system": SYSTEM["content"], "instruction": "What is", "input": "1 plus 1?", "response": "2"},
    ],
)
def test_the_forms_of_one_conversation_are_one_row(tmp_path: Path, row: dict) -> None:
    [sample] = samples_of_rows(tmp_path, [row])
    expected = "<bos># System\nAnswer with a number.\n# User\nWhat is 1 plus 1?\n# Assistant\n2<eos>"
    assert TOKENIZER.decode(sample.ids).replace("is\n\n1", "is 1") == expected
    assert learnt_texts(sample) == ["2<eos>"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "folder"])
def test_every_format_that_holds_lists_holds_turns(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"messages": [SYSTEM, USER, ANSWER, *MORE]}, {"messages": [USER, ANSWER]}])
    rows = read_rows(data_config(path))
    assert [learnt_texts(sample) for sample in rows.train] == [["2<eos>", "5<eos>"], ["2<eos>"]]


def test_plain_columns_become_turns_where_they_are_asked_to(tmp_path: Path) -> None:
    rows, keys = [{"question": USER["content"], "answer": "2"}], {"prompt_template": "{question}"}
    [sample] = samples_of_rows(tmp_path, rows, row_format="chat", **keys)
    assert TOKENIZER.decode(sample.ids) == "<bos># User\nWhat is 1 plus 1?\n# Assistant\n2<eos>"
    [sample] = samples_of_rows(tmp_path, rows, **keys)
    assert TOKENIZER.decode(sample.ids) == "<bos>What is 1 plus 1? 2<eos>"


def test_a_table_fills_no_arguments_of_other_calls_in(tmp_path: Path) -> None:
    """Arrow gives all objects of a column all keys, with nulls for those that a row has not."""
    call = {"type": "function", "function": {"name": "city", "arguments": {"name": "x"}}}
    other = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, ANSWER]
    rows = [{"messages": TOOL_TURNS}, {"messages": other}]
    expected = [sample.ids.tolist() for sample in samples_of_rows(tmp_path, rows)]
    for name in ("rows.parquet", "folder"):
        found = read_rows(data_config(write(tmp_path / name, rows))).train
        assert [sample.ids.tolist() for sample in found] == expected


def test_an_end_token_that_the_answer_brings_is_not_doubled(tmp_path: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "2<eos>\n"}, *MORE]
    assert learnt_texts(samples_of_rows(tmp_path, [{"messages": turns}])[0]) == ["2<eos>", "5<eos>"]


def test_tools_are_left_in_place(tmp_path: Path) -> None:
    for tools in (TOOLS, json.dumps(TOOLS)):
        [sample] = samples_of_rows(tmp_path, [{"messages": TOOL_TURNS, "tools": tools}])
        whole = TOKENIZER.apply_chat_template(TOOL_TURNS, tools=TOOLS, return_dict=True)["input_ids"]
        assert sample.ids.tolist() == whole
        assert "# Tool\n2" in TOKENIZER.decode(sample.ids)


BAD = [
    ({"messages": [USER]}, "no turn of the assistant's is to be learnt"),
    (
        {"messages": [USER, {"role": "assistant", "content": " "}]},
        "turn 2 of 'messages', the assistant's, is empty",
    ),
    (
        {"messages": [USER, {"role": "assistant"}]},
        "turn 2 of 'messages' must have text as content, has NoneType",
    ),
    (
        {"messages": [USER, {"role": "narrator", "content": "x"}]},
        "turn 2 of 'messages' is of 'narrator'; a role",
    ),
    (
        {"messages": [USER, {"role": "user", "content": [{"type": "image"}]}]},
        "turn 2 of 'messages' holds a part that",
    ),
    ({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, "which is not text"),
    ({"messages": []}, "field 'messages' must be a list of turns"),
    ({"text": "x"}, "field 'messages' is missing"),
]


@pytest.mark.parametrize(("bad", "fault"), BAD)
def test_a_bad_row_of_turns_is_named_and_can_be_skipped(tmp_path: Path, bad: dict, fault: str) -> None:
    rows = [{"messages": [USER, ANSWER]}, bad, {"messages": [USER, ANSWER]}]
    with pytest.raises(InputError, match=r"rows.jsonl:2: ") as error:
        samples_of_rows(tmp_path, rows)
    assert fault in str(error.value)
    assert "skip_bad_rows: true" in str(error.value)
    assert len(samples_of_rows(tmp_path, rows, skip_bad_rows=True)) == 2


def test_what_a_template_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"rows.jsonl:1: the chat template refuses it: System role not supported"
    ):
        samples_of_rows(tmp_path, [{"messages": [SYSTEM, USER, ANSWER]}], with_template(UNMARKED))


def test_turns_without_a_chat_template_are_refused_with_what_helps(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"key 'chat_template': the rows hold turns, .*has no chat template; name a"
    ):
        samples_of_rows(tmp_path, [{"messages": [USER, ANSWER]}], make_tokenizer())
    with pytest.raises(InputError, match=r"key 'chat_template': cannot read nowhere.jinja"):
        samples_of_rows(tmp_path, [{"messages": [USER, ANSWER]}], chat_template="nowhere.jinja")
    with pytest.raises(InputError, match=r"key 'row_format': chat, but .* holds no turns"):
        samples_of_rows(tmp_path, [{"text": "x"}], row_format="chat")


# ---- what is asked ----


def test_agents_are_asked_as_the_template_asks(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": turns} for turns in CONVERSATIONS])
    scored = read_rows(data_config(path, validation_dataset_name=str(path))).held_out(TOKENIZER, 10)
    for row, turns, answer in zip(scored.rows, CONVERSATIONS, ("2", "5", "5", "2"), strict=True):
        last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
        asked = TOKENIZER.apply_chat_template(turns[:last], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert row.prompt == asked == row.sample.ids[: len(asked)].tolist()
        assert TOKENIZER.decode(row.answer, skip_special_tokens=True) == answer
    assert scored.end_ids == [EOS]


def test_the_built_in_task_has_a_form_of_turns() -> None:
    (train, held_out), (plain, _) = (
        read_problems(data_config("arithmetic_chat")),
        read_problems(data_config("arithmetic")),
    )
    assert (len(train), len(held_out)) == (4_000, 500)
    texts = (plain[0][0].removesuffix("\nA:"), "A:" + plain[0][1])
    question, answer = (part.split(":", 1)[1].strip() for part in texts)
    assert train[0] == (f"<bos># User\n{question}\n# Assistant\n", f"{answer}<eos>")


def test_a_chat_template_that_no_row_needs_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    template = tmp_path / "template.jinja"
    template.write_text("{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}")
    file = write_lines(tmp_path / "rows.jsonl", [{"question": "1", "answer": "2"}])
    for row_format in ("chat", "auto"):
        assert "key 'chat_template' does nothing" not in caplog.text
        read_rows(data_config(file, chat_template=str(template), row_format=row_format)).log()
    assert "key 'chat_template' does nothing" in caplog.text
