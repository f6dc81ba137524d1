"""Files that are not plain UTF-8: told apart, and copied so that training can read them."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from minigpt.data.formats import DAMAGED, LARGEST_ROW, lines_of, open_data
from minigpt.errors import ConfigError, DataError

CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff"  # of a pattern [...]
CONTROL_BYTES = bytes({*range(32), 127} - set(b"\t\n\r"))
_BLOCK = 1 << 20
_C1 = re.compile(b"\xc2[\x80-\x9f]")  # U+0080 to U+009F
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MIN_COMMON = 0.9  # share of characters that belong to GB2312 in text that is really GBK

Report = Callable[[DataError], None]


def readable(path: Path, copy: Path, report: Report) -> Path:
    """Return `path`, or `copy` as a mended UTF-8 copy with the same lines if it needs one.

    Mended are the encoding (GBK, GB18030, UTF-16), a byte order mark, and control characters;
    each is reported with its line. Files that are damaged or cannot be read are returned as they
    are: whoever reads their rows says why.

    Raises:
        ConfigError: when the copy cannot be written.
    """
    try:
        with open_data(path) as stream:
            if all(map(_is_sound, _blocks(stream))):
                return path
    except (*DAMAGED, OSError, DataError):
        return path
    try:
        with copy.open("wb") as out:
            out.writelines(_mended_lines(path, report))
    except _Damaged:
        return path
    except OSError as error:
        raise ConfigError(
            f"A mended copy of {path} cannot be written to {copy.parent}: {error.strerror}. Make "
            "room there, or set TMPDIR to another directory."
        ) from error
    return copy


class _Damaged(Exception):  # noqa: N818  (no error of a user: it stays in this file)
    """A file cannot be read to its end."""


def _mended_lines(path: Path, report: Report) -> Iterator[bytes]:
    try:
        with open_data(path) as stream:
            for line, data in enumerate(_utf8_lines(path, stream, report), 1):
                yield _mended(path, line, data, report)
    except (*DAMAGED, OSError, UnicodeError, DataError) as error:
        raise _Damaged from error


def _blocks(stream: IO[bytes]) -> Iterator[bytes]:
    while block := stream.read(_BLOCK):
        yield block + stream.readline(LARGEST_ROW)


def _is_sound(block: bytes) -> bool:
    if block.startswith(codecs.BOM_UTF8) or len(block.translate(None, CONTROL_BYTES)) < len(block):
        return False
    try:
        return block.isascii() or bool(block.decode())
    except UnicodeDecodeError:
        return False


def _utf8_lines(path: Path, stream: io.BufferedReader[Any], report: Report) -> Iterator[bytes]:
    if not stream.peek(2).startswith(_UTF16):
        yield from lines_of(stream)
        return
    report(finding(path, 1, "encoding", "the file is UTF-16, not UTF-8"))
    with io.TextIOWrapper(stream, "utf-16", newline="\n") as lines:
        for line in iter(partial(lines.readline, LARGEST_ROW), ""):  # at most so much of one
            yield line.encode()


def _mended(path: Path, line: int, data: bytes, report: Report) -> bytes:
    if line == 1 and data.startswith(codecs.BOM_UTF8):
        data = data.removeprefix(codecs.BOM_UTF8)
        report(finding(path, line, "bom", "the file starts with a byte order mark"))
    try:
        data.decode()
    except UnicodeDecodeError:
        if (text := _gbk(data)) is None:
            return data
        data = text.encode()
        report(finding(path, line, "encoding", "the line is GBK, not UTF-8"))
    plain = data.translate(None, CONTROL_BYTES)
    if len(plain) < len(data):
        report(finding(path, line, "control_character", "holds control characters"))
    return plain


def _gbk(data: bytes) -> str | None:
    """Decode GBK; text in other encodings decodes too, but to characters that nobody uses."""
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        return None
    foreign = [char for char in text if not char.isascii()]
    common = "".join(foreign).encode("gb2312", "ignore").decode("gb2312")
    return text if len(common) >= _MIN_COMMON * len(foreign) else None


def has_odd_characters(text: str) -> bool:
    """Tell quickly whether a text holds control characters, byte order marks or U+FFFD."""
    data = text.encode()
    if len(data.translate(None, CONTROL_BYTES)) < len(data) or _C1.search(data):
        return True
    return any(character in text for character in "\ufffd\ufeff\ufffe\uffff")


def finding(
    path: Path, line: int | None, reason: str, problem: str, remedy: str = "Use --fix."
) -> DataError:
    """Return a finding, which has the form of the error that training would give."""
    return DataError(problem, path=str(path), line=line, remedy=remedy, reason=reason)
