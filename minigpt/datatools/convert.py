"""Files of rows of any form as one JSONL file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from minigpt.data.formats import iter_rows, renamed, to_line
from minigpt.errors import DataError
from minigpt.files import atomic_file
from minigpt.reading import reason_of

log = logging.getLogger(__name__)


def convert(sources: Sequence[Path], out: Path, columns: Mapping[str, str]) -> int:
    """Write the rows of files as one JSONL file; return how many.

    Args:
        sources: read one after the other.
        out: appears when all rows are written.
        columns: the rows' keys that get other names.

    Raises:
        DataError: for a file or a row that cannot be read.
    """
    count = 0
    missing = set(columns)
    with atomic_file(out) as partial, partial.open("wb") as file:
        for source in sources:
            for _, row in iter_rows(source, columns):
                if missing and isinstance(row, dict):
                    missing -= row.keys()
                try:
                    file.write(to_line(renamed(row, columns)))
                except (ValueError, RecursionError) as error:
                    problem = f"row {count + 1} cannot be written: {reason_of(error)}"
                    raise DataError(problem, path=source) from error
                count += 1
    if missing:
        log.warning("--columns: no row has the key %s.", ", ".join(sorted(missing)))
    return count
