"""Check data files: every problem with its place and what to do about it.

One pass over the rows, which training's own reader yields, finds what training would stop at, in
its words, and what would spoil it. Memory grows by about 25 bytes a row (300 more with near
duplicates), not with the rows' length.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from minigpt.data.chat import refused_texts
from minigpt.data.encodings import CONTROL_BYTES
from minigpt.data.formats import (
    DAMAGED,
    BadRows,
    BatchKind,
    Chat,
    Kind,
    Message,
    Prompt,
    Record,
    Source,
    Text,
    Unpaired,
    changes,
    guess_kind,
    kind_of,
    lines_of,
    load_prompts,
    open_data,
    parse_row,
    read_records,
    scan_rows,
    suffix_of,
    texts_of,
    to_line,
    unused_problem,
)
from minigpt.data.prompts import PromptCodec
from minigpt.data.store import Encoder, Limits
from minigpt.data.tables import DELIMITERS
from minigpt.data.tokenizer import SPECIAL_TOKENS
from minigpt.datatools.duplicates import ExamIndex, NearDuplicates
from minigpt.errors import DataError
from minigpt.files import atomic_file
from minigpt.reading import reason_of

# Training takes these rows as they are; all other findings are errors.
HINTS = {
    "bom",
    "control_character",
    "cut",
    "duplicate",
    "encoding",
    "near_duplicate",
    "near_validation",
    "one_label",
    "replacement_character",
    "same_prompt",
    "too_long",
    "unused_fields",
}
_MENDABLE = HINTS - {"duplicate"}  # their rows are in the mended copy
_BLOCK_ROWS = 300  # examined together; more of them would keep the garbage collector busy
_ALWAYS_TOKENISED = 8  # rows of a block that are tokenised even if they are short
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_CONTROL_BYTES = CONTROL_BYTES + b"\x7f"
_C1 = re.compile(b"\xc2[\x80-\x9f]")  # U+0080 to U+009F
_MAX_SEPARATE = 3  # equal problems of a file, each in a line of its own; more share one line
_MAX_NAMED = 5  # rows that such a line names
_NUMBER = re.compile(r"\d+")
_REMEDIES = {
    "control_character": "Training takes them; --fix writes a copy without them.",
    "replacement_character": "Text was lost when the file was converted: take it from its source.",
    "duplicate": "Leave it out; --fix does.",
    "near_duplicate": "Keep one of them.",
    "validation": "Remove it from one of the files; --fix leaves it out here.",
    "near_validation": "Remove one, or the validation loss will look better than it is.",
    "one_label": "KTO learns from both kinds: add some of the other.",
    "one_prompt": "KTO compares each completion with one of another prompt: add rows of others.",
    "same_prompt": "Remove one, unless the answers are meant to differ.",
    "exam": "Remove it, as --fix does: an exam must ask what training has not shown.",
    "too_long": "Training leaves it out. Raise --max_length, or shorten the row.",
    "cut": "Raise --max_length, or shorten the rows.",
    "unused_fields": "Nothing needs to be done where the text alone is to be learnt.",
}

Block = list[tuple[Record, Source]]
Records = list[tuple[int, Record]]  # good rows with their lines


@dataclass(slots=True)
class _Group:
    """Equal problems of a file: how many there are, and the first of them."""

    count: int = 0
    first: list[DataError] = field(default_factory=list)


@dataclass(slots=True)
class Findings(BadRows):
    """The problems of the files: all are counted, and the first of each reason and file listed.

    Attributes:
        limit: how many of each reason and file are listed; None for all.
        listed: the problems, as the errors that training would give.
        groups: equal problems, by file, reason and problem without its numbers.
        group_counts: how many groups there are, by file and reason.
        dropped: per file, the lines that a mended copy leaves out, some of them twice.
    """

    limit: int | None = 20
    listed: list[DataError] = field(default_factory=list, init=False)
    groups: dict[tuple[str, str, str], _Group] = field(default_factory=dict, init=False)
    group_counts: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)
    by_file: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)
    dropped: dict[str, array[int]] = field(default_factory=dict, init=False)

    def handle(self, error: DataError) -> None:
        """Count a problem, and list it if it is among the first."""
        path, reason = str(error.path), error.reason
        error.remedy = error.remedy or _REMEDIES.get(
            reason, "Correct it, or leave the row out with --fix."
        )
        error = error.at(path, error.line)
        self.counts[reason] += 1
        self.by_file[path, reason] += 1
        self.first.setdefault(reason, f"{path}:{error.line}")
        if reason not in _MENDABLE:
            self.drop(path, error.line)
        if self.limit is None or self.by_file[path, reason] <= self.limit:
            self.listed.append(error)
        self._group(error)

    def _group(self, error: DataError) -> None:
        path, reason = str(error.path), error.reason
        key = (path, reason, _NUMBER.sub("#", f"{error.field}: {error.problem}"))
        if key not in self.groups:
            if self.limit is not None and self.group_counts[path, reason] >= self.limit:
                return
            self.group_counts[path, reason] += 1
            self.groups[key] = _Group()
        group = self.groups[key]
        group.count += 1
        if self.limit is None or len(group.first) < _MAX_NAMED:
            group.first.append(error)

    def leave_out(self, error: DataError) -> None:
        """Count a row that is too long, and list it if it is among the first."""
        self.too_long += 1
        self.first_too_long = self.first_too_long or error
        self.handle(error)

    def drop(self, path: str, line: int | None) -> None:
        """Leave a row out of the mended copy."""
        self.dropped.setdefault(path, array("I")).append(line or 0)

    def check(self, total: int) -> None:
        """Go on, however many rows are bad."""

    def errors(self) -> int:
        """Return the number of problems that are not mere hints."""
        return sum(count for reason, count in self.counts.items() if reason not in HINTS)

    def files_with_errors(self) -> list[str]:
        """Return the files that have more than hints, in the order in which they were read."""
        return list(dict.fromkeys(path for path, reason in self.by_file if reason not in HINTS))

    def as_dict(self) -> dict[str, object]:
        """Return the counts and the listed problems as plain values."""
        names = ("path", "line", "field", "reason", "problem", "remedy")
        listed = [{name: getattr(error, name) for name in names} for error in self.listed]
        return {"errors": self.errors(), "counts": self.counts, "problems": listed}

    def lines(self) -> Iterator[str]:
        """Yield the problems by file and line, equal ones in one line, and the counts."""
        yield from self._problems()
        grouped: Counter[tuple[str, str]] = Counter()
        for (path, reason, _), group in self.groups.items():
            grouped[path, reason] += group.count
        for (path, reason), total in sorted(self.by_file.items()):
            if total > grouped[path, reason]:
                yield f"{path}: {total - grouped[path, reason]} more [{reason}]; --all shows them"
        for reason, total in self.counts.most_common():
            yield f"{total:>9,} {'hint ' if reason in HINTS else 'error'} {reason}"

    def _problems(self) -> Iterator[str]:
        problems: list[tuple[DataError, str]] = []
        for group in self.groups.values():
            if self.limit is None or group.count <= _MAX_SEPARATE:
                problems += [(error, "") for error in group.first]
            else:
                named = ", ".join(str(error.line) for error in group.first)
                more = ", ..." if group.count > len(group.first) else ""
                problems.append((group.first[0], f" {group.count:,} times: lines {named}{more}"))
        for error, times in sorted(problems, key=lambda p: (str(p[0].path), p[0].line or 0)):
            kind = "hint" if error.reason in HINTS else "error"
            yield f"{kind}: {error} [{error.reason}]{times}"


class Checker:
    """Checks files one after the other, then what they have in common.

    Args:
        findings: collects the problems.
        kind: the kind of all rows, or prompts; guessed from each file's first rows when None.
        validation: files that must not share rows with those checked.
        exams: exam files that must not leak.
        tokenizer: for its special tokens and for what the maximum length leaves to train on.
        max_length: tokens of a sample, as in training.
        near: similarity from which rows count as near duplicates, 0..1; None to not look.
        columns: the rows' keys that have other names here.
    """

    def __init__(
        self,
        findings: Findings,
        kind: BatchKind | None = None,
        validation: Sequence[str] = (),
        exams: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerFast | None = None,
        max_length: int = 512,
        near: float | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.findings = findings
        self.kind = kind
        self.columns = columns
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
        self.mended_lines: dict[Path, array[int]] = {}
        for path in map(Path, validation):
            self._read_validation(path)
        self.validation_rows = len(self.hashes)

    @property
    def rows(self) -> int:
        """Rows read so far, good and bad."""
        return self.findings.seen

    def check(self, path: Path) -> None:
        """Check one file."""
        self.file_starts.append((len(self.hashes), path))
        self.mended_lines[path] = array("I")
        errors = self.findings.errors()
        self.findings.too_long, self.findings.first_too_long = 0, None
        try:
            if self.kind == "prompt":
                self._check_prompts(path)
            else:
                self._check_rows(path, self.kind or guess_kind(path, self.columns))
        except DataError as error:
            # That no row is good says nothing new where the bad ones are named.
            if error.reason != "no_rows" or self.findings.errors() == errors:
                self.findings.handle(error.at(path, error.line))
        for reason, line, change in changes(self.findings.notes[path]):
            remedy = "Training reads the file like that; --fix writes a plain copy."
            self.findings.handle(
                DataError(change, path=path, line=line, remedy=remedy, reason=reason)
            )
        if self.findings.unused:
            self._report("unused_fields", unused_problem(self.findings.unused), path)
            self.findings.unused = set()

    def _check_rows(self, path: Path, kind: Kind) -> None:
        encoder = None
        if self.tokenizer:
            self.special_tokens = refused_texts(self.tokenizer, kind)
            if kind != "text":  # of a text, every part is a target
                encoder = Encoder(kind, self.tokenizer, self.limits)
        before = self.rows
        labels, prompts = set[bool](), set[int]()  # of unpaired rows; two of each are enough
        rows = read_records(
            [path], kind, self.findings, special_tokens=self.special_tokens, columns=self.columns
        )
        for block in _blocks(rows):
            records = list(self._examined(block, path))
            self._remember(records)
            self._add_near(records)
            self._find_leaks(path, records)
            unpaired = [record for _, record in records if isinstance(record, Unpaired)]
            labels.update(record.desirable for record in unpaired)
            prompts.update([hash(record.prompt) for record in unpaired if len(prompts) < 2])
            if encoder:
                self._find_without_targets(encoder, path, records)
        if encoder and encoder.cut:
            self._report("cut", f"{encoder.cut} rows are cut to {self.limits.max_length}", path)
        if len(labels) == 1:
            kind_of_all = "desirable" if labels.pop() else "undesirable"
            self._report("one_label", f"all completions are {kind_of_all}", path)
        if len(prompts) == 1:
            self._report("one_prompt", "all rows have one prompt", path)
        self.findings.check_too_long(self.rows - before)

    def _check_prompts(self, path: Path) -> None:
        """Check prompts to answer, of GRPO, as its DataModule reads them."""
        codec = PromptCodec(self.tokenizer) if self.tokenizer else None
        prompts = load_prompts(path, self.columns, self.findings)
        for prompt in prompts:
            line, key = prompt.source[1], _content_hash(prompt)
            self.hashes.append(key)
            self.lines.append(line)
            if source := self.validation.get(key):
                self._report(
                    "validation", f"the prompt is in the validation data: {source}", path, line
                )
            length = len(codec.encode(prompt.content)) if codec else 0
            if length >= self.limits.max_length:
                self._report("too_long", f"the prompt has {length} tokens", path, line)
        if self.exam:
            leaked = self.exam.hits([_text_of(prompt) for prompt in prompts])
            for number, item in leaked.items():
                line = prompts[number].source[1]
                self._report("exam", f"holds a question of the exam {item}", path, line)

    def finish(self) -> None:
        """Find what is the same in rows of all the checked files."""
        duplicates = set()
        for row, other in self._duplicates():
            self._report_pair("duplicate", "the row is the same as", row, other)
            if self.near:
                duplicates.add(row)
        for row, other in self.near.pairs(self.similarity) if self.near else ():
            if row >= self.validation_rows and row not in duplicates:
                validation = other < self.validation_rows
                reason = "near_validation" if validation else "near_duplicate"
                self._report_pair(reason, "the row is nearly", row, other)

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
            for line, row in _raw_rows(path, self.columns):
                if line not in dropped:
                    yield _line(row, line in mended)
        except (*DAMAGED, OSError) as error:
            raise DataError(f"cannot be mended: {reason_of(error)}", path=path) from error
        except DataError as error:
            raise error.at(path, error.line) from None

    def _duplicates(self) -> Iterator[tuple[int, int]]:
        """Yield each row that repeats an earlier one, by numbers: (row, the first of them)."""
        ordered = np.sort(np.asarray(self.hashes)[self.validation_rows :])
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        first = dict.fromkeys(repeated.tolist(), -1)  # -1 until that first one
        for row, value in enumerate(self.hashes):
            if row < self.validation_rows or value not in first:
                continue
            if first[value] < 0:
                first[value] = row
            else:
                yield row, first[value]

    def _examined(self, block: Block, path: Path) -> Iterator[tuple[int, Record]]:
        """Report odd characters and rows of the validation data; yield the records, mended."""
        texts = (text for record, _ in block for text in texts_of(record))
        is_odd = has_odd_characters("\n".join(texts))
        for record, source in block:
            mended = self._without_odd(record, path, source.line) if is_odd else record
            if self.validation:
                self._compare_with_validation(mended, path, source.line)
            yield source.line, mended

    def _remember(self, records: Records) -> None:
        self.lines.extend([line for line, _ in records])
        self.hashes.extend([hash(record) for _, record in records])

    def _without_odd(self, record: Record, path: Path, line: int) -> Record:
        """Report a record's odd characters, and return it without those that can go."""
        text = "\n".join(texts_of(record))
        if "\ufffd" in text:
            self._report("replacement_character", "holds U+FFFD, for lost text", path, line)
        if not _CONTROL.search(text):
            return record
        self._report("control_character", "holds control characters", path, line)
        row = _without_control(as_row(record))
        try:
            mended = parse_row(row, kind_of(row), self.special_tokens)
        except DataError:  # such as for a text of nothing else
            self.findings.drop(str(path), line)
            return record
        self.mended_lines[path].append(line)
        return mended

    def _read_validation(self, path: Path) -> None:
        """Remember where the rows and prompts of a validation file are."""
        self.file_starts.append((len(self.hashes), path))
        bad = BadRows("skip", 1.0)
        if self.kind == "prompt":
            for prompt in load_prompts(path, self.columns, bad):
                self.validation.setdefault(_content_hash(prompt), f"{path}:{prompt.source[1]}")
            return
        kind = self.kind or guess_kind(path, self.columns)
        rows = read_records([path], kind, bad, columns=self.columns)
        records = [(source.line, record) for record, source in rows]
        self._remember(records)
        for line, record in records:
            self.validation.setdefault(hash(record), f"{path}:{line}")
            if prompt_hash := _prompt_hash(record):
                self.validation.setdefault(prompt_hash, f"{path}:{line}")
        self._add_near(records)

    def _compare_with_validation(self, record: Record, path: Path, line: int) -> None:
        if source := self.validation.get(hash(record)):
            self._report(
                "validation", f"the row is in the validation data, too: {source}", path, line
            )
        elif source := self.validation.get(_prompt_hash(record)):
            self._report(
                "same_prompt", f"the validation data have this prompt: {source}", path, line
            )

    def _find_leaks(self, path: Path, records: Records) -> None:
        if self.exam:
            texts = [(line, text) for line, record in records for text in texts_of(record)]
            leaked = self.exam.hits([text for _, text in texts])
            for line, item in {texts[i][0]: item for i, item in leaked.items()}.items():
                self._report("exam", f"holds a question of the exam {item}", path, line)

    def _add_near(self, records: Records) -> None:
        if self.near:
            numbers = range(len(self.hashes) - len(records), len(self.hashes))
            self.near.add(["\n".join(texts_of(record)) for _, record in records], numbers)

    def _find_without_targets(self, encoder: Encoder, path: Path, records: Records) -> None:
        """Find rows without targets among those that can be too long, and a few others.

        A token stands for at least one byte, so most rows are short enough without being tokenised.
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

    def _report(self, reason: str, problem: str, path: Path, line: int | None = None) -> None:
        remedy = _REMEDIES[reason]
        self.findings.handle(DataError(problem, path=path, line=line, remedy=remedy, reason=reason))

    def _report_pair(self, reason: str, problem: str, row: int, other: int) -> None:
        path, line = self._at(row)
        other_path, other_line = self._at(other)
        self._report(reason, f"{problem} {other_path}:{other_line}", path, line)

    def _at(self, row: int) -> tuple[Path, int]:
        path = next(path for start, path in reversed(self.file_starts) if start <= row)
        return path, self.lines[row]


def _blocks(rows: Iterable[tuple[Record, Source]]) -> Iterator[Block]:
    """Yield all rows, some hundreds at a time, and raise what `rows` raises after the last."""
    block: Block = []
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
    """Return a hash, other than any row's, of the messages before the last answer; 0 for a text."""
    if isinstance(record, Text):
        return 0
    prompt = record.messages[:-1] if isinstance(record, Chat) else record.prompt
    return hash(("prompt", prompt))


