"""`chorus ask URL PROMPT`: one mixed answer of agents behind another server."""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chorus.errors import InputError
from chorus.progress import IMPORTING, announced

if TYPE_CHECKING:
    from chorus.serving.remote import Candidate

API_KEY = "OPENAI_API_KEY"

EPILOG = """examples:
  vllm serve BASE --enable-lora --lora-modules agent_0=RUN/agents/agent_0 agent_1=RUN/agents/agent_1
  chorus ask http://127.0.0.1:8000 "Ada has 2 apples and ..." --weights RUN/ensemble.json

Each agent answers; each different answer is scored under every agent (echo and logprobs of /v1/completions);
the scores are mixed: p(answer) = sum_k w_k p_k(answer)."""


def main(arguments: Sequence[str]) -> None:
    """Ask, mix, print.

    Raises:
        InputError: a server that cannot be reached or refuses, or weights that do not fit.
        RunError: a server that fails.
    """
    from chorus.commands.options import Parser, above_0, add_answer_options, at_least_1

    parser = Parser(
        "chorus ask",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Ask agents behind a vLLM or SGLang server, and mix their answers.",
        epilog=EPILOG,
    )
    parser.add_argument("url", metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("prompt", metavar="PROMPT", help="what to ask; - reads it from stdin")
    parser.add_argument(
        "--models", metavar="A,B,...", help="names of the agents; default: those that the server has"
    )
    parser.add_argument("--weights", metavar="FILE", help="an ensemble.json; default: equal weights")
    parser.add_argument(
        "--template",
        metavar="TEXT",
        help="such as 'Question: {question}\\nAnswer:'; default: that of FILE's run",
    )
    parser.add_argument("--samples", metavar="N", type=at_least_1, default=1, help="answers of each agent: 1")
    parser.add_argument("--end", metavar="TEXT", help="the end token's; default: that of FILE's base")
    add_answer_options(parser)
    parser.add_argument("--api-key", metavar="KEY", help=f"of the server; default: {API_KEY}")
    parser.add_argument(
        "--timeout", metavar="S", type=above_0, default=120.0, help="seconds for one request: 120"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args(arguments)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt.strip():
        raise InputError("command line: the prompt is empty; write a question")
    _ask(options, prompt.rstrip("\n"))


def _ask(options: argparse.Namespace, prompt: str) -> None:
    with announced(IMPORTING):
        from chorus.ensemble.mixture import Mixture
        from chorus.serving.remote import ask_and_mix, remote_of, served_agents

    entries = _entries(options.weights)
    text = _rendered(options.template, entries, prompt, options.weights)
    end = options.end or _end_of(entries, options.weights)
    remote = remote_of(options.url, options.api_key or os.environ.get(API_KEY), options.timeout)
    names = [name.strip() for name in (options.models or "").split(",") if name.strip()]
    models = names or served_agents(remote)
    if len(set(models)) < len(models):
        raise InputError(f"--models {options.models}: a name is given twice; name each agent once")
    weights = Mixture.uniform(len(models)).weights
    if entries:
        weights = Mixture.from_json(entries, len(models), options.weights).weights
    how = {"max_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p}
    how |= {"n": options.samples, "seed": options.seed, **({"stop": options.stop} if options.stop else {})}
    found = ask_and_mix(remote, models, weights, text, end, how)
    if len(models) > 1 and all(max(one.log_probs) - min(one.log_probs) < 1e-6 for one in found):
        print(
            "warning: all models give every answer the same probability; are they really different adapters?",
            file=sys.stderr,
        )
    if options.json:
        print(json.dumps(_described(text, models, weights, found), ensure_ascii=False))
    else:
        _print(found, len(models) * options.samples)


def _entries(file: str | None) -> Mapping[str, Any]:
    """The entries of `ensemble.json`.

    Raises:
        InputError: it cannot be read.
    """
    if file is None:
        return {}
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--weights {file}: cannot be read as JSON ({error}); name an ensemble.json"
        ) from None
    if not isinstance(entries, dict):
        raise InputError(f"--weights {file}: is not a JSON object; name an ensemble.json")
    return entries


def _rendered(template: str | None, entries: Mapping[str, Any], prompt: str, file: str | None) -> str:
    """The prompt in the form that the agents were trained on: /v1/completions does not change it."""
    from chorus.data.templates import template_fields

    place = "--template"
    if template is None:
        config = entries.get("config")
        template = config.get("prompt_template") if isinstance(config, dict) else None
        place = f"{file}: prompt_template"
        if str(entries.get("row_form", "text")) != "text":
            raise InputError(
                f"{file}: its agents were trained on turns; give the rendered turns as the prompt, with "
                "--template '{prompt}'"
            )
    if template is None:
        return prompt
    template = template.replace("\\n", "\n")
    try:
        columns = template_fields(template)
    except ValueError:
        columns = []
    if len(columns) != 1:
        raise InputError(f"{place} {template!r}: needs exactly one {{column}}; give another --template")
    return template.format_map({columns[0]: prompt}).rstrip(" ")


def _end_of(entries: Mapping[str, Any], file: str | None) -> str:
    """The text of the base's end token.

    Raises:
        InputError: it is not known.
    """
    base = entries.get("base_model")
    if not isinstance(base, str):
        raise InputError(
            "--end: what ends an answer is not known; give the base's end token, such as '<eos>'"
        )
    from chorus.model.base import load_tokenizer

    try:
        return str(load_tokenizer(base).eos_token)
    except InputError:
        raise InputError(
            f"--end: {file} names the base {base}, which is not here; give its end token, such as '<eos>'"
        ) from None


def _described(
    prompt: str, models: Sequence[str], weights: Sequence[float], found: "Sequence[Candidate]"
) -> dict[str, Any]:
    shares = _shares(found)
    return {
        "prompt": prompt,
        "text": found[0].text,
        "models": list(models),
        "weights": list(weights),
        "answers": [
            {
                "text": one.text,
                "is_whole": one.is_whole,
                "count": len(one.models),
                "given_by": list(one.models),
                "mixed_log_prob": one.mixed_log_prob,
                "share": share,
                "log_probs": dict(zip(models, one.log_probs, strict=True)),
            }
            for one, share in zip(found, shares, strict=True)
        ],
    }


def _shares(found: "Sequence[Candidate]") -> list[float]:
    """Each answer's share of the probability that the mixture gives all these answers together."""
    most = found[0].mixed_log_prob
    parts = [math.exp(one.mixed_log_prob - most) for one in found]
    return [part / math.fsum(parts) for part in parts]


def _print(found: "Sequence[Candidate]", asked: int) -> None:
    """Print the answer; in a terminal also the other answers, with their probabilities under the mixture."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    console.print(found[0].text.strip(), soft_wrap=True)
    if not console.is_terminal:
        return
    table = Table("answer", title=f"{asked} answers, {len(found)} of them different")
    for name in ("times", "mixed log-probability", "share"):
        table.add_column(name, justify="right")
    for one, share in zip(found, _shares(found), strict=True):
        table.add_row(one.text.strip(), str(len(one.models)), f"{one.mixed_log_prob:.3f}", f"{share:.1%}")
    console.print(table)
