"""Every recipe as its user starts it, over a base with random weights in the shapes of the one it names.

    python benchmarks/recipes.py                       # all recipes, one after the other
    python benchmarks/recipes.py --only qwen3 4bit

For each, the base is written to a folder, and `accelerate launch train.py --config RECIPE` takes some steps
on it, with the built-in problems and the bundled tokenizer. So the product is timed with its own choices:
packing, compiling, captured passes. Prints a table, and with `--out FOLDER` keeps the log of each.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from results import markdown_table
from shapes import MORE_SHAPES, SHAPES
from transformers import AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).parents[1]
BASES = {
    "gemma-2-2b": "gemma-2-2b",
    "gemma-2-9b": "gemma-2-9b",
    "gemma-2-9b-4bit": "gemma-2-9b",
    "gemma-3-4b": "gemma-3-4b",
    "gemma-4-e4b": "gemma-4-e4b",
    "llama-3.2-1b": "llama-3.2-1b",
    "qwen3-4b": "qwen3-4b",
}
END = 1  # the bundled tokenizer's end token
WITHOUT_EVALUATION = ["eval_samples=0", "save_steps=0", "report=false", "log_memory_usage=true"]


def write_base(name: str, folder: Path) -> None:
    """A base with random weights in bf16, as a folder that transformers loads; with the bundled tokenizer."""
    if name in SHAPES:
        family, settings = "Gemma2ForCausalLM", SHAPES[name]
    else:
        family, settings = MORE_SHAPES[name]
    kind: type[PreTrainedModel] = getattr(transformers, family)
    config = kind.config_class(**settings, dtype=torch.bfloat16)  # pyright: ignore[reportOptionalCall]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    generation = model.generation_config
    if generation is not None:
        generation.eos_token_id = END
    model.config.get_text_config().eos_token_id = END
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny-gemma-2").save_pretrained(folder)


def launched(
    recipe: Path, base: Path, out: Path, steps: int, more: list[str], limit: float
) -> dict[str, Any]:
    """What a run of the recipe shows: seconds, rates and memory, or why it failed."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
    command += ["train.py", "--config", str(recipe), f"model_name={base}", f"output_dir={out / 'run'}"]
    command += ["dataset_name=arithmetic_hard", "dataset_subset=null", "validation_dataset_name=null"]
    command += ["logging_steps=5", f"max_train_steps={steps}", *WITHOUT_EVALUATION, *more]
    began = time.monotonic()
    log = out / "log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=file, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {limit:.0f} s"}
    if code != 0:
        said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        return {"failed": said[-1] if said else f"code {code}"}
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > steps // 2 and "loss" in row]
    return {
        "seconds": time.monotonic() - began,
        "tokens_per_second": median(row["agent_tokens_per_second"] for row in rows),
        "gib": max(row["peak_memory_gib"] for row in rows),
        "how": next((line for line in log.read_text().splitlines() if "layers compiled" in line), ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="recipes whose names have one of these parts")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit", type=float, default=300, help="seconds for a recipe")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="more keys, for all")
    parser.add_argument("--out", type=Path, help="keep each recipe's log here")
    options = parser.parse_args()
    lines = [["recipe", "agent-tok/s", "GiB", "s in all", "how"]]
    written: str | None = None
    with TemporaryDirectory() as name:
        base = Path(name) / "base"
        for recipe, model in BASES.items():
            if options.only and not any(part in recipe for part in options.only):
                continue
            if written != model:  # neighbours share it
                for file in base.glob("*"):
                    file.unlink()
                write_base(model, base)
                written = model
            out = (options.out or Path(name)) / recipe
            out.mkdir(parents=True, exist_ok=True)
            file = ROOT / "recipes" / f"{recipe}-gsm8k.yaml"
            found = launched(file, base, out, options.steps, options.set, options.limit)
            if "failed" in found:
                lines.append([recipe, found["failed"], "", "", ""])
            else:
                rates = [
                    f"{found['tokens_per_second']:,.0f}",
                    f"{found['gib']:.1f}",
                    f"{found['seconds']:.0f}",
                ]
                lines.append([recipe, *rates, found["how"].partition(" ")[2]])
            print(" | ".join(lines[-1]), flush=True)
    print(markdown_table(lines))


if __name__ == "__main__":
    main()
