from dataclasses import replace
from typing import Any

import pytest
from launching import ROOT
from toy import toy_agents
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chorus.config import Config
from chorus.data.templates import Form, Problem
from chorus.data.tokenise import Encoder, tell_unreadable
from chorus.ensemble.load import Ensemble
from chorus.ensemble.prompts import prompt_form
from chorus.errors import InputError

TWO = "Text: {context}\nFor {who}: {question}\nAnswer:"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(ROOT / "assets" / "tiny-gemma-2"))


def ensemble(tokenizer: PreTrainedTokenizerBase, more: dict[str, Any] | None = None, **keys: Any) -> Ensemble:
    """Of a run with these keys; of none where there are no entries."""
    description = {} if more is None else {"config": Config(**keys).model_dump(), **more}
    agents = toy_agents("fused", num_agents=2, trained=False)
    return Ensemble(agents, tokenizer, ("a", "b"), (0.5, 0.5), 1.0, "toy", description)


@pytest.mark.parametrize(
    ("more", "keys", "form"),
    [
        ({"row_form": "text"}, {}, "template"),
        ({"row_form": "turns (messages)"}, {}, "chat"),
        ({}, {}, "template"),
        ({}, {"dataset_name": "arithmetic_chat"}, "chat"),
        (None, {}, "chat"),
    ],
)
def test_a_prompt_has_the_form_of_the_rows(
    tokenizer: PreTrainedTokenizerBase, more: dict[str, Any] | None, keys: dict[str, Any], form: str
):
    found = prompt_form(ensemble(tokenizer, more, **keys))
    assert found.form == form
    if form == "template":
        row = Encoder(tokenizer).prompt(Problem("Question: Who?\nAnswer:", " I"))
        assert found.ask([{"role": "user", "content": "Who?"}]) == row


def test_adapters_over_a_base_without_a_chat_template_are_asked_plainly(tokenizer: PreTrainedTokenizerBase):
    bare = AutoTokenizer.from_pretrained(str(ROOT / "assets" / "tiny-gemma-2"))
    bare.chat_template = None
    found = prompt_form(ensemble(bare))
    assert found.form == "plain"
    assert found.ask([{"role": "user", "content": "Who?"}]) == tokenizer("Who?")["input_ids"]


def test_a_template_of_several_columns_takes_an_object_and_optional_columns_may_be_left_out(
    tokenizer: PreTrainedTokenizerBase,
):
    found = prompt_form(ensemble(tokenizer, {"row_form": "text"}, prompt_template=TWO))
    asked = found.ask([{"role": "user", "content": '{"who": "Ada", "question": "Why?"}'}])
    assert asked == tokenizer("Text: \nFor Ada: Why?\nAnswer:")["input_ids"]
    for content, word in (("Why?", "ask with an object"), ('{"who": "Ada"}', "question"), (" ", "is empty")):
        with pytest.raises(InputError, match=word):
            found.ask([{"role": "user", "content": content}])


def test_a_form_that_is_not_there_is_refused(tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(InputError, match="prompt_template"):
        prompt_form(replace(ensemble(tokenizer), description={}), "template")


@pytest.mark.parametrize("form", ["chat", "template", "plain"])
def test_a_prompt_with_a_token_that_the_base_cannot_read_is_refused(form: Form):
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "assets" / "tiny-gemma-2"))
    tell_unreadable(tokenizer, ["<image>"])
    found = prompt_form(ensemble(tokenizer, {}), form)
    with pytest.raises(InputError, match=r"it holds '<image>', a token .*; ask it otherwise"):
        found.ask([{"role": "user", "content": "What is <image>?"}])
