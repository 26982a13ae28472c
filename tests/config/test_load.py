"""The configuration: what is read, what is refused, and in
which words; test_keys.py goes through the keys."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launching import PATIENCE_S
from loading import load, refusal
from pydantic import ValidationError

from chorus.config import Config, as_settings, load_config, render
from chorus.config.load import config_over

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# ---- what a refusal says ----


@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        ("mixed_precision: bf32", "should be 'no', 'fp16', 'bf16' or 'auto'; did you mean 'bf16'?"),
        ("parallel_mode: Sequential", "did you mean 'sequential'?"),
        ("num_agents: 0", "greater than or equal to 1"),
        ("lora_dropout: 1", "less than 1"),
        ('lr: "1e-4"', "a valid number; write a number, without quotes"),
        ("lora_rank: true", "a valid integer; write a whole number"),
        ("shuffle: yes", "write true or false"),
        ("model_name: 2", "put it in quotes"),
        ("lora_target_modules: q_proj", "write [one, another]"),
        ("report_to: wandb", "a valid list; write [wandb]"),
        ("optional_columns: null", "a valid list; write [one, another]"),
        ("lora_target_modules: all_linear", "write all-linear"),
        ("lora_target_modules: [a, a]", "name each one once"),
    ],
)
def test_a_refusal_says_what_to_write(written, remedy):
    assert remedy in refusal(written)


def test_an_unknown_key_is_named_before_other_mistakes():
    assert "'num_agent' (line 2) is not known" in refusal("lr: -1\nnum_agent: 2")


def test_of_two_bad_values_one_is_named():
    message = refusal("lr: fast\nlora_rank: true")
    assert message.startswith(
        "configs.yaml: key 'lora_rank' (line 2) is true; it should be a valid integer; "
    )
    assert "number," not in message.replace("whole number,", "")


def test_a_value_left_empty_is_called_empty():
    assert refusal("lr:\n").startswith("configs.yaml: key 'lr' (line 1) is empty; ")


def test_the_same_mistake_in_many_places_of_a_list_is_said_once():
    assert refusal("lora_target_modules: [1, 2, 3]").count("valid string") == 1


def test_a_value_that_holds_itself_is_refused():
    assert refusal("lr: &x [*x]").startswith("configs.yaml: key 'lr' (line 1) is &x [*x]; ")


def test_a_long_value_is_shortened():
    assert len(refusal(f"lr: [{'1, ' * 5000}]")) < 300


# ---- templates ----


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{a}", "1"),
        ("x{a}y{b_2}\n", "x1y2\n"),
        ("{{}}{a}", "{}1"),
        ("{{{a}}}", "{1}"),
        ("{input text}{a-b}{é}", "345"),
    ],
)
def test_an_accepted_template_fills_in_its_columns(template, expected):
    config = Config(prompt_template=template, completion_template=template)
    columns = {"a": 1, "b_2": 2, "input text": 3, "a-b": 4, "é": 5}
    assert (
        config.prompt_template.format(**columns) == config.completion_template.format(**columns) == expected
    )


@pytest.mark.parametrize("key", ["prompt_template", "completion_template"])
@pytest.mark.parametrize(
    "template",
    [
        "{",
        "}",
        "{}",
        "{0}",
        "{a.b}",
        "{a[0]}",
        "{a!r}",
        "{a:>9}",
        "{a",
        "a}",
        "{{a}",
        '{"a": {a}}',
        "{a:{b}}",
    ],
)
def test_a_template_with_more_than_plain_columns_is_refused(key, template):
    with pytest.raises(ValidationError, match="braces must hold the plain name of a column"):
        Config.model_validate({key: template})


# ---- paths, and values that ask for too much ----


@pytest.mark.parametrize(
    "key",
    [
        "output_dir",
        "model_name",
        "dataset_name",
        "validation_dataset_name",
        "ood_dataset_name",
        "chat_template",
        "data_cache_dir",
        "deepspeed_config_file",
        "resume_from_checkpoint",
    ],
)
def test_a_path_is_what_a_shell_would_make_of_it(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for config in (load(f"{key}: ~/a/b"), load("seed: 0", f"{key}=~/a/b")):
        assert getattr(config, key) == "/home/someone/a/b"
    assert getattr(load("seed: 0", f"{key}=a~b"), key) == "a~b"
    assert "no such user; write ./~no_such_user_here/a " in refusal("seed: 0", f"{key}=~no_such_user_here/a")
    assert "no NUL character" in refusal(f'{key}: "a\\0b"')


@pytest.mark.parametrize(
    "setting",
    [
        *(
            "pad_to_multiple_of=1000000000",
            "pad_to_multiple_of=129",
            "max_seq_length=1000000000",
            "batch_size=10000000",
        ),
        *("lora_rank=1000000", "num_agents=1000000", "swd_num_projections=1000000", "num_workers=100000"),
        *("max_new_tokens_eval=10000000", "eval_batch_size=10000000", "gradient_accumulation_steps=10000000"),
    ],
)
def test_a_value_that_would_fill_the_memory_is_refused(setting: str):
    key, _, value = setting.partition("=")
    assert refusal("epochs: 1", setting).startswith(f"command line: key '{key}' is {value}; ")


# ---- YAML ----


def test_yaml_is_read_as_version_1_2():
    config = load("lr: 3e-5\nmixed_precision: no\nlora_alpha: 1\nmodel_name: on")
    assert (config.lr, config.mixed_precision, config.model_name) == (3e-5, "no", "on")
    assert type(config.lora_alpha) is float


def test_keys_left_out_take_their_defaults():
    assert load("{}") == Config()


@pytest.mark.parametrize("place", ["{}: 1", "lr: {}", "lora_target_modules: [a, {}]", "extra: {}"])
@pytest.mark.parametrize(
    "code",
    [
        '!!python/object/apply:os.system ["touch marker"]',
        '!!python/object/new:os.system ["touch marker"]',
        "!!python/object/apply:builtins.exec [\"open('marker', 'w')\"]",
        "!!python/name:os.system x",
        "!!python/module:os x",
        "!code x",
    ],
)
def test_a_tag_never_runs_code(place, code):
    text = place.format(code)
    refusal(text)
    key, _, value = text.partition(": ")
    refusal("epochs: 1", f"{key}={value}")
    assert not Path("marker").exists()


# ---- the command line ----


def test_the_command_line_goes_over_the_file_and_the_file_over_the_defaults():
    Path("mine.yaml").write_text("lr: 0.25\nbatch_size: 3\ndeepspeed_config_file: a.json\n")
    modules = "lora_target_modules=[q_proj, v_proj]"
    config = load_config(["lr=3e-5", "--config", "mine.yaml", modules, "deepspeed_config_file=null"])
    given = {
        "lr": 3e-5,
        "batch_size": 3,
        "deepspeed_config_file": None,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    assert config == Config(**given)


def test_a_value_may_hold_the_equals_sign_and_quotes():
    assert load("epochs: 1", 'completion_template=" = {answer}"').completion_template == " = {answer}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lr"], "command line: 'lr' is not of the form key=value"),
        (["lr=1", "two\nlines"], "command line: 'two\\nlines' is not of the form key=value"),
        (["--lr", "1"], "command line: unrecognized arguments: --lr"),
        (["--two\nlines"], "command line: unrecognized arguments: --two lines"),
        (["--conf", "a.yaml"], "command line: unrecognized arguments: --conf"),
        (["--config"], "command line: argument --config: expected one argument"),
        (["lr=[1"], "command line: key 'lr' is not plain YAML"),
        (["lr=1\n---\n2"], "command line: key 'lr' is not plain YAML"),
    ],
)
def test_a_bad_command_line_is_refused_in_one_line(arguments, expected):
    assert refusal("epochs: 1", *arguments).startswith(expected)


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit, match="0"):
        load_config(["--help"])
    assert "--config FILE" in capsys.readouterr().out


# ---- the rendered text ----


def test_configs_yaml_is_the_rendered_default():
    assert (ROOT / "configs.yaml").read_text() == render(Config())


def test_the_comment_over_each_key_is_its_description():
    paragraphs = (ROOT / "configs.yaml").read_text().split("\n\n")
    comments = {}
    for *comment, last in map(str.splitlines, paragraphs):
        if not last.startswith("#"):
            comments[last.partition(":")[0]] = " ".join(line.removeprefix("# ") for line in comment)
    assert list(comments) == list(Config.model_fields)
    for key, field in Config.model_fields.items():
        assert comments[key] == " ".join((field.description or "").split())
        assert comments[key].endswith(".")


def test_no_comment_is_wider_than_100_columns():
    lines = (ROOT / "configs.yaml").read_text().splitlines()
    assert max(len(line) for line in lines if line.startswith("#")) <= 100


# ---- the program ----


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code.split(" ", 1), *arguments], capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_the_program_prints_the_resolved_configuration():
    Path("configs.yaml").write_text("batch_size: 3\n")
    assert run("-m chorus.config", "lr=3e-5").stdout == render(Config(batch_size=3, lr=3e-5))
    assert run("-m chorus.config", "--defaults").stdout == render(Config())


def test_the_program_ends_a_mistake_with_one_line_and_code_2():
    Path("configs.yaml").write_text("epochs: 1\nlrr: 3e-5\n")
    ended = run("-m chorus.config")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: configs.yaml: key 'lrr' (line 2) is not known; did you mean 'lr'?\n"


def test_importing_the_configuration_imports_nothing_heavy():
    ended = run("-c import chorus.config, sys; print(*sys.modules)")
    assert "pydantic" in ended.stdout.split()
    assert not {"torch", "transformers", "numpy", "datasets", "accelerate"} & set(ended.stdout.split())


def test_a_mistake_ends_train_py_before_its_heavy_imports():
    code = """
