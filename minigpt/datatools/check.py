"""Check data files: every problem with its place and what to do about it.

One pass over the rows finds what training would stop at and what would spoil it. Memory
grows by about 25 bytes a row (300 more with near duplicates), not with the rows' length.
"""

from __future__ import annotations

import json
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from minigpt.data.chat import refused_texts
from minigpt.data.formats import (
    BadRows,
    Kind,
    Message,
    Source,
    open_data,
    read_records,
    scan_rows,
    unused_fields,
    unused_problem,
)
from minigpt.data.store import Encoder, Limits
from minigpt.data.tokenizer import SPECIAL_TOKENS
from minigpt.datatools.duplicates import ExamIndex, NearDuplicates
from minigpt.datatools.encoding import finding, readable
from minigpt.datatools.flat import CONTROL, Batch, Flat, batches, flat_of, parse, record_of
from minigpt.errors import DataError
from minigpt.files import whole_file

# Training takes these rows as they are; all other findings are errors.
HINTS = {
    *("bom", "control_character", "replacement_character", "duplicate", "near_duplicate"),
    *("near_validation", "same_prompt", "cut", "unused_fields"),
}
_STAY = HINTS - {"duplicate"} | {"encoding"}  # their rows are in the mended copy
_PEEKED = 100  # rows that are looked at to guess a file's kind
_TRIED = 8  # short rows of a batch that are tokenised as well
_STRAY = re.compile(f"[{CONTROL}]")
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

Good = list[tuple[int, Flat]]  # rows with their lines


@dataclass(slots=True)
class Findings(BadRows):
    """The problems found: all are counted, and the first of each reason and file kept.

    Attributes:
        limit: how many are kept.
        kept: the problems, as the errors that training would give.
        dropped: per file, the lines that a mended copy leaves out, some of them twice.
    """

    limit: int = 20
    kept: list[DataError] = field(default_factory=list, init=False)
    by_file: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)
    dropped: dict[str, array[int]] = field(default_factory=dict, init=False)

    def handle(self, error: DataError) -> None:
        """Take in a problem."""
        if self.count(error.reason, str(error.path), error.line):
            error.remedy = error.remedy or "Correct it, or leave the row out with --fix."
            self.kept.append(error.at(str(error.path), error.line))

    def count(self, reason: str, path: str, line: int | None) -> bool:
        """Count a problem and return whether it is to be kept."""
        self.counts[reason] += 1
        self.by_file[path, reason] += 1
        if reason not in _STAY:
            self.dropped.setdefault(path, array("I")).append(line or 0)
        return self.by_file[path, reason] <= self.limit

    def errors(self) -> int:
        """Return the number of problems that are not mere hints."""
        return sum(count for reason, count in self.counts.items() if reason not in HINTS)

    def as_dict(self) -> dict[str, object]:
        """Return the counts and the kept problems as plain values."""
        names = ("path", "line", "field", "reason", "problem", "remedy")
        kept = [{name: getattr(error, name) for name in names} for error in self.kept]
        return {"errors": self.errors(), "counts": self.counts, "problems": kept}

    def lines(self) -> Iterator[str]:
        """Yield a line for each kept problem, by place, and for each count."""
        for error in sorted(self.kept, key=lambda e: (str(e.path), e.line or 0)):
            yield f"{'hint' if error.reason in HINTS else 'error'}: {error} [{error.reason}]"
        for (path, reason), count in sorted(self.by_file.items()):
            if count > self.limit:
                yield f"{path}: {count - self.limit} more [{reason}]; --all shows them"
        for reason, count in self.counts.most_common():
            yield f"{count:>9,} {'hint ' if reason in HINTS else 'error'} {reason}"


def guess_kind(path: Path) -> Kind:
    """Tell a file's kind by the keys of its first object; "chat" is the default."""
    for _, row in islice(scan_rows(path), _PEEKED):
        if isinstance(row, dict):
            if row.get("chosen") is not None and row.get("rejected") is not None:
                return "preference"
            return "text" if "text" in row and "messages" not in row else "chat"
    return "chat"


