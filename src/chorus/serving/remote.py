"""Agents behind another server that speaks OpenAI's protocol, as vLLM and SGLang do, each under its own name.

Such a server cannot mix the agents' next tokens. But it can score a given text under each agent, by a
completion request that echoes the prompt with log-probabilities. So whole answers are mixed:

    p(answer) = sum_k w_k p_k(answer)
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from chorus.ensemble.mixture import mixture_log_prob
from chorus.errors import InputError, RunError

REMEDIES = {  # by status
    400: "--max-new-tokens, --samples and other options set what is asked for",
    401: "give the server's key with --api-key or in OPENAI_API_KEY",
    404: "correct --models or the URL",
    429: "ask later, or let the server take more requests at a time",
}


class Candidate(NamedTuple):
    """A distinct answer of some agents.

    Attributes:
        is_whole: it ended with an end token or a stop string, not by the limit of tokens.
        models: the agents that gave it, one name for each time.
        log_probs: of its tokens together, under each agent.
        mixed_log_prob: under the mixture.
    """

    text: str
    is_whole: bool
    models: tuple[str, ...]
    log_probs: tuple[float, ...]
    mixed_log_prob: float


@dataclass(frozen=True)
class Remote:
    """A server.

    Attributes:
        url: without /v1.
    """

    url: str
    api_key: str | None
    timeout_s: float

    def get(self, path: str) -> Any:
        """See `_send`."""
        return self._send(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """See `_send`."""
        return self._send(path, body)

    def _send(self, path: str, body: dict[str, Any] | None) -> Any:
        """The answer's JSON.

        Raises:
            InputError: the server cannot be reached, or refuses the request.
            RunError: it fails, or does not answer in time.
        """
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers)  # http alone, see `remote_of`
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = _message_of(error.read())
            kind = RunError if error.code >= 500 else InputError
            remedy = REMEDIES.get(error.code, "change the request or the server")
            raise kind(f"{self.url}{path}: answers {error.code}: {said}; {remedy}") from None
        except TimeoutError:
            raise RunError(f"{self.url}{path}: no answer in {self.timeout_s:g} s; raise --timeout") from None
        except urllib.error.URLError as error:
            what = f"{self.url}: cannot be reached ({error.reason})"
            raise InputError(f"{what}; start the server, or correct the URL") from None
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.url}{path}: no JSON came back ({error}); name a server that speaks OpenAI's protocol"
            ) from None


def remote_of(url: str, api_key: str | None, timeout_s: float) -> Remote:
    """The server at a URL, with or without /v1 at its end.

    Raises:
        InputError: no http or https URL.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: is not an http or https URL; name one such as http://127.0.0.1:8000")
    return Remote(url.rstrip("/").removesuffix("/v1"), api_key, timeout_s)


def _message_of(content: bytes) -> str:
    """The server's error message, in one line."""
    try:
        said = json.loads(content)
        said = said.get("error", said) if isinstance(said, dict) else said
        text = said.get("message", said) if isinstance(said, dict) else said
    except ValueError:
        text = content.decode(errors="replace")
    return " ".join(str(text).split())[:300] or "nothing"


def served_agents(remote: Remote) -> list[str]:
    """The models of the server that are adapters: those that name a parent, or agent_0, agent_1, ...

    Raises:
        InputError: there is none.
    """
    entries = remote.get("/v1/models").get("data", [])
    found = [entry["id"] for entry in entries if entry.get("parent") or entry["id"].startswith("agent_")]
    if not found:
        names = ", ".join(entry["id"] for entry in entries)
        raise InputError(f"{remote.url}: serves {names or 'nothing'}, no agents; name them with --models")
    return found


def ask_and_mix(
    remote: Remote,
    models: Sequence[str],
    weights: Sequence[float],
    prompt: str,
    end: str,
    how: dict[str, Any],
) -> list[Candidate]:
    """Ask every model and score each distinct answer under all of them; the most probable under the mixture
    comes first.

    Args:
        end: the text of the end token. It is part of an answer: without it every prefix of an answer would be
            more likely than the answer.
        how: of the answers: max_tokens, temperature, n, ...

    Raises:
        InputError, RunError: see `Remote`, and a server that does not score prompts.
    """
    with ThreadPoolExecutor(min(32, 4 * len(models))) as clients:

        def answers(model: str) -> list[tuple[str, str]]:
            choices = remote.post("/v1/completions", {"model": model, "prompt": prompt, **how})["choices"]
            return [(choice["text"], _ending_of(choice, end, bool(how.get("stop")))) for choice in choices]

        given = dict(zip(models, clients.map(answers, models), strict=True))
        different = list(dict.fromkeys(one for own in given.values() for one in own))
        prompt_tokens = [token for token, _ in _scored(remote, models[0], prompt)]

        def score(pair: tuple[tuple[str, str], str]) -> float:
            (text, ending), model = pair
            scored = _scored(remote, model, prompt + text + ending)
            first = _common(prompt_tokens, [token for token, _ in scored])
            return math.fsum(log_prob for _, log_prob in scored[first:] if log_prob is not None)

        found = list(clients.map(score, [(one, model) for one in different for model in models]))
    candidates = []
    for number, (text, ending) in enumerate(different):
        own = found[number * len(models) : (number + 1) * len(models)]
        mixed = mixture_log_prob(torch.tensor(own, dtype=torch.float64), torch.tensor(weights).double())
        givers = tuple(model for model in models for one in given[model] if one == (text, ending))
        candidates.append(Candidate(text, bool(ending), givers, tuple(own), float(mixed)))
    return sorted(candidates, key=lambda one: -one.mixed_log_prob)


def _ending_of(choice: dict[str, Any], end: str, has_stops: bool) -> str:
    """What ended an answer: the text of the end token or of a stop string; empty for the limit of tokens.

    Only some servers distinguish the first two, by `stop_reason`.
    """
    if choice.get("finish_reason") != "stop":
        return ""
    reason = choice.get("stop_reason")
    if isinstance(reason, str):
        return reason
    return end if not has_stops or "stop_reason" in choice else ""


def _scored(remote: Remote, model: str, text: str) -> list[tuple[str, float | None]]:
    """The tokens of a text with their log-probabilities; the first one has none.

    One more token is requested and dropped, because not every server accepts a limit of 0.

    Raises:
        RunError: the server gave no log-probabilities of the prompt.
    """
    body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    found = remote.post("/v1/completions", body)
    logprobs = found["choices"][0].get("logprobs") or {}
    count = (found.get("usage") or {}).get("prompt_tokens", 0)
    tokens, log_probs = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    if not count or len(log_probs) < count or any(one is None for one in log_probs[1:count]):
        raise RunError(
            f"{remote.url}: {model} gave no log-probabilities of a prompt; the server must support echo with "
            "logprobs, as vLLM, SGLang and chorus serve do"
        )
    return list(zip(tokens[:count], log_probs[:count], strict=True))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the common prefix: a token across the end of the prompt belongs to the answer."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
