"""How long clients of `chorus serve` wait: seconds to the first token, tokens a second.

    python benchmarks/serving.py                     # gemma-2-2b shapes: under four minutes on an H100
    python benchmarks/serving.py --model tiny --small    # on a CPU, to see that it runs

The server and its clients are real, over HTTP. Weights and prompts are random, and no text ends early. The
clients of a round begin together. Beside it is transformers' generate of one merged adapter, which answers
a whole batch at once. Prints a table and writes serving.json to --out.
"""

import argparse
import gc
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
import uvicorn
from case import TARGETS
from conditions import conditions
from shapes import random_base
from timing import wait
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from chorus.data.tokenise import Encoder
from chorus.ensemble.load import Ensemble
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.prompts import PromptForm
from chorus.model.adapters import LoraShape
from chorus.model.agents import Regularisation, build_agents
from chorus.serving.app import build_app
from chorus.serving.opened import MIXTURE, Opened
from chorus.serving.scheduler import Scheduler

PROMPT = 64  # tokens
ROUNDS = 3  # the first one captures the steps of each size of batch, and is reported by itself


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    base = random_base(options.model, device, dtype, "eager")
    results: dict[str, Any] = {
        "about": {**conditions(device, dtype), "model": options.model, "K": options.agents}
    }
    results["about"] |= {"prompt_tokens": PROMPT, "new_tokens": options.new_tokens}
    results["stock"] = {f"{n}": stock_row(base, n, options.new_tokens, device) for n in options.clients}
    print(table("transformers, one merged adapter", results["stock"]), flush=True)
    opened = opened_of(base, options.agents)
    length = PROMPT + options.new_tokens + 64
    scheduler = Scheduler(opened.ensemble.agents, opened.answerers, length, max(options.clients), 1000)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(opened, scheduler, None), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    while not server.started:
        time.sleep(0.05)
    results["served"] = {f"{n}": served_row(port, n, options.new_tokens, opened) for n in options.clients}
    server.should_exit = True
    thread.join()
    print(table(f"chorus serve, mixture of {options.agents} agents", results["served"]))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serving.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gemma-2-2b", help="of benchmarks/shapes.py")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--small", action="store_true", help="8 new tokens, 1 and 3 clients")
    parser.add_argument("--out", type=Path, default=Path("runs/serving"))
    options = parser.parse_args()
    if options.small:
        options.new_tokens, options.clients = 8, [1, 3]
    return options


def opened_of(base: PreTrainedModel, num_agents: int) -> Opened:
    """Random agents as `chorus serve` opens them, with a word for every token; no token ends a text."""
    shape = LoraShape(16, 32.0, TARGETS, random_init=True, seed=0)
    agents = (
        build_agents("fused", base, num_agents, shape, Regularisation(0, 0, 0)).eval().requires_grad_(False)
    )
    vocabulary = base.config.get_text_config().vocab_size
    raw = Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocabulary)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1", bos_token="w2")
    members = tuple(agents.agents)
    weights = (1 / num_agents,) * num_agents
    names = tuple(f"agent_{agent}" for agent in members)
    ensemble = Ensemble(agents, tokenizer, names, weights, 1.0, "random weights", {})
    form = PromptForm("plain", "", frozenset(), Encoder(tokenizer), None, frozenset())
    return Opened(ensemble, (Answerer(MIXTURE, members, weights),), form, 8192)


def served_row(port: int, clients: int, new_tokens: int, opened: Opened) -> dict[str, float]:
    """Seconds of all requests of all rounds but the first."""
    vocabulary = opened.ensemble.agents.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(clients)
    prompts = torch.randint(3, vocabulary, (ROUNDS, clients, PROMPT), generator=generator).tolist()
    waited, seconds = [], []
    with ThreadPoolExecutor(clients) as pool:
        for own in prompts:
            begun = time.perf_counter()
            waited.append(list(pool.map(lambda prompt: first_token_s(port, prompt, new_tokens), own)))
            seconds.append(time.perf_counter() - begun)
    later = [second for own in waited[1:] for second in own]
    return {
        "first_token_s": median(later),
        "first_token_s_most": max(later),
        "tokens_per_s": clients * new_tokens * (ROUNDS - 1) / sum(seconds[1:]),
        "first_token_s_of_the_first_round": median(waited[0]),
        "seconds_of_the_first_round": seconds[0],
    }


def first_token_s(port: int, prompt: list[int], new_tokens: int) -> float:
    """Seconds to the first text of a stream, which is then read to its end."""
    body = {"model": MIXTURE, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    begun = time.perf_counter()
    options = {"include_usage": True}
    data = json.dumps({**body, "stream_options": options})
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    first, written = None, 0
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if first is None and event["choices"]:
                first = time.perf_counter() - begun
            written = event.get("usage", {}).get("completion_tokens", written)
    connection.close()
    assert first is not None
    assert written == new_tokens
    return first


def stock_row(base: PreTrainedModel, texts: int, new_tokens: int, device: torch.device) -> dict[str, float]:
    """transformers' generate of a batch of texts. A merged adapter leaves the base's own shapes."""
    generator = torch.Generator().manual_seed(texts)
    vocabulary = base.config.get_text_config().vocab_size
    ids_BT = torch.randint(3, vocabulary, (texts, PROMPT), generator=generator).to(device)
    seconds: dict[int, float] = {}
    for tokens in (2, 1, new_tokens):  # the first is the warm-up
        wait(device)
        begun = time.perf_counter()
        how: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        base.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), pad_token_id=0, **how)
        wait(device)
        seconds[tokens] = time.perf_counter() - begun
    gc.collect()
    return {"first_token_s": seconds[1], "tokens_per_s": texts * new_tokens / seconds[new_tokens]}


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    lines = [f"--- {title}"]
    for clients, row in rows.items():
        figures = ", ".join(f"{name} {value:,.3f}" for name, value in row.items())
        lines.append(f"{clients} clients: {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