def _text_of(prompt: Prompt) -> str:
    """Return the text that is continued, or that of all messages."""
    content = prompt.content
    texts = [content] if isinstance(content, str) else [message.content for message in content]
    return "\n".join(texts)


def _content_hash(prompt: Prompt) -> int:
    return hash(("content", prompt.content))


def as_row(record: Record) -> dict[str, object]:
    """Return a row that is read as this record."""
    if isinstance(record, Text):
        return {"text": record.text}
    if isinstance(record, Chat):
        return {"messages": [message._asdict() for message in record.messages]}
    row: dict[str, object] = {"prompt": [message._asdict() for message in record.prompt]}
    if isinstance(record, Unpaired):
        return row | {"completion": record.completion.content, "label": record.desirable}
    row |= {"chosen": record.chosen.content, "rejected": record.rejected.content}
    return row | ({"margin": record.margin} if record.margin else {})


def has_odd_characters(text: str) -> bool:
    """Tell quickly whether a text holds control characters, byte order marks or U+FFFD."""
    data = text.encode()
    if len(data.translate(None, _CONTROL_BYTES)) < len(data) or _C1.search(data):
        return True
    return any(character in text for character in "\ufffd\ufeff\ufffe\uffff")


def _without_control(value: object) -> object:
    if isinstance(value, str):
        return _CONTROL.sub("", value)
    if isinstance(value, list):
        return [_without_control(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_control(item) for key, item in value.items()}
    return value


def _raw_rows(path: Path, columns: Mapping[str, str] | None) -> Iterator[tuple[int, object]]:
    """Yield each row as the bytes of its line, or decoded where the file is no JSONL."""
    if not _is_jsonl(path):
        yield from scan_rows(path, columns=columns)
        return
    with open_data(path) as stream:
        yield from ((i, line) for i, line in enumerate(lines_of(stream), 1) if line.strip())


def _is_jsonl(path: Path) -> bool:
    if suffix_of(path) in (".txt", *DELIMITERS):
        return False
    try:
        with open_data(path) as stream:
            return not stream.peek().lstrip().startswith(b"[")
    except DataError:  # a file of columns, or one of which `scan_rows` says what it is
        return False


def _line(row: object, mend: bool) -> bytes:
    """Return a row as a line: its own bytes, unless it must be mended or has no line."""
    if mend or not isinstance(row, bytes):
        value = json.loads(row) if isinstance(row, bytes) else row
        row = to_line(_without_control(value) if mend else value)
    return row.rstrip(b"\r\n") + b"\n"
