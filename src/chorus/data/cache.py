"""Tokenised rows on disk: an Arrow file that every process of a host maps into memory, written once.

The name of a cache folder is a digest of everything that its rows depend on: the source's files or version,
templates, chat template, tokenizer, `max_seq_length`, and this package's own code. So a cache never becomes
stale.

    rows.arrow    place, prompt, completion, ids and marks of every usable row, in the order of the source
    facts.npy     a few numbers of every row, FACTS
    about.json    counts, and warnings that are logged at every start
"""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import tokenizers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from chorus.config.data import DataSettings
from chorus.data.chat import ChatForm, kind_of_row
from chorus.data.sources import Split
from chorus.data.templates import BadRow, Problem, TextForm
from chorus.data.tokenise import LEARNT, Encoder, Tokenised, end_ids, unreadable
from chorus.errors import InputError

logger = logging.getLogger(__name__)

BATCH = 1_000  # rows of a batch of the Arrow file; row n is in batch n // BATCH
LOOKED_AT = 100  # rows that decide the form of all, and whether skip_bad_rows would leave any
SCHEMA = pyarrow.schema(
    {
        "place": pyarrow.string(),
        "prompt": pyarrow.large_string(),
        "completion": pyarrow.large_string(),
        "ids": pyarrow.large_list(pyarrow.int32()),
        "marks": pyarrow.large_list(pyarrow.int8()),
    }
)
# Tokens before the cut; targets after it; characters that carry no loss though they should; beginning tokens
# in the midst of the row; unknown tokens (see tokenise); whether no token of the answer is learnt.
FACTS = np.dtype(
    [*((name, "i4") for name in ("length", "targets", "merged", "strays", "unknown")), ("is_lost", "?")]
)

Form = TextForm | ChatForm


class TokenRow(NamedTuple):
    """ids_T int32 and marks_T int8 (`tokenise.LEARNT` and others) of a row, cut to max_seq_length."""

    ids_T: np.ndarray
    marks_T: np.ndarray