class Checker:
    """Checks files one after the other, then what they have in common.

    Args:
        findings: takes the problems in.
        scratch: a directory for mended copies.
        kind: of all files; guessed from each file's first rows when None.
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
        self.findings, self.scratch, self.kind, self.rows = findings, scratch, kind, 0
        self.tokenizer, self.limits = tokenizer, Limits(max_length=max_length)
        self.special: Sequence[str] = SPECIAL_TOKENS
        self.exam = ExamIndex(exams) if exams else None
        self.near, self.similar = NearDuplicates() if near else None, near or 0.0
        self.hashes, self.lines = array("q"), array("I")  # of all good rows
        self.starts: list[tuple[int, Path]] = []  # the first good row of each file
        self.places: dict[int, str] = {}  # of validation rows and prompts, by hash
        self.copies: dict[Path, Path] = {}
        self.mended: dict[Path, array[int]] = {}  # lines
        for path in map(Path, validation):
            self._read_validation(path)
        self.compared = len(self.hashes)  # rows before this one belong to validation files

    def check(self, path: Path) -> None:
        """Check one file."""
        copy = self.scratch / f"{len(self.copies)}.jsonl"
        self.starts.append((len(self.hashes), path))
        self.copies[path] = copy = readable(path, copy, self.findings.handle)
        self.mended[path] = array("I")
        unused: set[str] = set()
        try:
            kind = self.kind or guess_kind(copy)
            encoder = None
            if self.tokenizer:
                self.special = refused_texts(self.tokenizer, kind)
            if self.tokenizer and kind != "text":  # of a text, every part is a target
                encoder = Encoder(kind, self.tokenizer, self.limits)
            for rows in batches(scan_rows(copy), kind, self.special):
                self.rows += len(rows.lines)
                for number, row in rows.special.items():
                    if isinstance(rows.flats[number], tuple):
                        unused |= unused_fields(row, kind)
                batch = list(self._good(rows, path, kind))
                self._keep(batch)
                self._compare(path, batch)
                if encoder:
                    self._encode(encoder, path, batch, kind)
            if encoder and encoder.cut:
                self._add("cut", f"{encoder.cut} rows are cut to {self.limits.max_length}", path)
        except DataError as error:
            self.findings.handle(error.at(path, error.line))
        if unused:
            self._add("unused_fields", unused_problem(unused), path)

    def finish(self) -> None:
        """Find what is the same in rows of all the checked files."""
        known = set()
        for row, other in self._duplicates():
            self._add_pair("duplicate", "the row is the same as", row, other)
            if self.near:
                known.add(row)
        for row, other in self.near.pairs(self.similar) if self.near else ():
            if row >= self.compared and row not in known:
                reason = "near_validation" if other < self.compared else "near_duplicate"
                self._add_pair(reason, "the row is nearly", row, other)

    def write_fixed(self, path: Path, out: Path) -> int:
        """Write the good rows of a checked file as JSONL, mended; return how many.

        Raises:
            DataError: when the file cannot be read to its end, or no row is good.
        """
        dropped, written = set(self.findings.dropped.get(str(path), ())), 0
        mended = set(self.mended[path])
        with whole_file(out) as partial, partial.open("wb") as file:
            try:
                for line, row in _raw_rows(self.copies[path]):
                    if line not in dropped:
                        file.write(_line(row, line in mended))
                        written += 1
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"cannot be mended: {error}", path=path) from error
            except DataError as error:
                raise error.at(path, error.line) from None
            if not written:
                raise DataError("no row is good, so nothing was written", path=path)
        return written

    def _duplicates(self) -> Iterator[tuple[int, int]]:
        """Yield each row that repeats an earlier one, by numbers: (row, the first of them)."""
        ordered = np.sort(np.asarray(self.hashes)[self.compared :])
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        first = dict.fromkeys(repeated.tolist(), -1)
        for row, value in enumerate(self.hashes):
            if row >= self.compared and (other := first.get(value, row)) < row:
                if other >= 0:
                    yield row, other
                else:
                    first[value] = row

    def _good(self, rows: Batch, path: Path, kind: Kind) -> Iterator[tuple[int, Flat]]:
        for number, (line, flat) in enumerate(zip(rows.lines, rows.flats, strict=True)):
            if number in rows.special and isinstance(flat, tuple):
                flat = self._mended(rows.special[number], flat, path, line, kind)
            if isinstance(flat, DataError):
                self.findings.handle(flat.at(path, line))
                continue
            if self.places:
                self._look_up(flat, path, line)
            yield line, flat

    def _keep(self, rows: Good) -> None:
        self.lines.extend([line for line, _ in rows])
        self.hashes.extend([hash(flat) for _, flat in rows])

    def _mended(
        self, row: object, flat: Flat, path: Path, line: int, kind: Kind
    ) -> Flat | DataError:
        """Report odd characters, and read the row without those that can go."""
        text = "\n".join(flat[1::2])
        if "\ufffd" in text:
            self._add("replacement_character", "holds U+FFFD, for lost text", path, line)
        if not _STRAY.search(text):
            return flat
        self.mended[path].append(line)
        self._add("control_character", "holds control characters", path, line)
        return parse(_without_control(row), kind, self.special)

    def _read_validation(self, path: Path) -> None:
        """Remember where the rows and prompts of a validation file are."""
        self.starts.append((len(self.hashes), path))
        bad, kind = BadRows("skip", 1.0), self.kind or guess_kind(path)
        records = read_records([path], kind, bad)
        batch = [(source.line, flat_of(record)) for record, source in records]
        self._keep(batch)
        for line, flat in batch:
            for part in filter(None, (flat, _prompt(flat))):
                self.places.setdefault(hash(part), f"{path}:{line}")
        self._add_near(batch)

    def _look_up(self, flat: Flat, path: Path, line: int) -> None:
        if place := self.places.get(hash(flat)):
            self._add("validation", f"the row is in the validation data, too: {place}", path, line)
        elif (prompt := _prompt(flat)) and (place := self.places.get(hash(prompt))):
            self._add("same_prompt", f"the validation data have this prompt: {place}", path, line)

    def _compare(self, path: Path, batch: Good) -> None:
        self._add_near(batch)
        if self.exam:
            leaked = self.exam.hits([text for _, flat in batch for text in flat[1::2]])
            lines = [line for line, flat in batch for _ in flat[1::2]] if leaked else []
            for line, item in {lines[i]: item for i, item in leaked.items()}.items():
                self._add("exam", f"holds a question of the exam {item}", path, line)

    def _add_near(self, batch: Good) -> None:
        if self.near:
            numbers = range(len(self.hashes) - len(batch), len(self.hashes))
            self.near.add(["\n".join(flat[1::2]) for _, flat in batch], numbers)

    def _encode(self, encoder: Encoder, path: Path, batch: Good, kind: Kind) -> None:
        """Find rows without targets among those that can be too long, and a few others.

        A byte is at least the text of one token, so most rows need not be tokenised.
        """
        assert encoder.codec is not None
        frame = len(encoder.codec.encode_prompt((Message("user", "a"),)))  # around each message
        some = []
        for number, (line, flat) in enumerate(batch):
            texts = flat[1::2]
            longest = len("".join(texts).encode()) + frame * (len(texts) + 1)
            if number < _TRIED or longest > self.limits.max_length:
                some.append((record_of(flat, kind), Source(path, line)))
        for _ in encoder.encode(some, self.findings):
            pass

    def _add(self, reason: str, problem: str, path: Path, line: int | None = None) -> None:
        self.findings.handle(finding(path, line, reason, problem, _REMEDIES[reason]))

    def _add_pair(self, reason: str, problem: str, row: int, other: int) -> None:
        path, line = self._at(row)
        if self.findings.count(reason, str(path), line):
            problem = "{} {}:{}".format(problem, *self._at(other))
            self.findings.kept.append(finding(path, line, reason, problem, _REMEDIES[reason]))

    def _at(self, row: int) -> tuple[Path, int]:
        path = next(path for start, path in reversed(self.starts) if start <= row)
        return path, self.lines[row]


def _prompt(flat: Flat) -> tuple[Flat, ...]:
    """Return the messages before the last answer, in a tuple that equals no row; or nothing."""
    prompt = flat[: -4 if flat[-4::2] == ("assistant", "assistant") else -2]
    return (prompt,) if prompt else ()


def _without_control(value: object) -> object:
    if isinstance(value, str):
        return _STRAY.sub("", value)
    if isinstance(value, list):
        return [_without_control(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_control(item) for key, item in value.items()}
    return value


def _raw_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield each row as the bytes of its line, or decoded where the file is one array."""
    with open_data(path) as stream:
        first = next((line for line in stream if line.strip()), b"")
        if not first.lstrip().startswith(b"["):
            stream.seek(0)
            yield from ((i, line) for i, line in enumerate(stream, 1) if line.strip())
            return
    yield from scan_rows(path)


def _line(row: object, mend: bool) -> bytes:
    """Return a row as a line: its own bytes, unless it must be mended or has no line."""
    if mend or not isinstance(row, bytes):
        value = json.loads(row) if isinstance(row, bytes) else row
        row = json.dumps(_without_control(value) if mend else value, ensure_ascii=False)
        row = row.encode(errors="backslashreplace")  # so a lone surrogate stays an escape
    return row.rstrip(b"\r\n") + b"\n"
