"""Files of columns as rows: Parquet, Arrow and spreadsheets, a few rows at a time.

A small file may stand for any number of rows and bytes, so that both are bounded.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.data.tables import table_row
from minigpt.errors import DataError
from minigpt.reading import LARGEST_FILE, MEGABYTE, reason_of

if TYPE_CHECKING:
    import pyarrow

Rows = Iterator[tuple[int, object]]

ROWS_AT_A_TIME = 64
LARGEST_ROWS = 256 * MEGABYTE  # of so many rows together
LARGEST_SHEET = 16 * LARGEST_FILE  # bytes of a sheet's XML, of which little is held at a time
SHEET_ROWS = 1 << 20  # as many as Excel has
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
    if beginning.startswith(b"PAR1"):
        return _parquet_rows
    if beginning.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
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
    except Exception as error:  # damaged files raise whatever the package's parts raise
        if isinstance(error, OSError) and error.errno is not None:
            raise
        remedy = "Copy it again, or save it as CSV."
        problem = f"cannot be read: {reason_of(error)}"
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
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
            part = batch.slice(start, ROWS_AT_A_TIME)
            if part.nbytes > LARGEST_ROWS:
                raise _too_large(f"{part.num_rows} rows have {part.nbytes:,} bytes", number + 1)
            for row in part.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}


def _too_large(problem: str, line: int | None = None) -> DataError:
    remedy = "Give its rows as JSONL, or in several files."
    return DataError(problem, line=line, remedy=remedy, reason="row_size")


def _spreadsheet_rows(path: Path, columns: Mapping[str, str]) -> Rows:
    """Yield the rows of the first sheet, whose first row names the columns."""
    import openpyxl

    _check_size(path)
    book: Any = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # which may be stated as anything
        rows = islice(sheet.iter_rows(values_only=True), SHEET_ROWS)
        names = ["" if name is None else str(name).strip() for name in next(rows, ())]
        given = list(filter(None, names))  # a column without a name is left out
        if len(set(given)) < len(given) or not given:
            raise DataError("the first row must name each column once", line=1, reason="bad_table")
        for number, cells in enumerate(rows, 2):
            pairs = zip(names, cells, strict=False)
            texts = ((name, str(cell)) for name, cell in pairs if name and cell is not None)
            if row := table_row(texts, number, columns):
                yield number, row
    finally:
        book.close()


def _check_size(path: Path) -> None:
    """Refuse a spreadsheet that unpacks to too much; `zipfile` unpacks no more than is stated."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            is_sheet = part.filename.startswith("xl/worksheets/")
            limit = LARGEST_SHEET if is_sheet else LARGEST_FILE
            if part.file_size > limit:
                problem = f"its {part.filename} unpacks to {part.file_size:,} bytes"
                raise _too_large(f"{problem}, more than {limit:,}")
