"""Names from other trainers are answered with ours."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from loading import refusal

from chorus.config import Config
from chorus.config.foreign_names import FOREIGN_NAMES, FOREIGN_VALUES, answer
from chorus.config.keys import schemas

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_a_foreign_name_is_answered_with_our_key_or_with_what_to_do():
    for name in FOREIGN_NAMES.keys() - Config.model_fields.keys():
        key, note = FOREIGN_NAMES[name]
        for written in (name, name.replace("_", "-").upper(), f"optimizer.{name}"):
            message = refusal(f"{written}: 1")
            assert message.startswith(f"configs.yaml: key '{written}' (line 1) is not known; ")
            assert note in message
            if key is not None:
                assert key in Config.model_fields
                assert f"here it is '{key}'" in message


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(
            ("learning_rate", "lr"),
            ("num_train_epochs", "epochs"),
            ("per_device_train_batch_size", "batch_size"),
        ),
        *(("bf16", "mixed_precision"), ("lora_r", "lora_rank"), ("max_length", "max_seq_length")),
        *(
            ("warmup_ratio", "num_warmup_steps_ratio"),
            ("eval_strategy", "eval_steps"),
            ("optimizer.lr", "lr"),
        ),
        *(
            ("micro_batch_size", "batch_size"),
            ("cutoff_len", "max_seq_length"),
            ("model.lora_rank", "lora_rank"),
        ),
    ],
)
def test_the_names_that_most_users_bring_are_known(name: str, key: str):
    assert f"here it is '{key}'" in refusal("epochs: 1", f"{name}=1")


def test_no_argument_of_transformers_gets_an_absurd_suggestion():
    """Every field of its `TrainingArguments` is a key of ours, is
    answered, or gets no other key as a suggestion."""
    (package,) = find_spec(
        "transformers"
    ).submodule_search_locations  # read, not imported: that takes seconds
    tree = ast.parse(Path(package, "training_args.py").read_text())
    (arguments,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    fields = [node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)]
    names = [name for name in fields if name not in Config.model_fields]
    assert len(names) > 50
    assert sum(answer(name) is not None for name in names) > 25
    for name in names:
        message = refusal("epochs: 1", f"{name}=1")
        if "did you mean" in message:
            suggested = message.split("'")[-2]
            assert {word[:4] for word in name.split("_")} & {word[:4] for word in suggested.split("_")}, (
                message
            )


def test_every_option_of_pefts_lora_is_a_key_or_is_answered():
    (package,) = find_spec("peft").submodule_search_locations
    tree = ast.parse(Path(package, "tuners", "lora", "config.py").read_text())
    (lora,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LoraConfig")
    fields = [node.target.id for node in lora.body if isinstance(node, ast.AnnAssign)]
    assert {"lora_bias", "target_parameters", "use_dora"} < set(fields)
    unanswered = [name for name in fields if name not in Config.model_fields and answer(name) is None]
    assert unanswered == [], unanswered


def test_a_word_that_is_like_no_key_gets_no_suggestion():
    assert refusal("xyzzy: 1").endswith(
        "is not known; `python -m chorus.config --defaults` prints every key with its meaning"
    )


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in FOREIGN_VALUES for value in FOREIGN_VALUES[key]]
)
def test_a_foreign_word_for_a_value_is_answered_with_ours(key: str, value: str):
    ours = FOREIGN_VALUES[key][value]
    assert refusal(f"{key}: {value}").endswith(f"; write {ours}")
    assert f"'{ours}'" in str(schemas()[key])
