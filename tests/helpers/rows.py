"""Rows as a run reads them, and samples of text that stands in no file."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chorus.config import Config
from chorus.data.rows import HeldOutRow, HeldOutRows, Rows
from chorus.data.rows import read_rows as read
from chorus.data.samples import Sample, Samples
from chorus.data.templates import Problem
from chorus.data.tokenise import LEARNT, Encoder

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "assets" / "tiny-gemma-2")


def data_config(source: object, **keys: object) -> Config:
    """A configuration of these rows, of which none is cut or held out unless it is asked for."""
    defaults = {
        "prompt_template": "Q: {question}\nA:",
        "completion_template": " {answer}",
        "validation_split": 0.0,
    }
    return Config.model_validate(
        {"dataset_name": str(source), "max_seq_length": 1_000_000, **defaults, **keys}
    )


def read_rows(config: Config, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> Rows:
    return read(config, config.seed, tokenizer)


def read_problems(config: Config) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, completion) of the training rows and of the held-out rows; what is said of them is logged."""
    rows = read_rows(config)
    rows.log()
    return texts_of(rows.chosen), texts_of(rows.held_out_samples)


def texts_of(samples: Samples) -> list[tuple[str, str]]:
    return [(one.prompt, one.completion) for one in (samples.table.problem(int(row)) for row in samples.rows)]


def write_lines(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_of(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    rows = Encoder(tokenizer).rows(problems)
    return [Sample(torch.tensor(row.ids), torch.tensor(row.marks) == LEARNT) for row in rows]


def held_out_of(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> HeldOutRows:
    encoder = Encoder(tokenizer)
    prompts, answers = map(encoder.prompt, problems), map(encoder.answer, problems)
    rows = map(HeldOutRow, prompts, answers, samples_of(problems, tokenizer))
    return HeldOutRows(list(rows), [tokenizer.eos_token_id])
