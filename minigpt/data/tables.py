"""Files that are not JSON: plain text, CSV and TSV as rows, compressed ones, names of others."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain, count, pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

from minigpt.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)

COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_COMPRESSION = re.compile(  # by the first bytes of a file
    rb"(?P<gzip>\x1f\x8b)|(?P<xz>\xfd7zXZ\x00)|(?P<bzip2>BZh[1-9]1AY&SY)|(?P<zstd>\(\xb5/\xfd)"
)
_BUFFER = 1 << 17  # bytes decompressed at a time
DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER_DELIMITERS = ";\t,"  # spreadsheets write these where a comma marks decimals
LARGEST_ROW = 1 << 25  # bytes, as JSON; more is no row, but a file of another kind, or a bomb
LARGEST_CELL = LARGEST_ROW  # characters
LOOKED_AT = 1 << 20  # characters of a text in which blank lines are looked for
# Cells of these columns hold JSON: a table has no lists.
NESTED = frozenset(("chosen", "conversations", "history", "messages", "rejected"))
NESTED |= {"choices", "avoid"}  # of exams
# A text may begin with the letters alone; what follows them is the type of a page or a footer.
PARQUET = b"PAR1\x15"
ARROW = {b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow stream"}
FEATHER = b"FEA1\0"
LFS = b"version https://git-lfs"  # how a pointer begins, also in the place of weights
# What a file begins with, and what it is then.
SIGNATURES = {
    PARQUET: "a Parquet file",
    **ARROW,
    FEATHER: "a Feather file of version 1",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet",
    b"%PDF-": "a PDF",
    b"{\\rtf": "a document (RTF)",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"GGUF\x03\x00": "a GGUF model",
    b"SQLite format 3\x00": "an SQLite database",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x04\x22M\x18": "compressed by lz4",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04\x95": "a pickle",
    b"\x80\x05\x95": "a pickle",
    b"ID3\x02": "an audio file",
    b"ID3\x03": "an audio file",
    b"ID3\x04": "an audio file",
    b"\xff\xfb": "an audio file",
    LFS: "a pointer of Git LFS to the file itself",
}
# The same by what stands further on: where, and what.
LATER_SIGNATURES = {(4, b'\0\0\0\0{"'): "a safetensors model", (257, b"ustar"): "a tar archive"}
WEB_PAGE, ARCHIVE = "a web page (HTML)", SIGNATURES[b"PK\x03\x04"]
# What to do with such a file, where its text cannot just be given in another way.
REMEDIES = {
    **dict.fromkeys(
        [SIGNATURES[PARQUET], *ARROW.values()], "Decompress it: it is compressed inside."
    ),
    ARCHIVE: "Unpack it; a spreadsheet's name must end with .xlsx.",
    WEB_PAGE: "Where a download left it, download again; a text's name must end with .txt.",
    SIGNATURES[FEATHER]: "Write it again, by pyarrow 0.17 or later, or give its rows as CSV.",
    SIGNATURES[LFS]: "Get that: git lfs pull.",
}
LOOKED_AT_BYTES = 512  # of a file's beginning
_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)\b", re.IGNORECASE)
OFFICE = (".docx", ".pptx", ".odt", ".odp", ".ods", ".epub")  # archives inside
COLUMNAR = (".arrow", ".feather", ".parquet", ".xlsx")  # see `minigpt.data.columnar`


def decompressed(raw: io.BufferedReader) -> io.BufferedReader[Any]:
    """Return a stream of a file's bytes, decompressed by what it begins with.

    Raises:
        DataError: when the package that decompresses it is missing.
    """
    magic = _COMPRESSION.match(raw.peek(16))
    stream: object
    match magic.lastgroup if magic else None:
        case "gzip":
            stream = gzip.GzipFile(fileobj=raw)
        case "xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115  (its user closes it)
        case "bzip2":
            stream = bz2.BZ2File(raw)
        case "zstd":
            stream = _ZstdFile(raw)
        case _:
            return raw
    return io.BufferedReader(cast(io.RawIOBase, stream), _BUFFER)


class _ZstdFile(io.RawIOBase):
    """What a zstd file decompresses to, in bounded memory.

    Raises:
        DataError: when the package that decompresses it is missing.
        EOFError: on reading, when the file is damaged or cut off.
    """

    def __init__(self, raw: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError:
            remedy = "Install it (pip install zstandard), or decompress the file."
            raise DataError("zstd needs the package zstandard", remedy=remedy) from None
        self._raw = raw
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._in_frame = False
        self._compressed = self._data = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._data:
            if not self._feed():
                return 0
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._data))
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def _feed(self) -> bool:
        """Decompress a little more; return False at the end of the file."""
        # A kilobyte may stand for 40 megabytes.
        compressed = self._compressed or self._raw.read(1024)
        if not compressed and self._in_frame:
            raise EOFError("the file ends inside a frame")
        try:
            self._data = self._frame.decompress(compressed) if compressed else b""
        except self._error as error:
            raise EOFError(str(error)) from error
        self._compressed = self._frame.unused_data
        self._in_frame = bool(compressed) and not self._frame.eof
        if self._frame.eof:
            self._frame = self._new_frame()
        return bool(compressed)


def refuse_foreign(path: PurePath, beginning: bytes) -> None:
    """Refuse, with a DataError, a file of a kind that has no rows, by its first bytes."""
    name = next((n for sign, n in SIGNATURES.items() if beginning.startswith(sign)), None)
    later = LATER_SIGNATURES.items()
    name = name or next((n for (at, sign), n in later if beginning.startswith(sign, at)), None)
    suffix = path.suffix.lower()
    remedy = "Give the text in it as JSONL, CSV or plain text."
    if name is None and suffix != ".txt" and _HTML.match(beginning):
        name = WEB_PAGE
    elif name is None and suffix in COLUMNAR and beginning:
        name = f"no {suffix} file, by what it begins with"
        remedy = "Copy it again, or name it for what it is."
    elif name == ARCHIVE and suffix in OFFICE:
        name = f"a document ({suffix})"
    if name is None:
        return
    remedy = REMEDIES.get(name, remedy)
    raise DataError(f"the file is {name}", remedy=remedy, reason="foreign")


def text_rows(path: PurePath, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the documents of a plain text, each with its first line's number.

    Where blank lines part the text, a document is what lies between them; else it is a line.

    Args:
        path: of the file, for the log.
        lines: of the file, with their ends.

    Raises:
        DataError: for a line that is not UTF-8.
    """
    numbered = enumerate(map(text_of_line, lines, count(1)), 1)
    looked_at: list[tuple[int, str]] = []
    size = 0
    for number, line in numbered:
        looked_at.append((number, line))
        size += len(line)
        if size > LOOKED_AT:
            break
    has_text = [bool(line.strip()) for _, line in looked_at]
    by_blocks = any(text and not text_before for text_before, text in pairwise(has_text))
    log_documents(path, "what lies between blank lines" if by_blocks else "a line")
    block: list[str] = []
    start = 1
    size = 0
    for number, line in chain(looked_at, numbered):
        is_blank = not line.strip()
        if not is_blank:
            if not block:
                start, size = number, 0
            size += len(line)
            if size > LARGEST_CELL:
                raise _too_long(start)
            block.append(line)
        if block and (is_blank or not by_blocks):
            yield start, {"text": "".join(block).strip("\r\n")}
            block = []
    if block:
        yield start, {"text": "".join(block).strip("\r\n")}


