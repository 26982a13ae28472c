"""`chorus serve` as its clients see it: one server, asked by OpenAI's own client."""

import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch
from launching import ROOT, environment, wait_for
from peft import PeftModel
from served import KEY, Served
from stock_adapters import BASE, base, stock_text, write_adapters
from transformers import AutoTokenizer

from chorus.commands.ask import main as ask
from chorus.ensemble.decode import generate
from chorus.ensemble.next_token import Answerer
from chorus.errors import InputError
from chorus.serving.opened import Opened, open_ensemble

pytestmark = pytest.mark.launch
SEATS, WAITING, LONGEST = 4, 40, 1020
NAMES = [["Ada", "Ben", "Cleo", "Dan"][n % 4] for n in range(32)]
PROMPTS = [f"{name} has {n + 3} apples." for n, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def opened(adapters: list[Path]) -> Opened:
    return open_ensemble([str(adapters[0].parent)], None, "auto", "cpu", None)


@pytest.fixture(scope="module")
def server(adapters: list[Path]) -> Iterator[Served]:
    limits = ["--max-texts", str(SEATS), "--max-waiting", str(WAITING), "--port", "0"]
    limits += ["--max-length", str(LONGEST)]
    process = subprocess.Popen(
        [sys.executable, "-m", "chorus", "serve", str(adapters[0].parent), "--device", "cpu", *limits],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT / "src"), CHORUS_API_KEY=KEY),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = ""
    while not line.startswith("serving "):
        line = process.stderr.readline()
        assert line, "the server has ended"
    yield Served(process, int(line.split("127.0.0.1:")[1].split("/")[0]))
    process.kill()
    process.wait()


def alone(opened: Opened, answerer: Answerer, prompt: str, max_new_tokens: int) -> str:
    """The text that the ensemble writes without a server, greedily."""
    ids = AutoTokenizer.from_pretrained(BASE)(prompt)["input_ids"]
    ends = opened.form.end_ids
    how = {"max_new_tokens": max_new_tokens, "end_ids": ends, "tokenizer": opened.ensemble.tokenizer}
    [[answer]] = generate(opened.ensemble.agents, [answerer], [ids], **cast(Any, how))
    return answer.text


def test_a_text_may_have_as_many_tokens_as_the_option_says_and_no_more(server: Served):
    asked: dict[str, Any] = {"model": "agent_0", "prompt": [5] * (LONGEST - 2), "temperature": 0}
    usage = server.client.completions.create(**asked, max_tokens=2).usage
    assert usage is not None
    assert usage.total_tokens == LONGEST
    with pytest.raises(openai.BadRequestError, match=f"longer than {LONGEST}; ask for at most 2"):
        server.client.completions.create(**asked, max_tokens=3)


def test_the_models_are_the_mixture_the_agents_and_the_base(server: Served):
    assert [model.id for model in server.client.models.list()] == ["mixture", "agent_0", "agent_1", "base"]
    assert server.client.models.retrieve("agent_1").id == "agent_1"
    assert server.health() == {"status": "ok", "running": 0, "waiting": 0}


def test_32_clients_at_once_get_the_answers_they_get_alone(server: Served, opened: Opened):
    limits = [3 + n % 7 for n in range(32)]
    all_are_there = threading.Barrier(32)

    def ask(n: int) -> str:
        all_are_there.wait(60)
        answerer = opened.names[n % 4]
        how: dict[str, Any] = {"max_tokens": limits[n], "temperature": 0}
        if n % 3 == 0:
            events = server.client.completions.create(model=answerer, prompt=PROMPTS[n], stream=True, **how)
            return "".join(event.choices[0].text for event in events)
        found = server.client.completions.create(model=answerer, prompt=PROMPTS[n], **how)
        assert found.usage is not None
        assert found.usage.completion_tokens <= limits[n]
        return found.choices[0].text

    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(ask, range(32)))
    assert answers == [alone(opened, opened.answerers[n % 4], PROMPTS[n], limits[n]) for n in range(32)]
    assert len(set(answers)) > 20


def test_each_agent_answers_as_stock_peft_does(server: Served, adapters: list[Path]):
    prompt = "Ada has 12 apples."
    ids = AutoTokenizer.from_pretrained(BASE)(prompt)["input_ids"]
    for name, adapter in {"agent_0": adapters[0], "agent_1": adapters[1], "base": None}.items():
        found = server.client.completions.create(model=name, prompt=ids, max_tokens=8, temperature=0)
        assert found.choices[0].text == stock_text(adapter, ids, 8)


