"""Rows of data files: JSONL, or one JSON array, plain or gzipped, each with its line.

Whatever a file holds, the outcome is decoded JSON values or a `DataError`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from minigpt import progress
from minigpt.errors import DataError

_REMEDIES = {
    "bad_gzip": "Copy or compress it again.",
    "bad_json": "Each line must hold one JSON object (JSONL), or the whole file one JSON array.",
    "missing_file": "Check the name; relative paths start at the current directory.",
    "no_rows": "Give a file with one JSON object on each line.",
    "unreadable": "Name a file that can be read, or the files in a directory.",
}
_DECODER = json.JSONDecoder()
_BUFFER = 1 << 17


def iter_rows(path: str | Path) -> Iterator[tuple[int, object]]:
    """Stream the decoded rows of a file with their 1-based line, or item of a JSON array.

    Raises:
        DataError: the file or a line of it cannot be read, or it holds no rows.
    """
    for line, row in scan_rows(Path(path)):
        if isinstance(row, DataError):
            raise row.at(path, line)
        yield line, row


def scan_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Stream rows; a line that is not JSON comes as its error, so that others may follow.

    Raises:
        DataError: the file cannot be read, or it holds no rows.
    """
    try:
        with open_data(path) as stream:
            yield from _rows(stream)
    except DataError as error:
        raise error.at(path, error.line) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _error("bad_gzip", f"cut off or damaged gzip data: {error}").at(path) from None
    except OSError as error:
        reason = "missing_file" if isinstance(error, FileNotFoundError) else "unreadable"
        raise _error(reason, f"cannot be read: {error.strerror}").at(path) from None


class _Told(io.FileIO):
    """A file that tells how much of it has been read."""

    done = 0  # a pipe cannot be asked where it is

    def readinto(self, buffer: Any) -> int | None:
        read = super().readinto(buffer)
        self.done += read or 0
        progress.step(self.done, os.fstat(self.fileno()).st_size)
        return read


@contextmanager
def open_data(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain or gzipped file."""
    with io.BufferedReader(_Told(path), _BUFFER) as raw:
        zipped = path.suffix == ".gz" or raw.peek(2)[:2] == b"\x1f\x8b"
        yield cast(IO[bytes], gzip.GzipFile(fileobj=raw) if zipped else raw)


def _error(reason: str, problem: str) -> DataError:
    return DataError(problem, remedy=_REMEDIES[reason], reason=reason)


def _rows(stream: IO[bytes]) -> Iterator[tuple[int, object]]:
    rows = 0
    for line, data in enumerate(stream, 1):
        data = data.removeprefix(codecs.BOM_UTF8) if line == 1 else data
        if not rows and data.lstrip().startswith(b"["):
            items = _decode(data + stream.read(), line)
            if isinstance(items, DataError):
                raise items
            rows = len(items)
            yield from enumerate(items, 1)
        elif data.strip():
            rows += 1
            yield line, _decode(data, line)
    if not rows:
        raise _error("no_rows", "the file holds no rows")


def _decode(data: bytes, line: int) -> Any:
    """Decode JSON that starts at `line` of its file; return the error if it cannot be."""
    reason, remedy = "bad_json", _REMEDIES["bad_json"]
    try:
        text = data.decode().rstrip()
        if text.startswith("{"):  # `loads` takes half as long again
            value, end = _DECODER.raw_decode(text)
            if end == len(text):
                return value
        return json.loads(text)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = error.start - data.rfind(b"\n", 0, error.start)
        encoding = "UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "GBK"
        problem, reason = f"byte {byte} of the line is not UTF-8", "bad_utf8"
        remedy = f"Convert the file, for example with `iconv -f {encoding} -t UTF-8`."
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        problem = f"invalid JSON at column {error.colno}: {error.msg}"
        if error.pos >= len(error.doc):
            problem += " (the line ends inside an object: cut off, or pretty-printed?)"
    except RecursionError:
        problem = "the JSON is nested too deeply"
    except ValueError:
        problem = "the JSON holds a number with too many digits"
    return DataError(problem, line=line, remedy=remedy, reason=reason)
