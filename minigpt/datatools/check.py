"""Check data files: every problem with its place and what to do about it.

One pass over the rows finds what training would stop at and what would spoil it. Memory
grows by about 25 bytes a row (300 more with near duplicates), not with the rows' length.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from minigpt.data.chat import refused_texts
from minigpt.data.formats import (
    DAMAGED,
    BadRows,
    Kind,
    Message,
    Preference,
    Record,
    Source,
    Text,
    guess_kind,
    lines_of,
    open_data,
    parse_row,
    read_records,
    scan_rows,
    suffix_of,
    texts_of,
    to_line,
    unused_fields,
    unused_problem,
)
from minigpt.data.store import Encoder, Limits
from minigpt.data.tables import DELIMITERS, refuse_foreign
from minigpt.data.tokenizer import SPECIAL_TOKENS
from minigpt.datatools.duplicates import ExamIndex, NearDuplicates
from minigpt.datatools.encoding import CONTROL, finding, has_odd_characters, readable
from minigpt.errors import DataError
from minigpt.files import atomic_file

# Training takes these rows as they are; all other findings are errors.
HINTS = {
    "bom",
    "control_character",
    "cut",
    "duplicate",
    "near_duplicate",
    "near_validation",
    "replacement_character",
    "same_prompt",
    "unused_fields",
}
_MENDABLE = HINTS - {"duplicate"} | {"encoding"}  # their rows are in the mended copy
_BLOCK_ROWS = 300  # examined together; more of them would keep the garbage collector busy
_ALWAYS_TOKENISED = 8  # rows of a block that are tokenised even if they are short
_CONTROL = re.compile(f"[{CONTROL}]")
_REMEDIES = {
    "control_character": "Use --fix.",
    "replacement_character": "Text was lost when the file was converted: take it from its source.",
    "duplicate": "Leave it out; --fix does.",
    "near_duplicate": "Keep one of them.",
    "validation": "Remove it from one of the files; --fix leaves it out here.",
    "near_validation": "Remove one, or the validation loss will look better than it is.",
    "same_prompt": "Remove one, unless the answers are meant to differ.",
    "exam": "Remove it, as --fix does: an exam must ask what training has not shown.",
    "cut": "Raise --max_length, or shorten the rows.",
    "unused_fields": "Nothing needs to be done where the text alone is to be learnt.",
}

Records = list[tuple[int, Record]]  # good rows with their lines


@dataclass(slots=True)
class Findings(BadRows):
    """The problems of the files: all are counted, and the first of each reason and file listed.

    Attributes:
        limit: how many of each reason and file are listed.
        listed: the problems, as the errors that training would give.
        dropped: per file, the lines that a mended copy leaves out, some of them twice.
    """

    limit: int = 20
    listed: list[DataError] = field(default_factory=list, init=False)
    by_file: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)
    dropped: dict[str, array[int]] = field(default_factory=dict, init=False)

    def handle(self, error: DataError) -> None:
        """Count a problem, and list it if it is among the first."""
        if self.count(error.reason, str(error.path), error.line):
            error.remedy = error.remedy or "Correct it, or leave the row out with --fix."
            self.listed.append(error.at(str(error.path), error.line))

    def count(self, reason: str, path: str, line: int | None) -> bool:
        """Count a problem and return whether it is to be listed."""
        self.counts[reason] += 1
        self.by_file[path, reason] += 1
        if reason not in _MENDABLE:
            self.dropped.setdefault(path, array("I")).append(line or 0)
        return self.by_file[path, reason] <= self.limit

    def errors(self) -> int:
        """Return the number of problems that are not mere hints."""
        return sum(count for reason, count in self.counts.items() if reason not in HINTS)

    def as_dict(self) -> dict[str, object]:
        """Return the counts and the listed problems as plain values."""
        names = ("path", "line", "field", "reason", "problem", "remedy")
        listed = [{name: getattr(error, name) for name in names} for error in self.listed]
        return {"errors": self.errors(), "counts": self.counts, "problems": listed}

    def lines(self) -> Iterator[str]:
        """Yield a line for each listed problem, by file and line, and for each count."""
        for error in sorted(self.listed, key=lambda e: (str(e.path), e.line or 0)):
            yield f"{'hint' if error.reason in HINTS else 'error'}: {error} [{error.reason}]"
        for (path, reason), count in sorted(self.by_file.items()):
            if count > self.limit:
                yield f"{path}: {count - self.limit} more [{reason}]; --all shows them"
        for reason, count in self.counts.most_common():
            yield f"{count:>9,} {'hint ' if reason in HINTS else 'error'} {reason}"


class Checker:
    """Checks files one after the other, then what they have in common.

    Args:
        findings: collects the problems.
        scratch: a directory for mended copies.
        kind: the kind of all rows; guessed from each file's first rows when None.
        validation: files that must not share rows with those checked.
        exams: exam files that must not leak.
        tokenizer: for its special tokens and for what the maximum length leaves to train on.
        max_length: tokens of a sample, as in training.
        near: similarity from which rows count as near duplicates, 0..1; None to not look.

    Attributes:
        rows: rows read so far, good and bad.
    """

    def __init__(
        self,
        findings: Findings,
        scratch: Path,
        kind: Kind | None = None,
        validation: Sequence[str] = (),
        exams: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerFast | None = None,
        max_length: int = 512,
        near: float | None = None,
    ) -> None:
        self.findings = findings
        self.scratch = scratch
        self.kind = kind
        self.rows = 0
        self.tokenizer = tokenizer
        self.limits = Limits(max_length=max_length)
        self.special_tokens: Sequence[str] = SPECIAL_TOKENS
        self.exam = ExamIndex(exams) if exams else None
        self.near = NearDuplicates() if near else None
        self.similarity = near or 0.0
        self.hashes = array("q")  # of all good rows, of validation files first
        self.lines = array("I")  # of the same rows
        self.file_starts: list[tuple[int, Path]] = []  # the number of each file's first good row
        self.validation: dict[int, str] = {}  # file and line of rows and prompts, by hash
        self.copies: dict[Path, Path] = {}
        self.mended_lines: dict[Path, array[int]] = {}
        for path in map(Path, validation):
            self._read_validation(path)
        self.validation_rows = len(self.hashes)

    def check(self, path: Path) -> None:
        """Check one file."""
        copy = self.scratch / f"{len(self.copies)}{suffix_of(path) or '.jsonl'}"
        self.file_starts.append((len(self.hashes), path))
        self.copies[path] = copy = readable(path, copy, self.findings.handle)
        self.mended_lines[path] = array("I")
        try:
            self._check_rows(path, copy, self.kind or guess_kind(copy))
        except DataError as error:
            self.findings.handle(error.at(path, error.line))
        if self.findings.unused:
            self._add("unused_fields", unused_problem(self.findings.unused), path)
            self.findings.unused = set()

    def _check_rows(self, path: Path, copy: Path, kind: Kind) -> None:
        encoder = None
        if self.tokenizer:
            self.special_tokens = refused_texts(self.tokenizer, kind)
            if kind != "text":  # of a text, every part is a target
                encoder = Encoder(kind, self.tokenizer, self.limits)
        for rows in _blocks(scan_rows(copy)):
            self.rows += len(rows)
            records = list(self._good(rows, path, kind))
            self._remember(records)
            self._compare(path, records)
            if encoder:
                self._encode(encoder, path, records)
        if encoder and encoder.cut:
            self._add("cut", f"{encoder.cut} rows are cut to {self.limits.max_length}", path)

    def finish(self) -> None:
        """Find what is the same in rows of all the checked files."""
        duplicates = set()
        for row, other in self._duplicates():
            self._add_pair("duplicate", "the row is the same as", row, other)
            if self.near:
                duplicates.add(row)
        for row, other in self.near.pairs(self.similarity) if self.near else ():
            if row >= self.validation_rows and row not in duplicates:
                validation = other < self.validation_rows
                reason = "near_validation" if validation else "near_duplicate"
                self._add_pair(reason, "the row is nearly", row, other)

    def write_fixed(self, path: Path, out: Path) -> int:
        """Write the good rows of a checked file as JSONL, mended; return how many.

        Raises:
            DataError: when the file cannot be read to its end, or no row is good.
            OSError: when the copy cannot be written.
        """
        written = 0
        with atomic_file(out) as partial, partial.open("wb") as file:
            for line in self._fixed_lines(path):
                file.write(line)
                written += 1
            if not written:
                raise DataError("no row is good, so nothing was written", path=path)
        return written

    def _fixed_lines(self, path: Path) -> Iterator[bytes]:
        dropped = set(self.findings.dropped.get(str(path), ()))
        mended = set(self.mended_lines[path])
        try:
            for line, row in _raw_rows(self.copies[path]):
                if line not in dropped:
                    yield _line(row, line in mended)
        except (*DAMAGED, OSError) as error:
            raise DataError(f"cannot be mended: {error}", path=path) from error
        except DataError as error:
            raise error.at(path, error.line) from None

    def _duplicates(self) -> Iterator[tuple[int, int]]:
        """Yield each row that repeats an earlier one, by numbers: (row, the first of them)."""
        ordered = np.sort(np.asarray(self.hashes)[self.validation_rows :])
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        first = dict.fromkeys(repeated.tolist(), -1)
        for row, value in enumerate(self.hashes):
            if row >= self.validation_rows and (other := first.get(value, row)) < row:
                if other >= 0:
                    yield row, other
                else:
                    first[value] = row

    def _good(
        self, rows: list[tuple[int, object]], path: Path, kind: Kind
    ) -> Iterator[tuple[int, Record]]:
        """Yield the records of good rows with their lines, and report the bad ones."""
        records: list[tuple[int, object, Record]] = []
        for line, row in rows:
            try:
                records.append((line, row, parse_row(row, kind, self.special_tokens)))
            except DataError as error:
                self.findings.handle(error.at(path, line))
            else:
                self.findings.unused |= unused_fields(row, kind)
        texts = chain.from_iterable(texts_of(record) for _, _, record in records)
        odd = has_odd_characters("\n".join(texts))
        for line, row, record in records:
            try:
                good = self._mended(row, record, path, line, kind) if odd else record
            except DataError as error:
                self.findings.handle(error.at(path, line))
                continue
            if self.validation:
                self._look_up(good, path, line)
            yield line, good

    def _remember(self, records: Records) -> None:
        self.lines.extend([line for line, _ in records])
        self.hashes.extend([hash(record) for _, record in records])

    def _mended(self, row: object, record: Record, path: Path, line: int, kind: Kind) -> Record:
        """Report odd characters, and read the row without those that can go."""
        text = "\n".join(texts_of(record))
        if "\ufffd" in text:
            self._add("replacement_character", "holds U+FFFD, for lost text", path, line)
        if not _CONTROL.search(text):
            return record
        self.mended_lines[path].append(line)
        self._add("control_character", "holds control characters", path, line)
        return parse_row(_without_control(row), kind, self.special_tokens)

    def _read_validation(self, path: Path) -> None:
        """Remember where the rows and prompts of a validation file are."""
        self.file_starts.append((len(self.hashes), path))
        bad = BadRows("skip", 1.0)
        rows = read_records([path], self.kind or guess_kind(path), bad)
        records = [(source.line, record) for record, source in rows]
        self._remember(records)
        for line, record in records:
            self.validation.setdefault(hash(record), f"{path}:{line}")
            if prompt := _prompt_hash(record):
                self.validation.setdefault(prompt, f"{path}:{line}")
        self._add_near(records)

    def _look_up(self, record: Record, path: Path, line: int) -> None:
        if source := self.validation.get(hash(record)):
            self._add("validation", f"the row is in the validation data, too: {source}", path, line)
        elif source := self.validation.get(_prompt_hash(record)):
            self._add("same_prompt", f"the validation data have this prompt: {source}", path, line)

    def _compare(self, path: Path, records: Records) -> None:
        self._add_near(records)
        if self.exam:
            texts = [(line, text) for line, record in records for text in texts_of(record)]
            leaked = self.exam.hits([text for _, text in texts])
            for line, item in {texts[i][0]: item for i, item in leaked.items()}.items():
                self._add("exam", f"holds a question of the exam {item}", path, line)

    def _add_near(self, records: Records) -> None:
        if self.near:
            numbers = range(len(self.hashes) - len(records), len(self.hashes))
            self.near.add(["\n".join(texts_of(record)) for _, record in records], numbers)

    def _encode(self, encoder: Encoder, path: Path, records: Records) -> None:
        """Find rows without targets among those that can be too long, and a few others.

        A byte is at least the text of one token, so most rows need not be tokenised.
        """
        assert encoder.codec is not None
        frame = len(encoder.codec.encode_prompt((Message("user", "a"),)))  # around each message
        tokenised = []
        for number, (line, record) in enumerate(records):
            texts = texts_of(record)
            longest = len("".join(texts).encode()) + frame * (len(texts) + 1)
            if number < _ALWAYS_TOKENISED or longest > self.limits.max_length:
                tokenised.append((record, Source(path, line)))
        for _ in encoder.encode(tokenised, self.findings):
            pass

    def _add(self, reason: str, problem: str, path: Path, line: int | None = None) -> None:
        self.findings.handle(finding(path, line, reason, problem, _REMEDIES[reason]))

    def _add_pair(self, reason: str, problem: str, row: int, other: int) -> None:
        path, line = self._at(row)
        if self.findings.count(reason, str(path), line):
            other_path, other_line = self._at(other)
            problem = f"{problem} {other_path}:{other_line}"
            self.findings.listed.append(finding(path, line, reason, problem, _REMEDIES[reason]))

    def _at(self, row: int) -> tuple[Path, int]:
        path = next(path for start, path in reversed(self.file_starts) if start <= row)
        return path, self.lines[row]


def _blocks(rows: Iterable[tuple[int, object]]) -> Iterator[list[tuple[int, object]]]:
    """Yield all rows, some hundreds at a time, and raise what `rows` raises after the last."""
    block: list[tuple[int, object]] = []
    try:
        for row in rows:
            block.append(row)
            if len(block) == _BLOCK_ROWS:
                yield block
                block = []
    except DataError:
        yield block
        raise
    yield block


def _prompt_hash(record: Record) -> int:
    """Return a hash of the messages before the last answer, which no row has; 0 for a text."""
    if isinstance(record, Text):
        return 0
    prompt = record.prompt if isinstance(record, Preference) else record.messages[:-1]
    return hash(("prompt", prompt))


def _without_control(value: object) -> object:
    if isinstance(value, str):
        return _CONTROL.sub("", value)
    if isinstance(value, list):
        return [_without_control(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_control(item) for key, item in value.items()}
    return value


def _raw_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield each row as the bytes of its line, or decoded where the file is no JSONL."""
    with open_data(path) as stream:
        refuse_foreign(path, stream.peek(32)[:32])
        is_lines = suffix_of(path) not in (".txt", *DELIMITERS)
        if is_lines and not stream.peek().lstrip().startswith(b"["):
            yield from ((i, line) for i, line in enumerate(lines_of(stream), 1) if line.strip())
            return
    yield from scan_rows(path)


def _line(row: object, mend: bool) -> bytes:
    """Return a row as a line: its own bytes, unless it must be mended or has no line."""
    if mend or not isinstance(row, bytes):
        value = json.loads(row) if isinstance(row, bytes) else row
        row = to_line(_without_control(value) if mend else value)
    return row.rstrip(b"\r\n") + b"\n"