def _too_long(line: int) -> DataError:
    return DataError(
        f"the document that begins here has more than {LARGEST_CELL:,} characters",
        line=line,
        remedy="Part it by blank lines.",
        reason="row_size",
    )


@cache
def log_documents(path: PurePath, document: str) -> None:
    """Log what a document of a plain text is, once in a process."""
    log.info("%s: a document is %s.", path, document)


def text_of_line(line: bytes, number: int) -> str:
    """Decode a line, or raise a DataError that names it by its number."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(error.start + 1, number) from None


def not_utf8(byte: int, line: int) -> DataError:
    """Return the error for a line that is damaged, or in an encoding that is not recognised."""
    return DataError(
        f"byte {byte} of the line is neither UTF-8 nor Chinese in GB18030",
        line=line,
        remedy="Convert the file to UTF-8, for example with iconv, or leave the line out.",
        reason="bad_utf8",
    )


def table_rows(
    lines: Iterable[bytes], delimiter: str, columns: Mapping[str, str]
) -> Iterator[tuple[int, object]]:
    """Yield the rows of a CSV or TSV file with their first line's number; empty cells are left out.

    Its first line names the columns. A row that does not fit comes as its error.

    Args:
        lines: of the file, with their ends.
        delimiter: between two cells, unless the first line lacks it and has another.
        columns: names that decide instead of the table's own which cells hold JSON.

    Raises:
        DataError: when there are no names, or the file is not UTF-8.
    """
    csv.field_size_limit(LARGEST_CELL)
    texts = map(text_of_line, lines, count(1))
    first = next(texts, "")
    if delimiter not in first:
        delimiter = next((other for other in OTHER_DELIMITERS if other in first), delimiter)
    reader = csv.reader(chain([first], texts), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if not all(names) or len(set(names)) < len(names) or not names:
            raise _bad_table("the first line must name each column once", 1)
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if len(cells) > len(names):
                problem = f"{len(cells)} cells stand under {len(names)} columns"
                yield line, _bad_table(problem, line)
            elif cells:
                yield line, table_row(zip(names, cells, strict=False), line, columns)
    except csv.Error as error:
        if str(error).startswith("new-line character"):  # what follows is for programmers
            remedy = "Save it with the line ends of Windows or Linux."
            raise _bad_table("lines end with CR alone", reader.line_num, remedy) from None
        raise _bad_table(str(error), reader.line_num) from None


def table_row(
    cells: Iterable[tuple[str, str]], line: int, columns: Mapping[str, str]
) -> dict[str, object] | DataError:
    """Return the row of a table's cells, each with its column; its error where one is no JSON."""
    row: dict[str, object] = {}
    for name, cell in cells:
        if columns.get(name, name) in NESTED and cell.lstrip().startswith(("[", "{")):
            try:
                row[name] = json.loads(cell)
            except (ValueError, RecursionError):
                return _bad_table(f"the cell of {name} is not JSON", line)
        elif cell:
            row[name] = cell
    return row


def _bad_table(problem: str, line: int, remedy: str = "") -> DataError:
    remedy = remedy or "Quote cells that hold the delimiter, a quote or a line break."
    return DataError(problem, line=line, remedy=remedy, reason="bad_table")