import runpy, sys
sys.argv = ["train.py", "lrr=1"]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as ended:
    print(ended.code, sorted({"torch", "transformers"} & sys.modules.keys()))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "2 []\n", ended.stderr


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Config().lr = 1.0


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_a_whole_configuration_with_the_comments_of_today(recipe: Path):
    first, _, rest = recipe.read_text().partition("\n")
    assert first.startswith("#")
    assert f"--config recipes/{recipe.name}" in first
    assert rest == render(load_config(["--config", str(recipe)])).partition("\n\n")[2].join(["\n", ""])


@pytest.mark.parametrize("value", ["yes", "1e3", "# {a}", "Query: {a}", "{a}", "[{a}]", "null {a}", "- {a}"])
def test_a_text_key_means_what_it_says_over_a_saved_configuration_too(value: str):
    """As `chorus evaluate RUN key=value` reads it."""
    for config in (
        load("seed: 0", f"prompt_template={value}"),
        config_over({}, [f"prompt_template={value}"], "a run"),
    ):
        assert config.prompt_template == value
    twice = config_over(
        {"lr": 1.0}, ["lr=2.0", "prompt_template=a", "lr=3.0", "prompt_template=b: #"], "a run"
    )
    assert (twice.lr, twice.prompt_template) == (3.0, "b: #")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("prompt_template", text) for text in ("{question}", "Query: {a} # ", "yes", 'it\'s "{a}"', "")),
        *(("model_name", "null"), ("dataset_subset", None), ("lora_target_modules", ["q_proj", "v_proj"])),
        *(("use_rslora", True), ("lr", 2e-5), ("lr", [1e-3, 2e-3, 3e-3, 4e-3])),
    ],
)
def test_what_a_remedy_says_to_set_is_read_back_as_that_value(key: str, value: object):
    settings = shlex.split(as_settings({key: value}))
    assert getattr(config_over(Config().model_dump(), settings, "a run"), key) == value
