"""The configuration of a run: typed, strict, checked before anything heavy is imported.

`python -m chorus.config [--config FILE] [key=value ...]` prints the configuration that a run would use;
`python -m chorus.config --defaults` prints `configs.yaml` as the repository holds it.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_core import ErrorDetails

from chorus.errors import input_errors_end_the_program
from chorus.strict_yaml import Setting, as_yaml, refuse, settings_of_command_line, settings_of_file

Text = Annotated[str, Field(min_length=1)]  # any min_length also refuses a lone surrogate, which YAML can spell
Probability = Annotated[float, Field(ge=0, lt=1)]
if TYPE_CHECKING:
    AgentCount = int  # "auto" is decided at the very start of a run: whoever reads the key finds a number
else:
    AgentCount = PositiveInt | Literal["auto"]
Modules = Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"]


class Config(BaseModel):
    """Every key of `configs.yaml`. The text under a key becomes the comment over it in the file."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,  # "1e-4" is no number, true is no 1; only a whole number may stand for a float
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,  # so that a check over two keys also sees the key that was left out
        use_attribute_docstrings=True,
    )

    model_name: Text = "assets/tiny-gemma-2"
    """The frozen base: a hub id, or a folder, relative to the working directory. assets/tiny-gemma-2 is bundled."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"] = "auto"
    """auto, eager, sdpa, flex_attention or flash_attention_2. auto: with a soft-cap (Gemma-2) eager, and on a GPU, for
    rows of 1,024 tokens or more, flash_attention_2 where it is installed or flex_attention in compiled layers; without
    a soft-cap what transformers takes. The log says what was chosen, and why."""

    num_agents: AgentCount = 4
    """K, the number of LoRA agents trained together over the one base. auto: as many as fit, up to 64, by a forecast
    that a measured step confirms; a run that goes on keeps its checkpoint's."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """What num_agents auto may fill of the smallest GPU, or of the free RAM where there is none, and beyond
    which the dry run fails; above 0, up to 1."""
    parallel_mode: Literal["fused", "sequential", "parallel"] = "fused"
    """How the agents share the base. fused: all agents in one pass over all their rows, the fastest. sequential: one
    agent at a time, the least memory. parallel: K models over the same frozen storage, for bases that fused refuses."""
    agents_per_pass: PositiveInt | None = None
    """fused: at most so many agents in one pass, where memory is short; each pass is computed twice then, but with
    gradient_checkpointing full, which computes every layer twice as it is. null: all."""
    lora_rank: PositiveInt = 8
    """Rank R of every adapter."""
    lora_alpha: PositiveFloat = 16.0
    """An adapter's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: Probability = 0.0
    """Dropout on the input of every adapter in training, seeded for each agent and step; from 0 (off) to below 1."""
    lora_target_modules: Modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    """The linear layers that get an adapter: a list of module names, or all-linear for all but the head."""
    initialize_adapters_rand: bool = False
    """false: PEFT's own start, A Kaiming-uniform and B zero, with a different seed for each agent. true: A and B both
    normal with standard deviation 0.02, so that the agents differ from the first step."""
    dropconnect_p: Probability = 0.0
    """DropConnect: the probability with which each weight of A and B is dropped, the others scaled by 1/(1-p); from 0
    (off) to below 1. The masks are new at every optimiser step, off in evaluation, and never in a saved file."""
    gradient_checkpointing: Literal["none", "selective", "full"] | None = None
    """What of each decoder layer is computed again in the backward pass, for less memory and more time. none: nothing.
    selective: all but the results of its products with weights. full: the whole layer. null: none, or what
    use_gradient_checkpointing says."""
    use_gradient_checkpointing: bool | None = None
    """The older spelling of gradient_checkpointing: true is full, false is none; null leaves it to the other key."""
    compile: Literal["auto"] | bool = "auto"
    """true: have torch compile the decoder layers for training, once for every length that occurs; what it cannot
    compile is an error. auto: on a GPU, where packing or pad_to_multiple_of leaves at most 8 shapes and lora_dropout
    is 0."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """true: record a training pass and replay it whole, which spares the host most of its work. It keeps the
    memory of a pass for itself. auto: as for compile."""

    lambda_sw: NonNegativeFloat = 0.01
    """Weight of the diversity reward, the squared sliced 2-Wasserstein distance between the agents' hidden states.
    Above 0 it needs num_agents of at least 2; 0 turns it off at no cost."""
    swd_num_projections: PositiveInt = 64
    """Random directions onto which the sliced distance projects, new at every optimiser step."""
    swd_representation: Literal["tokens", "mean", "last"] = "tokens"
    """The points that are compared. tokens: target tokens, each a point; mean: the mean of a row's target tokens;
    last: a row's last target token."""
    swd_points_per_row: PositiveInt = 16
    """With swd_representation tokens: at most so many target tokens of each row, evenly spaced."""

    dataset_name: Text = "arithmetic"
    """arithmetic (built in), a hub id, a folder of save_to_disk, or a .jsonl, .json, .csv or .parquet file."""
    dataset_subset: Text | None = None
    """Configuration name of a hub dataset, such as main; null for none."""
    prompt_template: Annotated[str, Field(min_length=0)] = "Question: {question}\nAnswer:"
    """The prompt of a row, in which {column} stands for the row's text in that column. It carries no loss."""
    completion_template: Text = " {answer}"
    """What the agents learn to write after the prompt, with at least one {column}. The end token is added."""
    max_seq_length: Annotated[int, Field(ge=2)] = 128
    """Most tokens of a row, prompt, completion and end token together."""
    pad_to_multiple_of: PositiveInt = 1
    """Pad a batch to a multiple of this many tokens, so that fewer shapes occur; 1 pads to its longest row."""
    packing: bool = False
    """true: put several samples into one row of max_seq_length tokens, each with positions of its own and without sight
    of the others. batch_size still counts samples; losses and gradients are the same. It pays where most samples are
    much shorter than max_seq_length."""
    validation_split: Probability = 0.05
    """Fraction of the rows held out from training, where the data bring no held-out rows; from 0 to below 1."""
    skip_bad_rows: bool = False
    """true: leave out rows with missing, null or empty text and count them. false: stop at the first one."""
    shuffle: bool = True
    """true: a new order of the rows in every epoch, drawn from the seed. false: the order of the data."""
    debug_subset_size: PositiveInt | None = None
    """Keep only this many training rows, for a quick try; null keeps all."""
    num_workers: NonNegativeInt = 0
    """Processes that prepare batches beside each training process; 0 prepares them in the training process itself."""

    epochs: PositiveInt = 3
    """Passes over the training rows, where max_train_steps is null."""
    max_train_steps: NonNegativeInt | None = 100
    """Optimiser steps: training stops there, and epochs repeat as needed to reach it. null: as many as epochs give;
    0 trains nothing and writes the initial adapters."""
    batch_size: PositiveInt = 16
    """Rows of one micro-batch on one process; every agent sees all of them."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches of one optimiser step."""
    lr: PositiveFloat = 2e-3
    """AdamW's learning rate, at the schedule's peak."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decoupled weight decay; 0 is off."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    """linear, cosine, cosine_with_restarts, constant, constant_with_warmup or inverse_sqrt, as in transformers."""
    num_warmup_steps_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of all optimiser steps, from 0 to 1, in which the learning rate rises from 0."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip gradients to this norm, one norm over all agents; 0 is off."""
    max_skipped_steps: NonNegativeInt = 10
    """A loss or gradient that is no number: that agent's update is skipped and said. After more than so many optimiser
    steps in a row in which some agent was skipped, the run saves and ends; 0: after the first."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random number of the run comes from this one, from 0 to below 2**63."""

    eval_batch_size: PositiveInt = 32
    """Rows of one batch on one process in evaluation."""
    eval_samples: NonNegativeInt = 100
    """Held-out problems scored before and after training; 0 is no evaluation."""
    max_new_tokens_eval: PositiveInt = 48
    """Most tokens of a generated answer."""
    dirichlet_alpha_aggregator: PositiveFloat | None = None
    """How the agents become one. null: the plain mean of their probabilities. A number above 0: a mixture whose weights
    are fitted to the held-out rows, under a symmetric Dirichlet prior with so many pseudo-counts an agent; large: near
    the mean."""

    output_dir: Text = "runs/default"
    """The folder for all that a run writes, relative to the working directory."""
    save_steps: NonNegativeInt = 0
    """Write a checkpoint every so many optimiser steps, into output_dir/checkpoints; 0: only at the end, and when
    SIGTERM or SIGINT stops the run."""
    save_total_limit: Annotated[int, Field(ge=2)] | None = 3
    """Keep so many of the newest checkpoints, at least 2; null keeps all."""
    logging_steps: PositiveInt = 10
    """Log every so many optimiser steps."""
    resume_from_checkpoint: Text | None = "auto"
    """auto: go on from the newest whole checkpoint of output_dir, if there is one. A folder: go on from that
    checkpoint. null: a fresh start; an earlier run in output_dir steps aside."""

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = "auto"
    """no, fp16, bf16 or auto. auto: bf16 on a GPU that has it, no elsewhere. no also loads the base in fp32."""
    use_deepspeed: Literal["auto"] | bool = "auto"
    """auto: as the launcher says. true: DeepSpeed, even where the launcher does not ask for it. false: no DeepSpeed,
    and a launcher that asks for it is refused."""
    deepspeed_config_file: Text | None = "ds_config_zero2.json"
    """DeepSpeed's own settings, a JSON file; null for ZeRO-2 with buckets sized to adapters. recipes/deepspeed has
    others, for where memory is short."""
    collective_timeout_s: Annotated[int, Field(ge=1, le=31_536_000)] = 1800
    """Seconds that a process waits for the others before it ends the run; more than the slowest save or evaluation of
    one of them takes."""

    profile_steps: NonNegativeInt = 0
    """Time so many optimiser steps part by part, after a first one that warms up, and print a summary; 0 is off."""
    profile_trace: bool = False
    """true: after those, trace two steps with PyTorch's profiler into output_dir/profile: a trace for
    https://ui.perfetto.dev, a flame graph for any browser, the most expensive operators. It slows these two down."""
    log_memory_usage: bool = False
    """true: log memory with every logged step: the GPU's, or what is resident where there is none."""

    @field_validator("lora_target_modules")
    @classmethod
    def _names_no_module_twice(cls, modules: list[str] | str) -> list[str] | str:
        if isinstance(modules, list) and len(set(modules)) < len(modules):
            raise ValueError("a module is in it twice; name each one once")
        return modules

    @field_validator("compile", "cuda_graphs")
    @classmethod
    def _draws_nothing_inside(cls, wanted: bool | str, info: ValidationInfo) -> bool | str:
        if wanted is True and info.data.get("lora_dropout"):
            raise ValueError("dropout draws anew in every pass, and lora_dropout is above 0; set it to auto")
        return wanted

    @field_validator("use_gradient_checkpointing")
    @classmethod
    def _says_what_the_other_spelling_says(cls, wanted: bool | None, info: ValidationInfo) -> bool | None:
        said = info.data.get("gradient_checkpointing")
        if None not in (wanted, said) and said != ("full" if wanted else "none"):
            raise ValueError(f"gradient_checkpointing, the same in more words, is {said}; set one of them to null")
        return wanted

    @property
    def recomputation(self) -> Literal["none", "selective", "full"]:
        """What `gradient_checkpointing` and its older spelling come to."""
        return self.gradient_checkpointing or ("full" if self.use_gradient_checkpointing else "none")

    @field_validator("lambda_sw")
    @classmethod
    def _has_agents_to_compare(cls, lambda_sw: float, info: ValidationInfo) -> float:
        if lambda_sw > 0 and info.data.get("num_agents") == 1:
            raise ValueError("a distance between agents needs two of them, and num_agents is 1; set lambda_sw to 0")
        return lambda_sw

    @field_validator("prompt_template", "completion_template")
    @classmethod
    def _is_a_template(cls, template: str, info: ValidationInfo) -> str:
        if not re.fullmatch(r"([^{}]|\{\{|\}\}|\{[^\W\d][\w -]*\})*", template):
            raise ValueError("braces must hold the plain name of a column, as {answer}; double others, as {{ or }}")
        if info.field_name == "completion_template" and "{" not in template.replace("{{", ""):
            raise ValueError("it must have at least one {column}, such as {answer}")
        return template


