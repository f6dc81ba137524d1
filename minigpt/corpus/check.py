"""Check data files: every problem with its place and what to do about it.

One pass over the rows finds what training would stop at and what would spoil it. Memory
grows by about 40 bytes a row (300 more with near duplicates), not with the rows' length.
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

from minigpt.corpus.duplicates import ExamIndex, NearDuplicates
from minigpt.corpus.encoding import finding, open_data, readable
from minigpt.data import records as forms
from minigpt.data.records import BadRows, Kind, Message, Record, Source, parse_row
from minigpt.data.rows import scan_rows
from minigpt.data.store import Encoder, Limits
from minigpt.data.tokenizer import SPECIAL_TOKENS, special_texts
from minigpt.errors import DataError
from minigpt.files import whole_file

# Training takes these rows as they are; all other findings are errors.
HINTS = {
    *("bom", "control_character", "replacement_character", "duplicate", "near_duplicate"),
    *("near_validation", "same_prompt", "cut"),
}
_STAY = HINTS - {"duplicate"} | {"encoding"}  # their rows are in the mended copy
_AT_A_TIME = 2000  # rows whose texts are compared or tokenised together
_PEEKED = 100  # rows that are looked at to guess a file's kind
_TRIED = 8  # short rows of a batch that are tokenised as well
_CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff"
_ODD, _STRAY = re.compile(f"[{_CONTROL}\ufffd]"), re.compile(f"[{_CONTROL}]")
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
}

Batch = list[tuple[int, Record]]  # with the line of each record


@dataclass(slots=True)
class Findings(BadRows):
    """The problems found: all are counted, and the first of each reason and file kept.

    Attributes:
        limit: how many are kept.
        kept: the problems, as the errors that training would give.
        dropped: per file, the lines that a mended copy leaves out.
    """

    limit: int = 20
    kept: list[DataError] = field(default_factory=list, init=False)
    by_file: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)
    dropped: dict[str, set[int]] = field(default_factory=dict, init=False)

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
            self.dropped.setdefault(path, set()).add(line or 0)
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


def prompt_of(record: Record) -> tuple[Message, ...]:
    """Return the messages before the last answer; a text has none."""
    if isinstance(record, forms.Text):
        return ()
    return record.messages[:-1] if isinstance(record, forms.Chat) else record.prompt


def texts_of(record: Record) -> list[str]:
    """Return the texts that a record is made of."""
    if isinstance(record, forms.Text):
        return [record.text]
    if isinstance(record, forms.Chat):
        return [message.content for message in record.messages]
    return [message.content for message in (*record.prompt, record.chosen, record.rejected)]


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
        self.special = special_texts(tokenizer) if tokenizer else SPECIAL_TOKENS
        self.exam = ExamIndex(exams) if exams else None
        self.near, self.similar = NearDuplicates() if near else None, near or 0.0
        self.hashes, self.lines = array("q"), array("q")  # of all good rows
        self.starts: list[tuple[int, Path]] = []  # the first good row of each file
        self.places: dict[int, str] = {}  # of validation rows and prompts, by hash
        self.copies: dict[Path, Path] = {}
        self.mended: dict[Path, set[int]] = {}
        for path in map(Path, validation):
            self._read_validation(path)
        self.compared = len(self.hashes)  # rows before this one belong to validation files

    def check(self, path: Path) -> None:
        """Check one file."""
        copy = self.scratch / f"{len(self.copies)}.jsonl"
        self.starts.append((len(self.hashes), path))
        self.copies[path] = copy = readable(path, copy, self.findings.handle)
        self.mended[path] = set()
        try:
            kind = self.kind or guess_kind(copy)
            encoder = None
            if self.tokenizer and kind != "text":  # of a text, every part is a target
                encoder = Encoder(kind, self.tokenizer, self.limits)
            records = self._records(path, kind)
            while batch := list(islice(records, _AT_A_TIME)):
                self._compare(path, batch)
                if encoder:
                    self._encode(encoder, path, batch)
            if encoder and encoder.cut:
                self._add("cut", f"{encoder.cut} rows are cut to {self.limits.max_length}", path)
        except DataError as error:
            self.findings.handle(error.at(path, error.line))

    def finish(self) -> None:
        """Find what is the same in rows of all the checked files."""
        hashes = np.array(self.hashes, np.int64)[self.compared :]
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        first = np.maximum.accumulate(np.where(np.append(False, same), 0, np.arange(len(order))))
        again = (order[1:][same] + self.compared).tolist()
        earlier = (order[first[1:][same]] + self.compared).tolist()
        for row, other in sorted(zip(again, earlier, strict=True)):
            self._add_pair("duplicate", "the row is the same as", row, other)
        known = set(again) if self.near else ()
        for row, other in self.near.pairs(self.similar) if self.near else ():
            if row >= self.compared and row not in known:
                reason = "near_validation" if other < self.compared else "near_duplicate"
                self._add_pair(reason, "the row is nearly", row, other)

    def write_fixed(self, path: Path, out: Path) -> int:
        """Write the good rows of a checked file as JSONL, mended; return how many.

        Raises:
            DataError: when the file cannot be read to its end, or no row is good.
        """
        dropped, written = self.findings.dropped.get(str(path), set()), 0
        with whole_file(out) as partial, partial.open("wb") as file:
            try:
                for line, row in _raw_rows(self.copies[path]):
                    if line not in dropped:
                        file.write(_line(row, line in self.mended[path]))
                        written += 1
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"cannot be mended: {error}", path=path) from error
            except DataError as error:
                raise error.at(path, error.line) from None
            if not written:
                raise DataError("no row is good, so nothing was written", path=path)
        return written

    def _records(self, path: Path, kind: Kind) -> Iterator[tuple[int, Record]]:
        for line, row in scan_rows(self.copies[path]):
            self.rows += 1
            try:
                record = parse_row(row, kind, self.special)
                text = "\n".join(texts_of(record))
                if _ODD.search(text):
                    record = parse_row(self._mend(row, text, path, line), kind, self.special)
            except DataError as error:
                self.findings.handle(error.at(path, line))
                continue
            self._keep(line, record)
            if self.places:
                self._look_up(record, path, line)
            yield line, record

    def _keep(self, line: int, record: Record) -> None:
        self.hashes.append(hash(record))
        self.lines.append(line)

    def _mend(self, row: object, text: str, path: Path, line: int) -> object:
        """Report odd characters, and return the row without those that can go."""
        if "\ufffd" in text:
            self._add("replacement_character", "holds U+FFFD, for lost text", path, line)
        if _STRAY.search(text):
            self.mended[path].add(line)
            self._add("control_character", "holds control characters", path, line)
        return _without_control(row)

    def _read_validation(self, path: Path) -> None:
        """Remember where the rows and prompts of a validation file are."""
        self.starts.append((len(self.hashes), path))
        bad, kind = BadRows("skip", 1.0), self.kind or guess_kind(path)
        batch = [(s.line, record) for record, s in forms.read_records([path], kind, bad)]
        for line, record in batch:
            self._keep(line, record)
            for part in filter(None, (record, prompt_of(record))):
                self.places.setdefault(hash(part), f"{path}:{line}")
        self._add_near(batch)

    def _look_up(self, record: Record, path: Path, line: int) -> None:
        if place := self.places.get(hash(record)):
            self._add("validation", f"the row is in the validation data, too: {place}", path, line)
        elif (prompt := prompt_of(record)) and (place := self.places.get(hash(prompt))):
            self._add("same_prompt", f"the validation data have this prompt: {place}", path, line)

    def _compare(self, path: Path, batch: Batch) -> None:
        self._add_near(batch)
        if self.exam:
            texts = [(line, text) for line, record in batch for text in texts_of(record)]
            leaked = self.exam.hits([text for _, text in texts]).items()
            for line, item in {texts[i][0]: item for i, item in leaked}.items():
                self._add("exam", f"holds a question of the exam {item}", path, line)

    def _add_near(self, batch: Batch) -> None:
        if self.near:
            numbers = range(len(self.hashes) - len(batch), len(self.hashes))
            self.near.add(["\n".join(texts_of(record)) for _, record in batch], numbers)

    def _encode(self, encoder: Encoder, path: Path, batch: Batch) -> None:
        """Find rows without targets among those that can be too long, and a few others.

        A byte is at least the text of one token, so most rows need not be tokenised.
        """
        assert encoder.codec is not None
        frame = len(encoder.codec.encode_prompt((Message("user", "a"),)))  # around each message
        some = []
        for number, (line, record) in enumerate(batch):
            texts = texts_of(record)
            longest = len("".join(texts).encode()) + frame * (len(texts) + 1)
            if number < _TRIED or longest > self.limits.max_length:
                some.append((record, Source(path, line)))
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