def test_an_echoed_prompt_has_the_log_probabilities_that_stock_peft_gives_it(
    server: Served, adapters: list[Path]
):
    ids = AutoTokenizer.from_pretrained(BASE)(PROMPTS[0])["input_ids"]
    found = server.client.completions.create(
        model="agent_1", prompt=PROMPTS[0], max_tokens=0, echo=True, logprobs=0
    )
    own = found.choices[0].logprobs
    assert own is not None
    assert own.token_logprobs is not None
    model = PeftModel.from_pretrained(base(), str(adapters[1])).eval()
    with torch.no_grad():
        log_prob_TV = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = log_prob_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found.choices[0].text == PROMPTS[0]
    assert "".join(own.tokens or []) == PROMPTS[0]
    assert own.token_logprobs[0] is None
    assert own.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_a_chat_says_the_same_whole_and_in_pieces_with_its_uncertainty(server: Served):
    how: dict[str, Any] = {
        "model": "mixture",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "What is 2 + 3?"}]},
        ],
        "max_completion_tokens": 12,
        "seed": 5,
        "temperature": 0.9,
        "top_p": 0.95,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = server.client.chat.completions.create(**how)
    [choice] = whole.choices
    events = list(
        server.client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    )
    pieces = [event.choices[0] for event in events if event.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
    assert pieces[-1].finish_reason == choice.finish_reason
    assert pieces[-1].uncertainty == choice.uncertainty  # pyright: ignore[reportAttributeAccessIssue]
    assert events[-1].usage == whole.usage
    tokens = [token for piece in pieces if piece.logprobs for token in piece.logprobs.content or []]
    assert choice.logprobs is not None
    assert tokens == choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    uncertainty = choice.uncertainty  # pyright: ignore[reportAttributeAccessIssue]
    assert 0 < uncertainty["probability"] <= uncertainty["token_probability"] <= 1
    assert len(uncertainty["member_probabilities"]) == 2
    assert 0 < uncertainty["mutual_information"] < uncertainty["entropy"]


def test_a_seed_gives_the_same_different_answers_again_and_stop_ends_them(server: Served):
    def answers(seed: int, **more: Any) -> list[str]:
        found = server.client.completions.create(
            model="mixture", prompt=["Ada", "Ben has"], n=2, seed=seed, max_tokens=10, temperature=1.5, **more
        )
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        return [choice.text for choice in found.choices]

    first = answers(3)
    assert len(set(first)) == 4
    assert answers(3) == first
    assert answers(4) != first
    stop = first[0].strip()[2:5]
    stopped = answers(3, stop=[stop])
    assert stopped == [text.split(stop)[0] for text in first]


CHAT = {"model": "mixture", "messages": [{"role": "user", "content": "a"}]}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}
TEXT = {"model": "mixture", "prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("chat/completions", '{"model": ', 400, "not valid JSON"),
        ("chat/completions", "[]", 400, "valid dictionary"),
        ("chat/completions", {**CHAT, "model": "gpt-4"}, 404, "there is mixture, agent_0, agent_1, base"),
        ("chat/completions", {**CHAT, "messages": []}, 400, "messages"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": " "}]}, 400, "empty"),
        ("chat/completions", {**CHAT, "messages": [{"role": "robot", "content": "a"}]}, 400, "role"),
        ("chat/completions", {**CHAT, "tools": [{}]}, 400, "tools: is not supported"),
        (
            "chat/completions",
            {**CHAT, "presence_penalty": 1},
            400,
            "presence_penalty: is not supported; leave",
        ),
        (
            "chat/completions",
            {**CHAT, "logit_bias": {"1": 2}},
            400,
            "logit_bias: is not supported; leave it out",
        ),
        ("chat/completions", {**CHAT, "messages": [IMAGE]}, 400, "content: only parts of type text are"),
        ("chat/completions", {**CHAT, "max_tokens": 10**6}, 400, "longer than"),
        ("chat/completions", {**CHAT, "n": 99}, 400, "99 answers are more than "),
        ("chat/completions", {**CHAT, "temperature": -1}, 400, "temperature"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "needs logprobs"),
        ("completions", {**TEXT, "prompt": []}, 400, "prompt"),
        ("completions", {**TEXT, "prompt": [10**6]}, 400, "token ids from 0 to"),
        ("completions", {**TEXT, "prompt": "a " * 5000}, 400, "shorten the prompt"),
        ("completions", {**TEXT, "stop": ""}, 400, "stop"),
        ("completions", {**TEXT, "echo": True, "stream": True}, 400, "echo cannot be streamed"),
        ("completions", {**TEXT, "prompt": "a" * 9_000_000}, 413, "bytes"),
        ("elsewhere", {}, 404, "there is no /v1/elsewhere; there is /v1/models, /v1/completions, "),
    ],
)
def test_a_malformed_request_is_refused_in_one_line(
    server: Served, path: str, body: object, status: int, word: str
):
    found, answer = server.send("POST", f"/v1/{path}", body)
    message = answer["error"]["message"]
    assert (found, len(message.splitlines())) == (status, 1), message
    assert word in message
    assert answer["error"]["type"] == "invalid_request_error"


