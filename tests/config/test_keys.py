"""Every key of the configuration: what it accepts, and in which words it refuses the rest."""

import pytest
from loading import load, refusal

from chorus.config import Config, render

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

# The kinds of keys, stated apart from config.py: as written in YAML, what each kind accepts and what it refuses.
NOT_A_NUMBER = [
    "true",
    "null",
    '"1"',
    '"1e-4"',
    "fast",
    "[1]",
    "{a: 1}",
    ".nan",
    ".inf",
    "-.inf",
    "1e999",
    "2020-01-01",
]
NOT_TEXT = ["1", "true", "[a]", "2020-01-01", '"\\ud800"', '""']
ACCEPTED_AND_REFUSED = {
    "count": (["1", "7"], [*NOT_A_NUMBER, "0", "-1", "1.0", "1.5", "1e3"]),
    "agents": (["2", "7", "auto"], [*NOT_A_NUMBER, "0", "-1", "2.0"]),  # 1 too, but not with every lambda_sw
    "seconds": (["1", "7"], [*NOT_A_NUMBER, "0", "-1", "1.5", "31536001"]),
    "count or zero": (["0", "7"], [*NOT_A_NUMBER, "-1", "0.0", "1.5"]),
    "two or more": (["2", "7"], [*NOT_A_NUMBER, "1", "-1", "2.0"]),
    "seed": (["0", str(2**63 - 1)], [*NOT_A_NUMBER, "-1", "0.0", str(2**63)]),
    "positive": (["3e-5", "1", "1e9"], [*NOT_A_NUMBER, "0", "0.0", "-1e-9"]),
    "positive or zero": (["0", "3e-5", "1e9"], [*NOT_A_NUMBER, "-1e-9"]),
    "below one": (["0", "0.999"], [*NOT_A_NUMBER, "1", "-1e-9"]),
    "above zero, up to one": (["1e-9", "0.5", "1"], [*NOT_A_NUMBER, "0", "1.001"]),
    "up to one": (["0", "0.5", "1"], [*NOT_A_NUMBER, "1.001", "-1e-9"]),
    "flag": (["true", "false"], ["1", "0", "yes", '"true"', "null", "[true]", ".nan"]),
    "flag or auto": (["true", "false", "auto"], ["1", "0", "yes", '"true"', "null", "[auto]", ".nan"]),
    "text": (["runs/a", '"1"', '"null"', "no"], [*NOT_TEXT, "null"]),
    "choice": ([], ["1", "true", "null", "[auto]", "Auto", '""', ".nan"]),
    "modules": (
        ["[q_proj]", "all-linear"],
        ["[]", "[1]", "[null]", "[[a]]", '[""]', "q_proj", "null", "1", "[a, b, a]"],
    ),
    "trackers": (
        ["[tensorboard]", "[wandb, mlflow]", "auto", "none"],
        ["[]", "[1]", "[null]", "[tensorboards]", "tensorboard", "null", "true"],
    ),
    "columns": (["[]", "[a]", "[a, b]"], ["[1]", "[null]", '[""]', "a", "null", "1"]),
    "prompt": (['""', "a", '"{a}"'], [*NOT_TEXT[:5], "null", '"{"', '"{0}"']),
    "completion": (['"{a}"'], [*NOT_TEXT, "null", "a", '"{{a}}"', '"{a"']),
}
KIND = {
    **dict.fromkeys(["lora_rank", "swd_num_projections", "swd_points_per_row"], "count"),
    **dict.fromkeys(["pad_to_multiple_of", "epochs", "batch_size", "gradient_accumulation_steps"], "count"),
    **dict.fromkeys(["eval_batch_size", "max_new_tokens_eval", "logging_steps"], "count"),
    **dict.fromkeys(["collective_timeout_s"], "seconds"),
    **dict.fromkeys(["num_workers", "eval_samples", "save_steps", "profile_steps"], "count or zero"),
    **dict.fromkeys(["eval_steps", "early_stopping_patience"], "count or zero"),
    **dict.fromkeys(["ood_samples"], "count"),
    **dict.fromkeys(["calibration_split"], "below one"),
    **dict.fromkeys(["eval_choices"], "flag or auto"),
    **dict.fromkeys(["eval_on_start", "load_best_model_at_end"], "flag"),
    **dict.fromkeys(["ood_dataset_name", "metric_for_best_model"], "text, or null"),
    **dict.fromkeys(["mixture_observations"], "choice"),
    **dict.fromkeys(["max_skipped_steps"], "count or zero"),
    **dict.fromkeys(["debug_subset_size", "agents_per_pass"], "count, or null"),
    **dict.fromkeys(["max_train_steps"], "count or zero, or null"),
    **dict.fromkeys(["num_agents"], "agents"),
    **dict.fromkeys(["max_seq_length"], "two or more"),
    **dict.fromkeys(["save_total_limit"], "two or more, or null"),
    **dict.fromkeys(["seed"], "seed"),
    **dict.fromkeys(["lr", "lora_alpha"], "positive"),
    **dict.fromkeys(["dirichlet_alpha_aggregator"], "positive, or null"),
    **dict.fromkeys(["lambda_sw", "weight_decay", "max_grad_norm"], "positive or zero"),
    **dict.fromkeys(["lora_dropout", "dropconnect_p", "validation_split"], "below one"),
    **dict.fromkeys(["num_warmup_steps_ratio"], "up to one"),
    **dict.fromkeys(["memory_fraction"], "above zero, up to one"),
    **dict.fromkeys(["initialize_adapters_rand", "skip_bad_rows"], "flag"),
    **dict.fromkeys(["use_gradient_checkpointing"], "flag, or null"),
    **dict.fromkeys(["shuffle", "packing", "profile_trace", "log_memory_usage"], "flag"),
    **dict.fromkeys(["use_deepspeed", "compile", "cuda_graphs"], "flag or auto"),
    **dict.fromkeys(["model_name", "dataset_name", "dataset_split", "output_dir"], "text"),
    **dict.fromkeys(["validation_dataset_name", "validation_dataset_split"], "text, or null"),
    **dict.fromkeys(["chat_template", "data_cache_dir"], "text, or null"),
    **dict.fromkeys(["optional_columns"], "columns"),
    **dict.fromkeys(["row_format"], "choice"),
    **dict.fromkeys(["dataset_subset", "deepspeed_config_file", "resume_from_checkpoint"], "text, or null"),
    **dict.fromkeys(["attn_implementation", "parallel_mode", "swd_representation"], "choice"),
    **dict.fromkeys(["lr_scheduler_type", "mixed_precision"], "choice"),
    **dict.fromkeys(["gradient_checkpointing"], "choice, or null"),
    **dict.fromkeys(["lora_target_modules"], "modules"),
    **dict.fromkeys(["report_to"], "trackers"),
    **dict.fromkeys(["prompt_template"], "prompt"),
    **dict.fromkeys(["completion_template"], "completion"),
}


