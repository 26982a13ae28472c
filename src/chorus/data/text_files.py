"""Text of files, plain or gzipped, by lines or in chunks; invalid UTF-8 is reported with its line.

With the standard library: `datasets` fills missing keys, merges types and drops line numbers.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from chorus.errors import InputError

CHUNK = 2**20  # bytes that are read at a time, where lines do not matter
NEW_LINE = b"\n"
HOLDS_NUL = "holds a NUL character; the file is damaged, is not text, or is UTF-16: save it as UTF-8"


class Row(NamedTuple):
    """A row as its source holds it, and where: `data.jsonl:7`, or `data.parquet row 7`."""

    place: str
    fields: Mapping[str, Any]


def listed(names: Iterable[str]) -> str:
    """Names in quotes, for a message."""
    return ", ".join(repr(name) for name in names) or "nothing"


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line with its end) of a UTF-8 file. Only a line
    feed ends a line: JSON may hold U+2028 as it is."""
    number = 0
    try:
        with _reading_errors_named(path), _opened(path) as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8")
                if "\0" in line:
                    raise InputError(f"{path}:{number}: {HOLDS_NUL}")
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: {_not_utf_8(error.object, error.start)}") from None


def text_chunks(path: Path) -> Iterator[str]:
    """The same text in parts of up to `CHUNK` bytes, so that a line may be of any length."""
    decoder, is_first = codecs.getincrementaldecoder("utf-8")(), True
    line, in_line = 1, 0  # of what is read next, and how many bytes of that line were read
    with _reading_errors_named(path), _opened(path) as file:
        while True:
            raw, left_over = file.read(CHUNK), len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                begin = before.rfind(b"\n") + 1
                at = error.start - begin + (0 if begin else in_line - left_over)
                said = _not_utf_8(error.object[begin:], at)
                raise InputError(f"{path}:{line + before.count(NEW_LINE)}: {said}") from None
            if "\0" in text:
                number = line + text.partition("\0")[0].count("\n")
                raise InputError(f"{path}:{number}: {HOLDS_NUL}")
            in_line = len(raw) - raw.rfind(b"\n") - 1 if NEW_LINE in raw else in_line + len(raw)
            line += text.count("\n")
            yield text.removeprefix("\ufeff") if is_first else text
            is_first = is_first and not text
            if not raw:
                return


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _reading_errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is not a whole gzip file: {error}; compress it again") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); let the user of this run read it, or name another "
            "file"
        ) from None


def _not_utf_8(line: bytes, at: int) -> str:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is UTF-16 text; save the file as UTF-8"
    return f"is not UTF-8 at byte {at + 1} of the line; save the file as UTF-8"