class TokenTable:
    """The rows of a cache folder, read on demand. Pickled as its path, so that workers map the file too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = np.load(folder / "facts.npy", mmap_mode="r")
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))

    def __reduce__(self):
        return TokenTable, (self.folder,)

    def __len__(self) -> int:
        return len(self.facts)

    @cached_property
    def _tokens(self) -> pyarrow.RecordBatchFileReader:
        return self._reader("ids", "marks")

    @cached_property
    def _texts(self) -> pyarrow.RecordBatchFileReader:
        return self._reader("place", "prompt", "completion")

    def _reader(self, *columns: str, mapped: bool = True) -> pyarrow.RecordBatchFileReader:
        path = str(self.folder / "rows.arrow")
        source = pyarrow.memory_map(path) if mapped else pyarrow.OSFile(path)
        options = pyarrow.ipc.IpcReadOptions(
            included_fields=[SCHEMA.get_field_index(name) for name in columns]
        )
        return pyarrow.ipc.open_file(source, options=options)

    def tokens(self, row: int) -> TokenRow:
        """The tokens of a row. The arrays are views of the mapped file: do not write to them."""
        batch = self._tokens.get_batch(row // BATCH)
        return TokenRow(*(column[row % BATCH].values.to_numpy() for column in batch.columns))

    def place(self, row: int) -> str:
        """Where the row comes from, such as `train.jsonl:7`."""
        return self._texts.get_batch(row // BATCH).column(0)[row % BATCH].as_py()

    def problem(self, row: int) -> Problem:
        """The row's text. For turns, `learnt` is only the completion, which the model is asked for."""
        batch = self._texts.get_batch(row // BATCH)
        prompt, completion = (batch.column(one)[row % BATCH].as_py() for one in (1, 2))
        learnt = ((len(prompt), len(prompt) + len(completion)),) if self.about["is_chat"] else ()
        return Problem(prompt, completion, learnt)

    def texts(self) -> Iterator[Problem]:
        """Prompt and completion of every row, in order; streamed, not mapped."""
        reader = self._reader("prompt", "completion", mapped=False)
        for number in range(reader.num_record_batches):
            columns = reader.get_batch(number).to_pydict()
            yield from map(Problem, columns["prompt"], columns["completion"])


def cached_rows(split: Split, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> TokenTable:
    """The tokenised rows of a split: from the cache, or read, checked, tokenised and kept there. For one
    process.

    Raises:
        InputError: a bad row (unless `skip_bad_rows`), no usable row, or a cache that cannot be written.
    """
    begun = time.monotonic()
    form = form_of(split, settings, tokenizer)
    root = _cache_root(settings)
    folder = root / _key(split, settings, form, tokenizer)
    if not (folder / "about.json").is_file():
        with _disk_errors_named(root):
            root.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
            try:
                _write(made, split, settings, form, Encoder(tokenizer))
                made.chmod(0o755)
                made.rename(folder)
            except OSError:
                if not (
                    folder / "about.json"
                ).is_file():  # otherwise another run has just written the same cache
                    raise
            finally:
                shutil.rmtree(made, ignore_errors=True)
    table = TokenTable(folder)
    logger.debug(
        "%d rows of %s in %.1f s, kept in %s", len(table), split.name, time.monotonic() - begun, folder
    )
    return table


def form_of(split: Split, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Form:
    """How the rows of a split become text, decided by the first rows."""
    if settings.row_format != "text":
        for _, row in islice(split.rows(None, ()), LOOKED_AT):
            kind = kind_of_row(row, settings)
            if kind is not None:
                return ChatForm.of(kind, settings, tokenizer)
            if settings.row_format == "auto" and all(
                column in row for column in TextForm.of(settings).columns
            ):
                break
        else:
            if settings.row_format == "chat":
                raise InputError(
                    f"key 'row_format': chat, but {split.name} holds no turns: neither messages, "
                    "conversations, prompt and completion, nor the columns of the templates; correct "
                    "prompt_template and completion_template"
                )
    return TextForm.of(settings)


def usable_rows(
    split: Split, settings: DataSettings, form: Form, encoder: Encoder, bad: list[str]
) -> Iterator[tuple[str, Problem]]:
    """(place, text) of every usable row, in order.

    Args:
        encoder: whose tokenizer says which tokens the base cannot read.
        bad: the first of the rows that are skipped is added as `place (fault)`, of the others an empty text.

    Raises:
        InputError: a bad row that is not to be skipped, or no usable row.
    """
    rows, usable = split.rows(form.columns, form.optional), 0
    for place, row in rows:
        try:
            problem = form.write(row)
            encoder.check(problem)
        except BadRow as error:
            if not settings.skip_bad_rows:
                raise InputError(f"{place}: {error}; {_remedy(error, row, rows, form, usable)}") from None
            bad.append("" if bad else f"{place} ({error})")
            continue
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        usable += 1
        yield place, problem
    if not usable:
        reason = f"all {len(bad)} are bad, the first at {bad[0]}" if bad else "it is empty"
        raise InputError(f"{split.name} has no usable row: {reason}; correct it, or name another data set")
    form.refuse_absent(split.name, usable)


def _remedy(fault: BadRow, row: Mapping[str, Any], rows: Iterator[Any], form: Form, usable: int) -> str:
    """The remedy for a bad row. Skipping is offered only where usable rows remain."""
    words, is_text = "correct the row", isinstance(form, TextForm)
    if " is float" in str(fault) or " is bool" in str(fault):
        words = "write such values as text"
    lacks_text = any(word in str(fault) for word in ("empty", "null", "missing"))
    of_columns = form if isinstance(form, TextForm) else form.plain if form.kind == "templates" else None
    if lacks_text and of_columns is not None and of_columns.is_whole_without_some(row):
        words += ", name the column in optional_columns if it may be empty"
    for _, other in () if usable else islice(rows, LOOKED_AT):
        try:
            form.write(other)
        except BadRow:
            continue
        usable += 1
        break
    if usable:
        return f"{words}, or set skip_bad_rows: true to skip and count such rows"
    keys = "prompt_template, completion_template" if is_text else "chat_template"
    return f"no row near it is better: correct {keys} or the data"


def _write(folder: Path, split: Split, settings: DataSettings, form: Form, encoder: Encoder) -> None:
    bad: list[str] = []
    rows, facts = usable_rows(split, settings, form, encoder, bad), []
    with (
        pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file,
        pyarrow.ipc.new_file(file, SCHEMA) as writer,
        _progress(split.name) as advance,
    ):
        for places, problems, encodings in _encoded(rows, encoder):
            columns, facts_of_batch = _columns(
                places, problems, encoder.marked(problems, encodings), settings.max_seq_length
            )
            writer.write_batch(pyarrow.record_batch(columns, schema=SCHEMA))
            facts.append(facts_of_batch)
            advance(len(places))
    whole = np.concatenate(facts)
    np.save(folder / "facts.npy", whole)
    about = {
        "source": split.name,
        "rows": len(whole),
        "skipped": len(bad),
        "first_skipped": bad[0] if bad else None,
    }
    chat, text = (form, form.plain) if isinstance(form, ChatForm) else (None, form)
    about |= {"is_chat": chat is not None, "end_ids": end_ids(encoder.tokenizer, chat)}
    about |= {"form": "text" if chat is None else f"turns ({chat.kind})", "empty": dict(text.empty)}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _encoded(rows: Iterator[tuple[str, Problem]], encoder: Encoder) -> Iterator[Any]:
    """(places, problems, encodings) by batches; the next one is encoded while the caller uses this one."""
    with ThreadPoolExecutor(1) as beside:
        waiting = None
        while batch := list(islice(rows, BATCH)):
            places, problems = zip(*batch, strict=True)
            coming = places, problems, beside.submit(encoder.encode, problems)
            if waiting:
                yield *waiting[:2], waiting[2].result()
            waiting = coming
        if waiting:
            yield *waiting[:2], waiting[2].result()


def _columns(
    places: Sequence[str], problems: Sequence[Problem], rows: Iterator[Tokenised], max_seq_length: int
) -> tuple[list[pyarrow.Array], np.ndarray]:
    """A batch of the Arrow file, and its FACTS."""
    facts, ids, marks = np.zeros(len(problems), FACTS), [], []
    for number, row in enumerate(rows):
        marks_T = np.frombuffer(bytes(row.marks[:max_seq_length]), np.int8)  # faster than from a list
        is_lost = not 0 < row.answer <= max_seq_length and (row.merged > 0 or len(row.ids) > max_seq_length)
        # Nothing predicts the first token.
        targets = row.marks[1:max_seq_length].count(LEARNT)
        facts[number] = (len(row.ids), targets, row.merged, row.strays, row.unknown, is_lost)
        ids.append(np.array(row.ids[:max_seq_length], dtype=np.int32))
        marks.append(marks_T)
    ends = np.concatenate([[0], np.cumsum([len(one) for one in ids])])
    lists = [pyarrow.LargeListArray.from_arrays(ends, np.concatenate(one)) for one in (ids, marks)]
    texts = [[problem.prompt for problem in problems], [problem.completion for problem in problems]]
    strings = [pyarrow.array(one, pyarrow.large_string()) for one in texts]
    return [pyarrow.array(places, pyarrow.string()), *strings, *lists], facts


def _cache_root(settings: DataSettings) -> Path:
    if settings.data_cache_dir is not None:
        return Path(settings.data_cache_dir)
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "chorus"


def _key(split: Split, settings: DataSettings, form: Form, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the folder, from all that the tokenised rows depend on."""
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    template = form.template if isinstance(form, ChatForm) else None
    kind = form.kind if isinstance(form, ChatForm) else None
    keys = (
        settings.prompt_template,
        settings.completion_template,
        settings.optional_columns,
        settings.skip_bad_rows,
    )
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.special_tokens_map)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = "" if backend is None else backend.to_str()
    of_text = (settings.max_seq_length, ends, vocabulary, unreadable(tokenizer))
    parts = (split.name, split.identity, kind, template, keys, *of_text)
    digest.update(repr(parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


@contextmanager
def _disk_errors_named(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"key 'data_cache_dir': cannot write tokenised rows into {root}: {error.strerror or error}; "
            "make room, or name another folder"
        ) from error


@contextmanager
def _progress(name: str):
    """Yields `advance(rows)`, which moves a bar on a terminal and is gone at the end."""
    columns = TextColumn("tokenising {task.description}"), BarColumn(), TextColumn("{task.completed:,} rows")
    console = Console(stderr=True)
    silent = not console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=silent) as progress:
        task = progress.add_task(name, total=None)
        yield lambda rows: progress.advance(task, rows)