FIRST_KEY_OF_SECTION = {
    "model_name": "Model",
    "num_agents": "Adapters and agents",
    "lambda_sw": "Objective",
    "dataset_name": "Data",
    "epochs": "Training",
    "eval_batch_size": "Evaluation",
    "output_dir": "Output",
    "mixed_precision": "Engine",
    "profile_steps": "Instruments",
}

HEADER = """\
# The configuration of a run. A key that is left out takes its default. To set one for a single run:
# accelerate launch train.py lr=3e-5 'lora_target_modules=[q_proj, v_proj]'"""


def load_config(arguments: Sequence[str]) -> Config:
    """The configuration of a run, from the command line's `[--config FILE] [key=value ...]`.

    FILE is `configs.yaml` in the working directory unless named. Raises InputError for every mistake in it.
    """
    return _resolve(_parser().parse_intermixed_args(arguments))


def render(config: Config) -> str:
    """The whole configuration as commented YAML, from which `load_config` makes an equal one."""
    lines = [HEADER]
    for key, field in Config.model_fields.items():
        if key in FIRST_KEY_OF_SECTION:
            lines += ["", f"# ---- {FIRST_KEY_OF_SECTION[key]} ".ljust(100, "-")]
        comment = textwrap.wrap(field.description or "", 100, initial_indent="# ", subsequent_indent="# ")
        lines += ["", *comment, f"{key}: {as_yaml(getattr(config, key))}"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    parser = _parser("python -m chorus.config")
    parser.add_argument("--defaults", action="store_true", help="print the defaults instead, as in configs.yaml")
    options = parser.parse_intermixed_args(arguments)
    print(render(Config() if options.defaults else _resolve(options)), end="")


def _parser(program: str | None = None) -> argparse.ArgumentParser:
    parser = _Parser(
        program,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The keys of a run, and what each one means, stand in configs.yaml.",
        epilog="""examples:
  lr=3e-5 max_train_steps=null               numbers, true, false, null and words as in YAML
  'lora_target_modules=[q_proj, v_proj]'     a list
  'completion_template=" {answer}"'          text with spaces, braces or colons, in quotes of its own

`python -m chorus.config`, with the same arguments, prints the configuration that a run would use.""",
    )
    parser.add_argument("--config", metavar="FILE", default="configs.yaml", help="default: configs.yaml")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="set a key for this run, over the file")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse("command line:", f"{message}; --help shows what there is")