def test_without_the_key_nothing_is_answered(server: Served):
    for given in ("Bearer another", "", KEY):
        status, answer = server.send("POST", "/v1/completions", TEXT, Authorization=given)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    stranger = server.client.with_options(api_key="another")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_clients_that_hang_up_free_their_seats_and_a_full_queue_says_so(server: Served):
    """Four long texts hold all seats. What waits is answered as soon as their clients are gone."""
    streams = [server.open_stream(1000) for _ in range(SEATS)]
    assert server.health() == {"status": "ok", "running": SEATS, "waiting": 0}

    def ask(n: int) -> str:
        return server.client.completions.create(**{**TEXT, "prompt": PROMPTS[n % 32]}).choices[0].text

    with ThreadPoolExecutor(WAITING) as clients:
        waiting = [clients.submit(ask, n) for n in range(WAITING)]
        wait_for(lambda: server.health()["waiting"] == WAITING)
        with pytest.raises(openai.RateLimitError, match="too many requests wait"):
            ask(0)
        for stream in streams:
            stream.close()
            stream.own_connection.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert all(isinstance(one.result(), str) for one in waiting)
    assert server.health() == {"status": "ok", "running": 0, "waiting": 0}


def test_ask_mixes_the_agents_answers_by_their_probabilities_under_stock_peft(
    server: Served, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    weights = tmp_path / "ensemble.json"
    entries = {"weights": [0.7, 0.3], "base_model": BASE, "config": {"prompt_template": "Q: {question}\nA:"}}
    weights.write_text(json.dumps(entries))
    url = f"http://127.0.0.1:{server.port}/v1"
    options = ["--max-new-tokens", "40", "--api-key", KEY, "--json", "--samples", "2", "--temperature", "0.7"]
    ask([url, "2 + 3?", "--weights", str(weights), *options])
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "Q: 2 + 3?\nA:"
    assert found["models"] == ["agent_0", "agent_1"]
    assert sum(one["count"] for one in found["answers"]) == 4
    assert any(one["is_whole"] for one in found["answers"])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    models = [PeftModel.from_pretrained(base(), str(folder)).eval() for folder in adapters]
    first = len(tokenizer(found["prompt"])["input_ids"])
    mixed = []
    for one in found["answers"]:
        end = [tokenizer.eos_token_id] if one["is_whole"] else []
        ids = [*tokenizer(found["prompt"] + one["text"])["input_ids"], *end]
        own = []
        for model in models:
            with torch.no_grad():
                log_prob_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            own.append(sum(float(log_prob_TV[n - 1, ids[n]]) for n in range(first, len(ids))))
        assert list(one["log_probs"].values()) == pytest.approx(own, abs=1e-3)
        mixed.append(math.log(0.7 * math.exp(own[0]) + 0.3 * math.exp(own[1])))
        assert one["mixed_log_prob"] == pytest.approx(mixed[-1], abs=1e-3)
    assert mixed == sorted(mixed, reverse=True)
    assert sum(one["share"] for one in found["answers"]) == pytest.approx(1)
    ask([url, "2 + 3?", "--weights", str(weights), *[one for one in options if one != "--json"]])
    assert capsys.readouterr().out == found["text"].strip() + "\n"


def test_ask_refuses_in_one_line_what_cannot_be_mixed(server: Served, tmp_path: Path):
    url = f"http://127.0.0.1:{server.port}"
    weights = tmp_path / "ensemble.json"
    weights.write_text(json.dumps({"weights": [1.0], "base_model": BASE}))
    known = ["--api-key", KEY, "--end", "<eos>"]
    cases = {
        "no end token": ([url, "a"], "--end"),
        "no server": (["http://127.0.0.1:1", "a", *known], "start the server, or correct the URL"),
        "no such model": ([url, "a", "--models", "agent_7", *known], "base; correct --models or the URL"),
        "no key": ([url, "a", "--end", "<eos>", "--api-key", "x"], "; give the server's key with --api-key"),
        "too much": (
            [url, "a", "--max-new-tokens", "9999", *known],
            "; --max-new-tokens, --samples and other",
        ),
        "other weights": ([url, "a", "--weights", str(weights), *known], "2 agents"),
        "no URL": (["localhost", "a", *known], "http"),
        "twice": ([url, "a", "--models", "agent_0,agent_0", *known], "twice"),
        "columns": ([url, "a", "--template", "{a} {b}", *known], "exactly one"),
        "empty": ([url, " ", *known], "empty"),
    }
    for name, (arguments, word) in cases.items():
        with pytest.raises(InputError) as caught:
            ask(arguments)
        message = str(caught.value)
        assert word in message, (name, message)
        assert len(message.splitlines()) == 1, name


def test_sigterm_finishes_what_is_under_way_and_ends_with_code_0(server: Served):
    stream = server.open_stream(150)
    server.process.send_signal(signal.SIGTERM)
    rest = stream.read().decode().strip().split("\n\n")
    assert rest[-1] == "data: [DONE]"
    last = json.loads(rest[-2].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(timeout=300) == 0
    with pytest.raises(OSError, match="refused"):
        server.health()
