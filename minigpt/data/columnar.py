"""Files of columns as rows: Parquet, Arrow and spreadsheets, a few rows at a time.

A small file may stand for any number of rows and bytes, so that both are bounded.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from xml.parsers import expat

from minigpt.data.tables import ARROW, LARGEST_ROW, PARQUET, table_row
from minigpt.errors import DataError
from minigpt.reading import (
    LARGEST_FILE,
    MEGABYTE,
    SECONDS,
    TimeUpError,
    limited_memory,
    limited_time,
    reason_of,
)

if TYPE_CHECKING:
    import pyarrow
    from _typeshed import WriteableBuffer

Rows = Iterator[tuple[int, object]]

ROWS_AT_A_TIME = 8  # a Parquet dictionary gives each row a value as large as the file says
LARGEST_ROWS = 256 * MEGABYTE  # of so many rows together
LARGEST_BATCH = 1024 * MEGABYTE  # that a batch of Arrow or a page of Parquet unpacks to
LARGEST_SHEET = 16 * LARGEST_FILE  # bytes of a sheet's XML, of which little is held at a time
SHEET_ROWS = 1 << 20  # as many as Excel has
ROW_ELEMENTS = 8 << 14  # of XML: Excel has 16,384 columns, and a cell holds its value or its text
PART_ELEMENTS = 8 * SHEET_ROWS  # of the upper levels: a sheet's rows, or four million strings
ROW_DEPTH = 3  # a sheet holds data, which holds rows
_OPEN_SHEETS = (".xlsx", ".xlsm")


def reader_of(
    path: Path, beginning: bytes, columns: Mapping[str, str]
) -> Callable[[Path], Rows] | None:
    """Return what reads a file that begins like this; None for text and for other files.

    Args:
        path: of the file.
        beginning: its first bytes.
        columns: see `minigpt.data.tables.table_rows`.
    """
    if beginning.startswith(PARQUET):
        return _parquet_rows
    if beginning.startswith(tuple(ARROW)):
        return _arrow_rows
    if beginning.startswith(b"PK\x03\x04") and path.suffix.lower() in _OPEN_SHEETS:
        return partial(_spreadsheet_rows, columns=columns)
    return None


def columnar_rows(path: Path, read: Callable[[Path], Rows]) -> Rows:
    """Yield the rows of a file with their numbers, from 1, or those of a sheet's rows.

    Args:
        path: of the file.
        read: see `reader_of`.

    Raises:
        DataError: when the file cannot be read, or the package that reads it is missing.
    """
    try:
        yield from read(path)
    except ImportError as error:
        remedy = "Install them (pip install 'minigpt[tables]'), or save the file as JSONL or CSV."
        problem = f"Parquet and Arrow need pyarrow, spreadsheets openpyxl: {reason_of(error)}"
        raise DataError(problem, path=path, remedy=remedy, reason="no_package") from error
    except DataError:
        raise
    except (Exception, TimeUpError) as error:  # damaged files raise whatever the package does
        if isinstance(error, OSError) and error.errno is not None:
            raise
        remedy = "Copy it again, or save it as CSV."
        kinds: dict[object, str] = {_parquet_rows: "a Parquet file", _arrow_rows: "an Arrow file"}
        kind = kinds.get(read, "a spreadsheet")
        problem = f"cannot be read as {kind}, as which it begins: {reason_of(error)}"
        raise DataError(problem, path=path, remedy=remedy, reason="bad_table") from error


def _parquet_rows(path: Path) -> Rows:
    from pyarrow import parquet

    # Without these a whole row group is in memory.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=MEGABYTE) as file:
        yield from _rows(file.iter_batches(ROWS_AT_A_TIME, use_threads=False))


def _arrow_rows(path: Path) -> Rows:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        yield from _rows(batches)


def _rows(batches: Iterator[pyarrow.RecordBatch]) -> Rows:
    """Yield rows in which a field that is null is absent, as it would be in JSONL.

    Raises:
        pyarrow.ArrowInvalid: when values would be read outside of the batch.
    """
    number = 0
    for batch in _decoded(batches):
        batch.validate(full=True)
        for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
            part = batch.slice(start, ROWS_AT_A_TIME)
            if part.nbytes > LARGEST_ROWS:
                raise _too_large(f"{part.num_rows} rows have {part.nbytes:,} bytes", number + 1)
            for row in part.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}


def _decoded(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """Yield batches that are decoded in bounded memory: some kilobytes may unpack to gigabytes."""
    while True:
        try:
            with limited_memory(LARGEST_BATCH):
                batch = next(batches, None)
        except MemoryError:
            raise _too_large(f"a part of it unpacks to more than {LARGEST_BATCH:,} bytes") from None
        if batch is None:
            return
        yield batch


def _too_large(problem: str, line: int | None = None) -> DataError:
    remedy = "Give its rows as JSONL, or in several files."
    return DataError(problem, line=line, remedy=remedy, reason="row_size")


def _spreadsheet_rows(path: Path, columns: Mapping[str, str]) -> Rows:
    """Yield the rows of the first sheet, whose first row names the columns."""
    with path.open("rb") as file, _Archive(file) as archive:
        rows = islice(_first_sheet(path, archive), SHEET_ROWS)
        names = ["" if name is None else str(name).strip() for name in next(rows, ())]
        given = list(filter(None, names))  # a column without a name is left out
        if len(set(given)) < len(given) or not given:
            raise DataError("the first row must name each column once", line=1, reason="bad_table")
        for number, cells in enumerate(rows, 2):
            pairs = zip(names, cells, strict=False)
            texts = [(name, str(cell)) for name, cell in pairs if name and cell is not None]
            if sum(len(text) for _, text in texts) > LARGEST_ROW:  # its cells may share a string
                raise _too_large(f"the row has more than {LARGEST_ROW:,} characters", number)
            if row := table_row(texts, number, columns):
                yield number, row


def _first_sheet(path: Path, archive: _Archive) -> Iterator[tuple[object, ...]]:
    """Return the rows of the first sheet, as the values of their cells."""
    from openpyxl.reader.excel import ExcelReader

    reader: Any = ExcelReader(path, read_only=True, data_only=True)
    reader.archive.close()
    reader.archive = archive
    with limited_time(SECONDS):  # all strings of the book are read here
        reader.read()
    sheet = reader.wb.worksheets[0]
    sheet.reset_dimensions()  # which may be stated as anything
    return cast(Iterator[tuple[object, ...]], sheet.iter_rows(values_only=True))


class _Archive(zipfile.ZipFile):
    """A spreadsheet, of which no part fills the memory.

    Raises:
        DataError: when a part unpacks to too much; `zipfile` unpacks no more than is stated.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        for part in self.infolist():
            is_sheet = part.filename.startswith("xl/worksheets/")
            limit = LARGEST_SHEET if is_sheet else LARGEST_FILE
            if part.file_size > limit:
                problem = f"its {part.filename} unpacks to {part.file_size:,} bytes"
                raise _too_large(f"{problem}, more than {limit:,}")

    def open(self, *args: Any, **options: Any) -> IO[bytes]:
        """Open a part, see `_Part`."""
        return cast(IO[bytes], _Part(super().open(*args, **options)))


