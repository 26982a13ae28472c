"""`chorus generate` and `chorus chat`, on a run of single questions and on adapters of stock PEFT."""

import io
import json
import re
import shutil
import signal
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from families import of_family
from rich.console import Console
from stock import save_adapter, stock_base, stock_greedy, word_tokenizer
from stock_adapters import BASE, stock_text, write_adapters
from transformers import AutoTokenizer

from chorus.commands import chat, generate
from chorus.commands.answer_view import in_words, show
from chorus.commands.asking import Asked
from chorus.config import Config
from chorus.ensemble import decoding_batch, live_batch
from chorus.ensemble.live_batch import LiveBatch
from chorus.ensemble.texts import Answer, Ending, Text
from chorus.ensemble.uncertainty import AnswerUncertainty
from chorus.errors import InputError

QUESTION = "Ada has 12 apples. Ben gives Ada 7 more. How many apples has Ada?"
FEW = ("--max-new-tokens", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder)
    return folder


@pytest.fixture(scope="module")
def run(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run leaves it that was trained on single questions."""
    folder = tmp_path_factory.mktemp("run")
    for agent, name in enumerate(("one", "other")):
        shutil.copytree(adapters / name, folder / "agents" / f"agent_{agent}")
    agents = ["agents/agent_0", "agents/agent_1"]
    entries = {"agents": agents, "weights": [0.6, 0.4], "base_model": BASE, "row_form": "text"}
    (folder / "ensemble.json").write_text(json.dumps({**entries, "config": Config().model_dump()}))
    return folder


Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def call(*arguments: str | Path) -> str:
        generate.main([*map(str, arguments), *FEW])
        return capsys.readouterr().out

    return call


def test_a_member_writes_what_stock_peft_writes_after_the_runs_own_template(
    run: Path, adapters: Path, said: Said
):
    ids = AutoTokenizer.from_pretrained(BASE)(f"Question: {QUESTION}\nAnswer:")["input_ids"]
    for options, adapter in ((("--member", "1"), adapters / "other"), (("--base",), None)):
        assert said(run, QUESTION, *options) == stock_text(adapter, ids, 6) + "\n"


def test_adapters_without_a_run_are_asked_by_the_bases_chat_template(adapters: Path, said: Said):
    turns = [{"role": "user", "content": QUESTION}]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert said(adapters, QUESTION, "--member", "0") == stock_text(adapters / "one", ids, 6) + "\n"
    plain = tokenizer(QUESTION)["input_ids"]
    assert (
        said(adapters, QUESTION, "--member", "0", "--form", "plain")
        == stock_text(adapters / "one", plain, 6) + "\n"
    )


def test_json_has_every_figure_of_several_prompts_and_piped_text_has_none(
    run: Path, said: Said, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Wie spät?\n".encode())))
    found = json.loads(said(run, QUESTION, "-", "--json"))
    assert [one["prompt"] for one in found["answers"]] == [QUESTION, "Wie spät?"]
    for one in found["answers"]:
        assert one["model"] == "mixture"
        assert "".join(token["text"] for token in one["tokens"]) == one["text"]
        assert all(len(token["member_log_probs"]) == 2 for token in one["tokens"])
        assert one["uncertainty"]["mutual_information"] > 0
    text = said(run, QUESTION)
    assert text == found["answers"][0]["text"] + "\n"


def test_a_vote_takes_what_most_agents_say(run: Path, said: Said):
    alone = [said(run, QUESTION, "--member", str(agent)).rstrip("\n") for agent in (0, 1)]
    assert alone[0] != alone[1]
    found = json.loads(said(run, QUESTION, "--vote", "--json"))
    assert [one["text"] for one in found["answers"][0]["answers"]] == alone
    assert found["answers"][0]["text"] == alone[0], "of equal counts the first"
    assert "1 of 2 agents: 1 x" in said(run, QUESTION, "--vote")


def test_texts_end_at_the_last_learned_position_and_one_that_may_go_beyond_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """By steps as on a GPU, 16 at a time. The base has 64 positions."""
    for module in (decoding_batch, live_batch):
        monkeypatch.setattr(module, "steps_at_a_time", lambda device: 16)
    base, tokenizer = tmp_path / "base", word_tokenizer()
    of_family("gpt2").save_pretrained(base)
    tokenizer.save_pretrained(base)
    save_adapter(base, tmp_path / "agents" / "one", 0, r=2, target_modules=["c_attn"])
    long, short = (" ".join(f"w{30 + n % 30}" for n in range(length)) for length in (50, 3))

    def said(count: int) -> list[str]:
        limits = ["--max-new-tokens", str(count), "--device", "cpu", "--form", "plain", "--base", "--json"]
        capsys.readouterr()  # what a library printed as it was imported
        generate.main([str(tmp_path / "agents"), long, short, *limits])
        return [one["text"] for one in json.loads(capsys.readouterr().out)["answers"]]

    model, asked = stock_base(base), [tokenizer(text)["input_ids"] for text in (long, short)]
    for count in (13, 14):
        ids = [stock_greedy(model, prompt, count, 1) for prompt in asked]
        assert said(count) == [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    with pytest.raises(InputError, match=r"has 50 tokens.* longer than 64; ask for at most 14"):
        said(15)


def vote_of(*texts: str) -> Asked:
    ending = Ending(1, frozenset())
    own = [Text(0, (1,), ending, answer=Answer(text=text)) for text in texts]
    return Asked("", [f"agent_{n}" for n in range(len(texts))], own)


def test_votes_are_counted_as_exact_match_compares_answers():
    asked = vote_of(" 3 + 4 = 7\n#### 7", "1,000", " 2 + 5 = 7\n#### $7", "1,000 ", "#### 7.")
    assert asked.votes() == [("7", 3), ("1,000", 2)]
    assert asked.chosen == 0


class Page(HTMLParser):
    """The texts of elements, and whatever would load something or run."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.foreign = "", []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        if tag in ("script", "link", "img", "iframe") or names & {"src", "href", "onclick", "onerror"}:
            self.foreign.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_holds_prompt_and_answer_as_text_and_loads_nothing(run: Path, said: Said, tmp_path: Path):
    evil = '<script>alert(1)</script> <img src=x onerror=alert(1)> & "quotes"'
    file = tmp_path / "page.html"
    text = said(run, evil, "--html", file).rstrip("\n")
    page = Page()
    page.feed(file.read_text(encoding="utf-8"))
    assert page.foreign == []
    assert evil in page.text
    assert text in page.text
    assert "http" not in file.read_text(encoding="utf-8")


def terminal_text(no_color: bool) -> str:
    """What a terminal gets of a text on whose second token two agents differ."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer(" 12", add_special_tokens=False)["input_ids"]
    count = len(ids)
    mutual = [0.0, 0.6, *[0.0] * (count - 2)]
    answer = Answer(ids, "length", [-0.1] * count, [0.7] * count, mutual, [[-0.1, -0.2]] * count)
    text = Text(0, (1,), Ending(count, frozenset(), (), tokenizer), answer=answer, has_ended=True)
    answer.text = text.ending.text_of(answer)
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, no_color=no_color, color_system="standard", width=200, highlight=False
    )
    show(console, [Asked("a", ["mixture"], [text])], iter([None]))
    return file.getvalue()


def test_a_terminal_shows_by_colour_and_in_words_where_agents_disagree():
    coloured = terminal_text(no_color=False)
    assert "\x1b[32m \x1b[0m" in coloured
    assert "\x1b[1;37;41m1\x1b[0m" in coloured
    assert "The agents disagree, most about '1'" in coloured
    plain = terminal_text(no_color=True)
    assert not re.search(r"\x1b\[[\d;]*(3|4)\dm", plain)
    assert "The agents disagree" in plain


@pytest.mark.parametrize(
    ("mutual", "said"),
    [(0.0, "The agents agree:"), (0.1, "The agents mostly agree, least"), (0.5, "disagree")],
)
def test_words_follow_the_largest_disagreement(mutual: float, said: str):
    found = AnswerUncertainty(0.5, 0.9, 0.3, mutual / 2, mutual, (0.4, 0.6))
    assert said in in_words(found, "mixture", "7")
    assert "agent 3 alone" in in_words(found._replace(member_probabilities=(0.4,)), "agent_3", "7")


def test_what_would_steer_a_terminal_is_left_out(monkeypatch: pytest.MonkeyPatch):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer("a\x1b[2Jb", add_special_tokens=False)["input_ids"]
    answer = Answer(ids, "length", *([[0.0] * len(ids)] * 3), [[0.0]] * len(ids))
    text = Text(0, (1,), Ending(len(ids), frozenset(), (), tokenizer), answer=answer, has_ended=True)
    answer.text = text.ending.text_of(answer)
    file = io.StringIO()
    show(Console(file=file, highlight=False, markup=False), [Asked("a", ["base"], [text])], iter([None]))
    assert "\x1b" in answer.text
    assert "\x1b" not in file.getvalue()


def test_what_cannot_be_asked_is_refused_in_one_line(run: Path, adapters: Path, tmp_path: Path):
    cases: dict[str, tuple[tuple[Any, ...], str]] = {
        "an empty prompt": ((run, " "), "prompt 1 is empty"),
        "two runs": ((run, adapters, "a"), "is the folder"),
        "a key": ((run, "a", "max_new_tokens=5"), "max_new_tokens=5, which reads as a key"),
        "an unknown member": ((run, "a", "--member", "2"), "the agents are 0 to 1"),
        "too long a prompt": ((run, "a " * 2000), "longer than 1024"),
        "too many new tokens": ((run, "a", "--max-new-tokens", "5000"), "ask for at most"),
        "no run": ((tmp_path / "none", "a"), "no such folder"),
        "no folder for the page": ((run, "a", "--html", tmp_path / "none" / "a.html"), "--html"),
        "no template": ((adapters, "a", "--form", "template"), "prompt_template"),
        "two who answer": ((run, "a", "--base", "--vote"), "not allowed with"),
        "a temperature": ((run, "a", "--temperature", "-1"), "--temperature"),
        "an empty stop": ((run, "a", "--stop", ""), "--stop"),
        "a misspelt option": ((run, "a", "--jsn"), "--help shows"),
    }
    for name, (arguments, word) in cases.items():
        with pytest.raises(InputError) as caught:
            generate.main([*map(str, arguments), *(() if "--max-new-tokens" in arguments else FEW)])
        message = str(caught.value)
        assert word in message, (name, message)
        assert len(message.splitlines()) == 1, name


def chatted(
    lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat.main([*map(str, arguments), *FEW])
    return capsys.readouterr().out.splitlines()


def test_a_chat_gives_the_turns_so_far_to_a_chat_template(
    adapters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    turns: list[dict[str, str]] = []
    expected = ""
    for question in ("What is 2 + 3?", "And 4 + 3?"):
        turns.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = stock_text(adapters / "one", ids, 6)
        turns.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    lines = "What is 2 + 3?\nAnd 4 + 3?\n/reset\nWhat is 2 + 3?\n/what\n/quit\nnever\n"
    found = chatted(lines, monkeypatch, capsys, adapters, "--member", "0")
    again = turns[1]["content"] + "\nthere is no command /what; there is /reset and /quit\n"
    assert found == (expected + again).splitlines()


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    whole = chatted(f"{QUESTION}\n", monkeypatch, capsys, run)
    advance, steps = LiveBatch.advance, iter([False, True])

    def interrupted(batch: LiveBatch) -> None:
        advance(batch)
        if next(steps, False):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LiveBatch, "advance", interrupted)
    # A shell's job in the background ignores SIGINT, and so would these tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = chatted(f"{QUESTION}\n{QUESTION}\n", monkeypatch, capsys, run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found[0].endswith(" (ended)")
    assert whole[0].startswith(found[0].removesuffix(" (ended)"))
    assert found[1:] == whole
