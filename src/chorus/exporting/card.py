"""README.md of an export: what it is, its scores, how to load and to serve it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from chorus.ensemble.evaluate import Evaluation
from chorus.ensemble.tables import ScoreTable, score_table

# The ranks that vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

NOT_THE_MIXTURE = """\
A mean of weights is not the mixture. The mixture is the mean of the agents' probabilities and needs all of them;
this is a single model whose weights are the agents' weighted mean. It is another function, it cannot tell where the
agents disagree, and none of the figures of the mixture are its own."""


class Described(NamedTuple):
    """What a card says.

    Attributes:
        title: of the card.
        base: absolute path or hub id.
        agents: where each agent came from.
        ranks: of each agent, the largest of its layers.
        weights: of the mixture.
        temperature: of the mixture.
        evaluation: scores of the run; empty where there are none.
        quantised: how the base was quantised while the agents were trained; empty where it was not.
    """

    title: str
    base: str
    agents: Sequence[str]
    ranks: Sequence[int]
    weights: Sequence[float]
    temperature: float
    evaluation: Evaluation
    quantised: str = ""


def agents_card(about: Described) -> str:
    """The card of K adapter folders."""
    names = [f"agent_{k}" for k in range(len(about.agents))]
    rows = "\n".join(
        f"| `{name}` | {came_from} | {rank} | {weight:.4f} |"
        for name, came_from, rank, weight in zip(names, about.agents, about.ranks, about.weights, strict=True)
    )
    return f"""{_front_matter(about.base, "peft")}
# {about.title}

{len(names)} LoRA agents over `{about.base}`, which answer together: the mixture is the weighted mean of their
probabilities{_sharpened(about.temperature)}.

| folder | was | rank | weight |
| --- | --- | --- | --- |
{rows}

{_figures(about)}
## Load

One agent, with PEFT:

```python
from peft import AutoPeftModelForCausalLM

agent = AutoPeftModelForCausalLM.from_pretrained("agent_0")
```

All of them and their mixture, with Chorus, which reads `ensemble.json`:

```python
from chorus.ensemble.load import load_ensemble

ensemble = load_ensemble(".")
```

Each `adapter_config.json` and `ensemble.json` name the base. On a machine where it lies elsewhere, edit
`base_model_name_or_path` and `base_model` there.

## Serve

From this folder, with vLLM, where an agent is the `model` of a request:

```bash
{_vllm(about.base, max(about.ranks), names)}
curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "agent_0", "prompt": "...", "max_tokens": 32, "temperature": 0}}'
```

or with SGLang, where it is the request's `lora_path`:

```bash
{_sglang(about.base, max(about.ranks), names)}
curl http://localhost:30000/generate -H 'Content-Type: application/json' \\
  -d '{{"text": "...", "lora_path": "agent_0", "sampling_params": {{"max_new_tokens": 32, "temperature": 0}}}}'
```

Such a server answers as one agent at a time; the client mixes. Check once that the agents' answers to one prompt have
different log-probabilities: equal ones mean that the server has left the adapters out.
"""


def mean_adapter_card(about: Described, rank: int) -> str:
    """The card of one adapter whose delta is the weighted mean."""
    return f"""{_front_matter(about.base, "peft")}
# {about.title}

One LoRA adapter of rank {rank} over `{about.base}`: the weighted mean of what {len(about.agents)} agents add to the
base's weights, exactly (their matrices side by side).

{NOT_THE_MIXTURE}

{_figures(about, merged=True)}
## Load

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".")
```

## Serve

```bash
{_vllm(about.base, rank, ["mean"])}
```

```bash
{_sglang(about.base, rank, ["mean"])}
```
"""


def merged_model_card(about: Described, dtype: torch.dtype) -> str:
    """The card of a base with the weighted mean added to its weights."""
    return f"""{_front_matter(about.base, "transformers")}
# {about.title}

`{about.base}` with the weighted mean of what {len(about.agents)} LoRA agents add to its weights, rounded to
{str(dtype).removeprefix("torch.")}.

{NOT_THE_MIXTURE}

{_figures(about, merged=True)}
## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

## Serve

```bash
vllm serve .
python -m sglang.launch_server --model-path .
```
"""


def _front_matter(base: str, library: str) -> str:
    """The head that model hubs read; a folder of this machine means nothing to them."""
    named = [] if os.path.isabs(base) else [f"base_model: {base}"]
    return "\n".join(["---", *named, f"library_name: {library}", "tags: [lora, ensemble, chorus]", "---"])


def _sharpened(temperature: float) -> str:
    return "" if temperature == 1 else f", at a temperature of {temperature:.4g} after pooling"


def _figures(about: Described, merged: bool = False) -> str:
    table = score_table(about.evaluation)
    lines = ["## Measured", ""]
    if table is None:
        lines += ["No scores came with these agents. `chorus evaluate . --data FILE` measures them."]
    else:
        of = "Of the agents and their mixture, not of this model. " if merged else ""
        lines += [f"{of}{table.title}.", "", *_markdown(table), ""]
        lines += [
            "NLL in nats; cal.: after one fitted temperature. AUROC err: how well the answer's probability tells "
            "right from wrong; risk@80%: errors among the 80 % it is surest of."
        ]
    if about.quantised:
        lines += ["", f"The agents were trained over the base in {about.quantised}; over the base as it is "]
        lines[-1] += "they answer a little differently."
    return "\n".join([*lines, ""])


def _markdown(table: ScoreTable) -> list[str]:
    rows = [["", *table.columns], ["---", *["---:"] * len(table.columns)]]
    for label, cells in table.cells.items():
        shown = [f"**{cell}**" if cell and label == table.chosen else cell for cell in [label, *cells]]
        rows.append(shown)
    return [f"| {' | '.join(row)} |" for row in rows]


def _vllm(base: str, rank: int, names: Sequence[str]) -> str:
    fitting = [most for most in VLLM_RANKS if most >= rank]
    if not fitting:
        return f"# vLLM serves ranks up to {VLLM_RANKS[-1]}; this one is {rank}: merge into the base instead"
    modules = " ".join(f"{name}={_place(name, names)}" for name in names)
    return (
        f"vllm serve {base} --enable-lora --max-loras {len(names)} --max-lora-rank {fitting[0]} \\\n"
        f"  --lora-modules {modules}"
    )


def _sglang(base: str, rank: int, names: Sequence[str]) -> str:
    paths = " ".join(f"{name}={_place(name, names)}" for name in names)
    return (
        f"python -m sglang.launch_server --model-path {base} --enable-lora \\\n"
        f"  --max-loras-per-batch {len(names)} --max-lora-rank {rank} \\\n"
        f"  --lora-paths {paths}"
    )


def _place(name: str, names: Sequence[str]) -> str:
    return str(Path("$PWD", name)) if name.startswith("agent_") else "$PWD"
