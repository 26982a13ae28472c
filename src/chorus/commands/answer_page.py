"""One self-contained page of answers, whose tokens are coloured by how much the agents disagree."""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment

from chorus.commands.answer_view import explained, shade
from chorus.commands.asking import Asked, described
from chorus.errors import InputError
from chorus.serving.opened import Opened

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d1f23; --paper: #fff; --soft: #5b616b; --line: #d9dce1;
  --s0: transparent; --s1: #fff1b8; --s2: #ffd08a; --s3: #ffaaa0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --paper: #17191c; --soft: #a2a8b2; --line: #373b42;
  --s1: #574a12; --s2: #70470f; --s3: #7c2b24; } }
body { margin: 0 auto; max-width: 46rem; padding: 1.5rem 1rem; font: 1rem/1.6 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.2rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); padding: 1rem 0; }
.soft { color: var(--soft); font-size: .9rem; margin: .25rem 0; overflow-wrap: anywhere; }
pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }
.prompt { font-weight: 600; }
.t { border-radius: .2rem; } .s0 { background: var(--s0); } .s1 { background: var(--s1); }
.s2 { background: var(--s2); } .s3 { background: var(--s3); }
.key span { padding: .1rem .4rem; margin-right: .4rem; border: 1px solid var(--line); }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .15rem .6rem; text-align: right; white-space: pre; }
th:first-child, td:first-child { text-align: left; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ about }}</p>
<p class="soft key">The agents: <span class="t s0">agree</span><span class="t s1">nearly</span
><span class="t s2">differ</span><span class="t s3">disagree</span></p>
{% for one in asked %}
<section>
<pre class="prompt">{{ one.prompt }}</pre>
{% for answer in one.answers %}
{% if one.answers|length > 1 %}<p class="soft">{{ answer.name }}</p>{% endif %}
<pre>{% for token in answer.tokens %}<span class="t s{{ token.shade }}" title="{{ token.about }}">{{ token.text }}</span
>{% endfor %}</pre>
{% endfor %}
<p class="soft">{{ one.explained }}</p>
{% for answer in one.answers %}
<details><summary>Tokens{% if one.answers|length > 1 %} of {{ answer.name }}{% endif %}</summary>
<div class="wide"><table>
<tr><th>token</th><th>probability</th><th>entropy</th><th>disagreement</th>
{% for name in answer.members %}<th>{{ name }}</th>{% endfor %}</tr>
{% for token in answer.tokens %}<tr><td>{{ token.shown }}</td>
{% for figure in token.figures %}<td>{{ figure }}</td>{% endfor %}</tr>
{% endfor %}</table></div></details>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""


def write_page(file: Path, opened: Opened, asked: list[Asked]) -> None:
    """Write the page.

    Raises:
        InputError: the file cannot be written.
    """
    ensemble = opened.ensemble
    agents = "agents" if len(ensemble.names) > 1 else "agent"
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    text = page.render(
        title=f"Answers of {len(ensemble.names)} {agents}",
        about=f"{', '.join(ensemble.names)} over {ensemble.base_name}. Entropy and disagreement in nats: "
        "disagreement is the mutual information of token and agent.",
        asked=[_shown(one, opened) for one in asked],
    )
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html {file}: cannot be written ({error.strerror}); name another file") from error


def _shown(asked: Asked, opened: Opened) -> dict[str, Any]:
    one = described(asked)
    answers = one.get("answers", [one])
    return {
        "prompt": asked.prompt,
        "explained": explained(asked),
        "answers": [
            {
                "name": answer["model"],
                "members": _members(answer["model"], opened),
                "tokens": [_token(token) for token in answer["tokens"]],
            }
            for answer in answers
        ],
    }


def _members(name: str, opened: Opened) -> list[str]:
    members = opened.answerers[opened.index_of(name)].members
    return [f"agent_{member}" for member in members] if len(members) > 1 else []


def _token(token: dict[str, Any]) -> dict[str, Any]:
    members = token["member_log_probs"]
    own = [f"{math.exp(log_prob):.3f}" for log_prob in members] if len(members) > 1 else []
    probability, entropy, mutual = math.exp(token["log_prob"]), token["entropy"], token["mutual_information"]
    return {
        "text": token["text"],
        "shown": "(end)" if token["id"] is None else repr(token["text"])[1:-1],
        "shade": shade(mutual, len(members)),
        "about": f"probability {probability:.3f}, entropy {entropy:.3f}, disagreement {mutual:.3f}",
        "figures": [f"{probability:.3f}", f"{entropy:.3f}", f"{mutual:.3f}", *own],
    }