def examples(key: str) -> tuple[list[str], list[str]]:
    """What `key` accepts and what it refuses, as written in YAML."""
    kind, or_null, _ = KIND[key].partition(", or null")
    accepted, refused = ACCEPTED_AND_REFUSED[kind]
    return ([*accepted, "null"], [each for each in refused if each != "null"]) if or_null else (accepted, refused)


ACCEPTED = [(key, written) for key in KIND for written in examples(key)[0]]
REFUSED = [(key, written) for key in KIND for written in examples(key)[1]]


def test_every_key_has_a_kind_here():
    assert sorted(KIND) == sorted(Config.model_fields)


@pytest.mark.parametrize(("key", "written"), ACCEPTED)
def test_a_good_value_is_the_same_from_file_and_command_line(key, written):
    from_file = load(f"{key}: {written}")
    assert from_file == load("seed: 0", f"{key}={written}")
    assert load(render(from_file)) == from_file


@pytest.mark.parametrize(("key", "written"), REFUSED)
def test_a_bad_value_is_refused_with_place_key_value_and_remedy(key, written):
    in_file = refusal(f"# a comment\n{key}: {written}")
    on_command_line = refusal("epochs: 1", f"{key}={written}")
    assert in_file.startswith(f"configs.yaml: key '{key}' (line 2) is {written}; ")
    assert on_command_line == in_file.replace("configs.yaml", "command line").replace(" (line 2)", "")


@pytest.mark.parametrize("key", Config.model_fields)
def test_a_misspelt_key_is_refused_with_the_nearest_one(key):
    for misspelt in (f"{key}x", key[:-1]):
        expected = f" is not known; did you mean '{key}'?"
        assert refusal(f"# a comment\n{misspelt}: 1") == f"configs.yaml: key '{misspelt}' (line 2){expected}"
        assert refusal("epochs: 1", f"{misspelt}=1") == f"command line: key '{misspelt}'{expected}"


@pytest.mark.parametrize("key", Config.model_fields)
def test_a_duplicate_key_is_refused_at_its_second_line(key):
    in_file = refusal(f"{key}: 1\n# a comment\n{key}: 1\n")
    assert in_file.startswith(f"configs.yaml: key '{key}' (line 3) is a duplicate")
    assert refusal("epochs: 1", f"{key}=1", f"{key}=1").startswith(f"command line: key '{key}' is a duplicate")
