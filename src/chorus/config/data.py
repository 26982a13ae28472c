"""Data: where the rows come from, and how they become samples."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic.types import PositiveInt

from chorus.config.section import ComparedByEffect, Count, MayChange, Place, Probability, Section, Text


class DataSettings(Section):
    """Where the rows come from, and how they become samples."""

    TITLE: ClassVar[str] = "Data"

    dataset_name: ComparedByEffect[Place] = "arithmetic_hard"
    """arithmetic, arithmetic_chat, arithmetic_hard or arithmetic_harder (built in), a hub id, a file (.jsonl,
    .json, .csv, .tsv, .parquet, each also with .gz), a glob of files, or a folder of them. docs/data.md shows
    every format."""
    dataset_subset: ComparedByEffect[Text | None] = None
    """Configuration name of a hub dataset, such as main; null for none."""
    dataset_split: ComparedByEffect[Text] = "train"
    """The split of dataset_name to train on."""
    validation_dataset_name: ComparedByEffect[Place | None] = None
    """Where held-out rows come from, in any form that dataset_name takes. null: from dataset_name."""
    validation_dataset_split: ComparedByEffect[Text | None] = None
    """The split that is held out. null: `validation` where the source has one, or the only split of
    validation_dataset_name; otherwise validation_split decides. A `test` split is used only if it is named
    here."""
    row_format: ComparedByEffect[Literal["auto", "text", "chat"]] = "auto"
    """text: prompt_template and completion_template make the text. chat: a row becomes turns that the base's
    chat template renders, with loss on the assistant's turns. auto: text, unless the templates' columns are
    missing or hold turns, and the row has `messages`, `conversations`, `prompt` and `completion` as turns, or
    `instruction` and `output`."""
    chat_template: ComparedByEffect[Place | None] = None
    """A Jinja file to render turns with. null: the chat template of the base's tokenizer."""
    prompt_template: Annotated[str, Field(min_length=0)] = "Question: {question}\nAnswer:"
    """The prompt of a row, in which {column} stands for the row's text in that column. It carries no loss. Of
    plain columns with row_format: chat it is the user's turn."""
    completion_template: Text = " {answer}"
    """What the agents learn to write after the prompt, with at least one {column}. The end token is added. Of
    plain columns with row_format: chat it is the assistant's turn."""
    optional_columns: ComparedByEffect[list[Text]] = Field(default=["input", "context", "system"])
    """Columns that may be empty, null or missing in a row; such a column is an empty text. Every other column
    of the templates must have text, and so must at least one column of each template."""
    max_seq_length: Annotated[int, Field(ge=2, le=2**20)] = 128
    """Most tokens of a row, prompt, completion and end token together."""
    pad_to_multiple_of: MayChange[Count | Literal["auto"]] = "auto"
    """Pad a batch to a multiple of this many tokens, so that fewer shapes occur; 1 pads to its longest row.
    auto: on a GPU an eighth of max_seq_length, so that at most 8 shapes are compiled and captured; elsewhere
    1. At most max_seq_length. Where layers are compiled or passes captured, batches are padded further, to as
    few of these lengths as make the run the shortest; the log says to which."""
    packing: MayChange[Literal["auto"] | bool] = "auto"
    """true: put several samples into one row of max_seq_length tokens, each with positions of its own and
    without sight of the others. batch_size still counts samples; losses and gradients are the same. auto: on
    a GPU, where the base keeps samples apart and batches of the rows' measured lengths then have at most 80 %
    of the tokens. The log says what was decided, and why, and which numbers of rows occur."""
    validation_split: Probability = 0.05
    """Fraction of the rows held out from training, where the
    data bring no held-out rows; from 0 to below 1."""
    skip_bad_rows: ComparedByEffect[bool] = False
    """true: leave out rows that cannot be used (text missing, null or empty; turns that are not well formed)
    and count them. false: stop at the first one."""
    shuffle: bool = True
    """true: a new order of the rows in every epoch, drawn from the seed. false: the order of the data."""
    bootstrap: Literal["none", "poisson", "bayesian"] = "none"
    """Weights of each agent's own on the rows of the shared batch, drawn from the seed and the same in every
    epoch, so that agents learn from different data at no cost in time. poisson: how often a bootstrap sample
    has the row, which is 0 for a third of them. bayesian: exponential weights, which leave no row out. none:
    every row counts the same. Training losses are reported weighted; evaluation is never weighted."""
    per_agent_batches: bool = False
    """true: every agent takes the rows in an order of its own, so that a step has other rows for each agent,
    as independently trained models do. It needs shuffle, and lambda_sw of 0: the distance compares agents on
    the same rows. Rows are padded to the longest that any agent has. false: all agents see the same batch."""
    debug_subset_size: ComparedByEffect[PositiveInt | None] = None
    """Keep only this many training rows, for a quick try; null keeps all."""
    num_workers: MayChange[Annotated[int, Field(ge=0, le=256)]] = 0
    """Processes that prepare batches beside each training process, at most 256 (20 MB each);
    0 prepares them in the training process itself."""
    data_cache_dir: MayChange[Place | None] = None
    """Folder for tokenised rows, from which a second start reads them. null: chorus/ in the cache folder of
    the `datasets` library (HF_DATASETS_CACHE). It may be deleted at any time between runs."""

    @property
    def padding(self) -> int:
        """`pad_to_multiple_of` as a number; an auto that nothing has decided pads to the longest row."""
        return 1 if self.pad_to_multiple_of == "auto" else self.pad_to_multiple_of

    @property
    def packs(self) -> bool:
        """`packing` as true or false; an auto that nothing has decided does not pack."""
        return self.packing is True

    @field_validator("pad_to_multiple_of")
    @classmethod
    def _pads_no_row_beyond_the_longest(cls, multiple: int | str, info: ValidationInfo) -> int | str:
        if isinstance(multiple, int) and multiple > info.data.get("max_seq_length", multiple):
            longest = info.data["max_seq_length"]
            raise ValueError(
                f"no row is longer than max_seq_length, which is {longest}; set it to {longest} or less"
            )
        return multiple

    @field_validator("bootstrap", "per_agent_batches")
    @classmethod
    def _leaves_the_rows_to_all(cls, wanted: str | bool, info: ValidationInfo) -> str | bool:
        if wanted not in ("none", False) and info.data.get("responsibility_alpha", 1.0) < 1:
            raise ValueError(
                "responsibilities weigh the same rows for all agents, and responsibility_alpha is below 1; "
                "set responsibility_alpha to 1"
            )
        return wanted

    @field_validator("per_agent_batches")
    @classmethod
    def _leaves_nothing_to_compare(cls, wanted: bool, info: ValidationInfo) -> bool:
        if wanted and info.data.get("lambda_sw"):
            raise ValueError(
                "the distance compares agents on the same rows, and lambda_sw is above 0; set lambda_sw to "
                "0, or use bootstrap, which leaves the rows the same"
            )
        if wanted and not info.data.get("shuffle", True):
            raise ValueError("without shuffle all agents have the order of the data; set shuffle to true")
        return wanted

    @field_validator("prompt_template", "completion_template")
    @classmethod
    def _is_a_template(cls, template: str, info: ValidationInfo) -> str:
        if not re.fullmatch(r"([^{}]|\{\{|\}\}|\{[^\W\d][\w -]*\})*", template):
            raise ValueError(
                "braces must hold the plain name of a column, as {answer}; double others, as {{ or }}; "
                "rows of turns need no template, see row_format"
            )
        if info.field_name == "completion_template" and "{" not in template.replace("{{", ""):
            raise ValueError("it must have at least one {column}, such as {answer}")
        return template