def _resolve(options: argparse.Namespace) -> Config:
    """The file's keys, the command line's over them, the defaults under them, all of them checked."""
    settings = settings_of_file(options.config) | settings_of_command_line(options.settings)
    try:
        return Config.model_validate({key: setting.value for key, setting in settings.items()})
    except ValidationError as error:
        _refuse_the_first(error.errors(), settings, options.config)


def _refuse_the_first(errors: list[ErrorDetails], settings: dict[str, Setting], file: str) -> NoReturn:
    first = min(errors, key=lambda one: one["type"] != "extra_forbidden")  # a misspelt key may explain all the others
    key = str(first["loc"][0])
    if key not in settings:  # its default does not go with another key
        settings[key] = Setting(None, as_yaml(first["input"]), f"{file}: key {key!r} (left out)")
    _, written, place = settings[key]
    if first["type"] == "extra_forbidden":
        nearest = get_close_matches(key, Config.model_fields, n=1, cutoff=0)[0]
        refuse(place, f"is not known; did you mean {nearest!r}?")
    given = f"is {textwrap.shorten(written, 80) or 'empty'}"
    if first["type"] == "value_error":  # raised by a validator of ours, with its own remedy
        refuse(place, f"{given}; {first['msg'].removeprefix('Value error, ')}")
    wanted = " or ".join(dict.fromkeys(one["msg"] for one in errors if one["loc"][0] == key)).replace("Input", "it")
    refuse(place, f"{given}; {wanted}{_remedy(written, wanted)}")


def _remedy(written: str, wanted: str) -> str:
    """What to write instead, where pydantic's words alone leave that open."""
    remedies = {
        "a valid string": "; put it in quotes",
        "a valid list": "; write [one, another]",
        "a valid boolean": "; write true or false, without quotes",
        "a valid integer": "; write a whole number, without quotes or a point",
        "a valid number": "; write a number, without quotes",
    }
    for kind, remedy in remedies.items():
        if kind in wanted:
            return remedy
    choices = get_close_matches(written, re.findall(r"'(\w+)'", wanted), n=1, cutoff=0)
    return f"; did you mean {choices[0]!r}?" if choices else ""


if __name__ == "__main__":
    with input_errors_end_the_program():
        main(sys.argv[1:])
