"""Whatever lies in a folder or stands in a configuration: the run goes on as before, or one line comes.

Hypothesis draws it: bytes, JSON of any shape, and valid files with one place changed. Never a traceback,
never a hang.
"""

import copy
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import config_of, run_of, save_run
from saving import state_of
from tampering import vouch

from chorus.checkpoint.export import save_ensemble
from chorus.checkpoint.manifest import expected_files
from chorus.checkpoint.metrics_file import rows_up_to
from chorus.checkpoint.resume import Start, find_start
from chorus.checkpoint.store import read_tensors
from chorus.config import Config, load_config, render
from chorus.errors import InputError

EXAMPLES = pytest.mark.parametrize("examples", [40, pytest.param(3_000, marks=pytest.mark.slow)])
HANG_S = 120

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**18, 10**400]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["auto", "null", "1", "../x", "/dev/zero", "0" * 64, "agents/agent_0"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@contextmanager
def one_line_or_none() -> Iterator[None]:
    """An InputError of one line is an answer; any other exception, or none in `HANG_S`, fails."""

    def hangs(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still at work after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANG_S)
    try:
        yield
    except InputError as error:
        if len(str(error).splitlines()) != 1 or len(str(error)) > 2000:
            raise AssertionError(f"not one line: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(examples: int, **drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run the decorated check on so many examples, the same ones every time."""

    def run(check: Callable[..., None]) -> None:
        quiet = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=examples < 1000,
            suppress_health_check=list(HealthCheck),
        )
        quiet(given(**drawn)(check))()

    return run


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in inner for found in places(child, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> Any:
    """A valid JSON value with one entry replaced, removed or added."""
    value = copy.deepcopy(whole)
    *outer, last = draw(st.sampled_from(places(value)[1:]))
    holder = value
    for key in outer:
        holder = holder[key]
    match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
        case "replace":
            holder[last] = draw(JSON)
        case "remove":
            del holder[last]
        case _ if isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = draw(JSON)
        case _:
            holder.append(draw(JSON))
    return value


class Case:
    """A finished run of two steps, of which each example gets a fresh copy."""

    def __init__(self, place: Path, accelerator: Accelerator):
        self.template, self.folder, self.accelerator = place / "template", place / "run", accelerator
        self.config = config_of(self.template, max_train_steps=2)
        for step in (1, 2):
            save_run(self.config, accelerator, step)
        save_ensemble(self.template, state_of(2.0).weights, [0.5, 0.5], self.config, {"evaluation": SCORES})
        self.config = self.config.model_copy(update={"output_dir": str(self.folder)})
        self.run = run_of(self.config, accelerator)
        self.newest = self.folder / "checkpoints" / "step_000002"

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder)

    def start(self) -> Start:
        """Where `auto` begins, with its tensors read; then the same checkpoint by its name."""
        with one_line_or_none():
            find_start(
                self.config.model_copy(update={"resume_from_checkpoint": str(self.newest)}),
                self.run,
                self.accelerator,
            )
        start = Start()
        with one_line_or_none():
            start = find_start(self.config, self.run, self.accelerator)
            assert all(len(note.splitlines()) == 1 for note in start.notes)
            if start.folder is not None and start.saved is not None:
                assert int(start.folder.name.removeprefix("step_")) == start.step
                read_tensors(start.folder, start.saved.optimizer_step)
        return start


SCORES = {"before": {"base": {"nll": 1.0}}, "after": {"base": {"nll": 1.0}}}


@pytest.fixture
def case(tmp_path: Path, accelerator: Accelerator) -> Case:
    return Case(tmp_path, accelerator)


@EXAMPLES
def test_any_bytes_in_any_file_of_a_checkpoint_are_noticed(case: Case, examples: int):
    names = [*expected_files(2), "MANIFEST.json"]

    @fuzz(
        examples,
        name=st.sampled_from(names),
        content=st.binary(max_size=200),
        at=st.integers(0),
        cut=st.booleans(),
    )
    def check(name: str, content: bytes, at: int, cut: bool) -> None:
        case.fresh()
        file = case.newest / name
        whole = file.read_bytes()
        at %= len(whole) + 1
        damaged = whole[:at] + content + (b"" if cut else whole[at + len(content) :])
        file.write_bytes(damaged)
        assert case.start().step == (2 if damaged == whole else 1)


@EXAMPLES
@pytest.mark.parametrize("vouched", [False, True])
def test_any_state_is_taken_or_passed_over(case: Case, examples: int, vouched: bool):
    whole = json.loads((case.template / "checkpoints" / "step_000002" / "state.json").read_text())

    @fuzz(examples, content=changed(whole) | JSON)
    def check(content: Any) -> None:
        case.fresh()
        (case.newest / "state.json").write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
        if vouched:
            vouch(case.newest)
        start = case.start()
        assert start.saved is None or start.saved.num_steps == 2


@EXAMPLES
def test_any_manifest_is_taken_or_passed_over(case: Case, examples: int):
    whole = json.loads((case.template / "checkpoints" / "step_000002" / "MANIFEST.json").read_text())

    @fuzz(examples, content=changed(whole) | JSON)
    def check(content: Any) -> None:
        case.fresh()
        text = json.dumps(content, indent=2) + "\n"
        (case.newest / "MANIFEST.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        assert case.start().step == (2 if content == whole else 1)


@EXAMPLES
def test_any_ensemble_file_is_of_a_finished_run_or_of_one_that_ends_again(case: Case, examples: int):
    whole = json.loads((case.template / "ensemble.json").read_text())

    @fuzz(examples, content=changed(whole) | JSON)
    def check(content: Any) -> None:
        case.fresh()
        (case.folder / "ensemble.json").write_text(
            json.dumps(content), encoding="utf-8", errors="surrogatepass"
        )
        assert case.start().step == 2


@EXAMPLES
def test_any_metrics_keep_their_rows(tmp_path: Path, examples: int):
    rows = st.lists(
        st.binary(max_size=30)
        | st.builds(lambda step, loss: json.dumps({"step": step, "loss": loss}).encode(), SCALARS, JSON)
    )

    @fuzz(examples, lines=rows, step=st.integers(0, 100))
    def check(lines: list[bytes], step: int) -> None:
        file = tmp_path / "metrics.jsonl"
        file.write_bytes(b"\n".join(lines))
        with one_line_or_none():
            kept = rows_up_to(file, step)
            assert all(json.loads(row)["step"] <= step for row in kept.splitlines())


@EXAMPLES
@pytest.mark.usefixtures("in_an_empty_folder")
def test_any_configuration_is_read_or_refused_in_one_line(examples: int):
    keys = st.sampled_from([*Config.model_fields, "learning_rate", "a.b"]) | st.text(max_size=8)
    values = st.text(max_size=20) | SCALARS.map(str) | JSON.map(lambda value: json.dumps(value))
    file = st.text(max_size=60) | st.lists(st.tuples(keys, values), max_size=4).map(
        lambda pairs: "\n".join(f"{key}: {value}" for key, value in pairs)
    )

    @fuzz(examples, text=file, pairs=st.lists(st.tuples(keys, values), max_size=3))
    def check(text: str, pairs: list[tuple[str, str]]) -> None:
        arguments = [f"{key}={value}" for key, value in pairs if not key.startswith("-")]
        Path("configs.yaml").write_bytes(text.encode(errors="surrogatepass"))
        Path("empty.yaml").write_text("seed: 0")
        for given_arguments in (["--config", "configs.yaml"], ["--config", "empty.yaml", *arguments]):
            with one_line_or_none():
                config = load_config(given_arguments)
                Path("printed.yaml").write_text(render(config), encoding="utf-8")
                assert load_config(["--config", "printed.yaml"]) == config