class _Part(io.RawIOBase):
    """The bytes of a spreadsheet's part, as long as little of it is kept.

    openpyxl forgets the inside of a row at the row's end. It keeps all else: the elements of the
    three upper levels (the sheet, its data, their rows) and what stands between them.

    Args:
        part: unpacked.

    Raises:
        DataError: on reading, for a row that is too large, or too much that is kept.
    """

    def __init__(self, part: IO[bytes]) -> None:
        self._part = part
        self._parser: expat.XMLParserType | None = expat.ParserCreate()
        self._parser.StartElementHandler = self._begin
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._refuse_entities
        self._depth = 0
        self._upper_elements = 0  # which openpyxl keeps
        self._row_elements = 0  # of the row that is being read
        self._outside = 0  # bytes outside of rows, up to the row that is being read
        self._read = self._mark = 0  # bytes read, and those before this row, or after the last one

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._part.read(len(view))
        view[: len(data)] = data
        if self._parser is not None:
            self._look_at(data, self._parser)
        return len(data)

    def close(self) -> None:
        self._part.close()
        super().close()

    def _look_at(self, data: bytes, parser: expat.XMLParserType) -> None:
        self._read += len(data)
        try:
            parser.Parse(data)
        except expat.ExpatError:  # openpyxl finds the same error, if it parses this at all
            self._parser = None
            return
        size = self._read - self._mark
        if self._row_elements and size > LARGEST_ROW:
            raise _too_large(f"a row of the sheet has more than {LARGEST_ROW:,} bytes")
        if self._outside + (0 if self._row_elements else size) > LARGEST_FILE:
            raise _too_large(f"more than {LARGEST_FILE:,} bytes of it stand outside of rows")
        if self._upper_elements > PART_ELEMENTS:
            raise _too_large(f"a part of it has more than {PART_ELEMENTS:,} elements")
        if self._row_elements > ROW_ELEMENTS:
            raise _too_large(f"a row of the sheet has more than {ROW_ELEMENTS:,} elements")

    def _begin(self, _: str, __: object) -> None:
        self._depth += 1
        if self._depth > ROW_DEPTH:
            if not self._row_elements:
                self._outside += self._move_mark()
            self._row_elements += 1
        else:
            self._upper_elements += 1

    def _end(self, _: str) -> None:
        if self._depth <= ROW_DEPTH and self._row_elements:
            self._move_mark()
            self._row_elements = 0
        self._depth -= 1

    def _refuse_entities(self, *_: object) -> None:
        raise _too_large("a part of it declares entities, which may stand for any text")

    def _move_mark(self) -> int:
        """Set the mark to where the parser is; return how far it moved."""
        assert self._parser is not None
        before, self._mark = self._mark, self._parser.CurrentByteIndex
        return self._mark - before
