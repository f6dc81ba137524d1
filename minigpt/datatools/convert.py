"""Any file of rows as JSONL: what training reads, and Parquet, Arrow and spreadsheets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.data.formats import iter_rows, renamed, to_line
from minigpt.data.tables import table_row
from minigpt.errors import ConfigError, DataError
from minigpt.files import atomic_file
from minigpt.reading import reason_of

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_A_TIME = 1024


def convert(sources: Sequence[Path], out: Path, columns: Mapping[str, str]) -> int:
    """Write the rows of files as one JSONL file; return how many.

    Args:
        sources: read one after the other.
        out: appears when all rows are written.
        columns: the rows' keys that get other names.

    Raises:
        DataError: for a file or a row that cannot be read.
        ConfigError: when the package that reads a file is missing.
    """
    count = 0
    with atomic_file(out) as partial, partial.open("wb") as file:
        for source in sources:
            for row in rows_of(source):
                try:
                    file.write(to_line(renamed(row, columns)))
                except (ValueError, RecursionError) as error:
                    problem = f"row {count + 1} cannot be written: {reason_of(error)}"
                    raise DataError(problem, path=source) from error
                count += 1
    return count


def rows_of(path: Path) -> Iterator[object]:
    """Yield the decoded rows of a file of any form that is read."""
    readers = {
        ".parquet": _parquet_rows,
        ".arrow": _arrow_rows,
        ".feather": _arrow_rows,
        ".xlsx": _spreadsheet_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        yield from (row for _, row in iter_rows(path))
        return
    try:
        yield from reader(path)
    except ImportError as error:
        remedy = "Install it (pip install pyarrow openpyxl), or save the file as CSV."
        raise ConfigError(f"{path}: {error}. {remedy}") from error
    except (DataError, FileNotFoundError):
        raise
    except Exception as error:  # damaged files raise whatever the package's parts raise
        remedy = "Copy it again, or save it as CSV."
        problem = f"cannot be read: {reason_of(error)}"
        raise DataError(problem, path=path, remedy=remedy) from error


def _parquet_rows(path: Path) -> Iterator[object]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_AT_A_TIME):
            yield from _without_nulls(batch)


def _arrow_rows(path: Path) -> Iterator[object]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            yield from _without_nulls(batch)


def _without_nulls(batch: pyarrow.RecordBatch) -> Iterator[object]:
    """Yield rows in which a field that is null is absent, as it would be in JSONL.

    Raises:
        pyarrow.ArrowInvalid: when values would be read outside of the batch.
    """
    batch.validate(full=True)
    for row in batch.to_pylist():
        yield {name: value for name, value in row.items() if value is not None}


def _spreadsheet_rows(path: Path) -> Iterator[object]:
    """Yield the rows of the first sheet, whose first row names the columns."""
    import openpyxl

    book: Any = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        rows = book.worksheets[0].iter_rows(values_only=True)
        names = ["" if name is None else str(name).strip() for name in next(rows, ())]
        given = list(filter(None, names))  # a column without a name is left out
        if len(set(given)) < len(given) or not given:
            raise DataError("the first row must name each column once", path=path, line=1)
        for number, cells in enumerate(rows, 2):
            pairs = zip(names, cells, strict=False)
            texts = ((name, str(cell)) for name, cell in pairs if name and cell is not None)
            row = table_row(texts, number)
            if isinstance(row, DataError):
                raise row.at(path, number)
            if row:
                yield row
    finally:
        book.close()
