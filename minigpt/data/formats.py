"""Rows of data files become records: typed, validated, and traced to file and line.

The one reader of rows, for training and for every tool. A file is JSONL, one JSON array, plain text
(.txt), CSV or TSV, as it is or compressed (gzip, xz, bzip2, zstd), or Parquet, Arrow or .xlsx.
Whatever a file or a row holds, the outcome is records or a `DataError`.

    read_records   files → records; bad rows stop the reading, or are counted
    parse_row      decoded row → record
    load_prompts   file → prompts to complete
    scan_rows      file → decoded rows
    open_data      file → lines in UTF-8
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import json
import lzma
import math
import os
import re
import shlex
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, cast

from minigpt.data.columnar import columnar_rows, reader_of
from minigpt.data.encodings import CONTROL_BYTES, Mender, Notes, is_binary
from minigpt.data.tables import (
    COLUMNAR,
    COMPRESSED,
    DELIMITERS,
    LARGEST_ROW,
    LOOKED_AT_BYTES,
    decompressed,
    not_utf8,
    refuse_foreign,
    table_rows,
    text_of_line,
    text_rows,
)
from minigpt.errors import ConfigError, DataError
from minigpt.reading import LARGEST_FILE
from minigpt.terminal import counted

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Kind = Literal["text", "chat", "preference", "unpaired"]
BatchKind = Literal[Kind, "prompt"]  # what batches hold: rows of a kind, or prompts to answer

ROLES = {role: role for role in ("system", "user", "assistant")}
ROLES |= {"human": "user", "gpt": "assistant"}
_TOOL_ROLES = ("tool", "function", "function_call", "observation")
# The key of the prompt and, where the messages do not hold it already, that of the answer.
_CHAT_KEYS = {"messages": "", "conversations": "", "instruction": "output", "prompt": "completion"}
QUESTIONS = {"question": "answer", "问": "答", "问题": "回答", "提问": "回复"}
_CHAT_KEYS |= QUESTIONS
# 'prompt' comes first: preference sets often carry the whole chosen chat as 'messages' as well.
_PROMPT_KEYS = ("prompt", "messages", "conversations", "instruction", *QUESTIONS)
_SYSTEM_KEYS = ("system", "system_prompt")
# The names of a kind's keys that an error suggests for others (`_renaming`).
_NAMES = {"text": ("text",), "chat": ("question", "answer"), "prompt": ("prompt",)}
_NAMES |= {"preference": ("prompt", "chosen", "rejected")}
_NAMES |= {"unpaired": ("prompt", "completion", "label")}
_ACCEPTED = {
    "text": "{text}",
    "chat": "{messages} or {conversations}, {instruction, input, output}, {prompt, completion}, "
    "{question, answer}, {问题, 回答}",
    "preference": "{chosen, rejected} as whole conversations, or as answers together with "
    "{prompt}, {messages}, {conversations} or {instruction, input}",
    "unpaired": "{prompt, completion, label}, {messages, completion, label}, and chats with a "
    "{label} or {kto_tag} for their last answer",
    "prompt": "{prompt}, {messages} or {conversations}, {instruction, input}",
}
_LOOKS_LIKE = {"chosen": "preference rows, for DPO", "kto_tag": "unpaired rows, for KTO"}
_LOOKS_LIKE |= {"text": "text rows, for pretraining", "label": "unpaired rows, for KTO"}
_LOOKS_LIKE |= dict.fromkeys((*_PROMPT_KEYS, "completion"), "chat rows, for SFT")
_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
# Fields that say more of a row or of a message than its text does.
_ROW_FIELDS = frozenset(("functions", "label", "tools", "weight"))
_MESSAGE_FIELDS = frozenset(("function_call", "reasoning_content", "tool_calls", "train", "weight"))
_UNUSED: dict[Kind, tuple[frozenset[str], frozenset[str]]] = {
    "text": (frozenset(), frozenset()),
    "chat": (_ROW_FIELDS, _MESSAGE_FIELDS - {"train", "weight"}),
    "preference": (_ROW_FIELDS, _MESSAGE_FIELDS),
    "unpaired": (_ROW_FIELDS - {"label"}, _MESSAGE_FIELDS),
}
_LABELS = ("label", "kto_tag")  # of a completion, as TRL and LLaMA-Factory name it
_TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
_EMPTY_VALUES: tuple[object, ...] = (None, "", [], {})
_REMEDIES = {
    "answer_role": "Give each answer as a string or as one assistant message.",
    "bad_compression": "Copy or compress it again.",
    "bad_json": "Each line must hold one JSON object (JSONL), or the whole file one JSON array.",
    "empty": "Fill it, or leave the row out.",
    "label": "It says whether the completion is desirable: true or false, or 1 or 0.",
    "margin": "Write by how much the chosen answer is to be ahead, such as 0.5, or leave it out.",
    "lone_surrogate": "Remove it: text that holds one cannot be written or tokenized.",
    "missing_file": "Check the name; relative paths start at the current directory.",
    "no_assistant": "Add the answer, or leave the row out.",
    "no_rows": "Give a file that holds some, such as one JSON object on each line.",
    "no_targets": "Leave the row out, or give an answer that is to be learnt weight 1.",
    "part_type": "Leave out rows with images, sound or calls: models here read text alone.",
    "prompt_end": "Leave out what follows the last user message.",
    "prompt_mismatch": "Without a prompt of its own, the row's is what its answers begin with.",
    "row_size": "Cut it into several rows, or give a file with one JSON object on each line.",
    "role_order": "One system message may come first; then user and assistant alternate.",
    "special_token": "Remove it: an answer must not be able to start or end a turn.",
    "too_many_too_long": "Raise max_length, shorten these rows, or raise max_too_long_share.",
    "too_many_bad_rows": "Mend or remove these rows, or allow a larger share of bad rows.",
    "tool_role": "Leave out conversations with tool calls.",
    "unknown_role": f"Known are {', '.join(ROLES)}.",
    "unreadable": "Name a file that can be read, or the files in a directory.",
    "weight": "An answer is learnt (weight 1, train true) or only read (weight 0, train false).",
    "wrong_type": "Write it as that, or leave the row out.",
}
LARGEST_MARGIN = 1e6  # of a preference
_CHECK_AFTER = 1000  # rows: the share of bad ones among fewer says little about a file
READABLE = (".jsonl", ".json", ".txt", ".csv", ".tsv", *COLUMNAR)
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)  # beside OSErrors without a number
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_BUFFER = 1 << 17  # bytes read at a time
_ENDS = (b'"', b" ", b",")
LARGEST_BLANK = 1 << 28  # bytes in a row without text, of which a few packed ones make hours
_PEEKED = 100  # rows that are looked at to guess a file's kind

_Row = Mapping[str, object]
_watchers: list[Callable[[int, int], None]] = []
_hashes: list[ReadHash] = []


class Message(NamedTuple):
    """One message of a conversation.

    Attributes:
        role: system, user or assistant.
        content: its text.
        train: whether an answer of a chat is trained on; else it is only read.
    """

    role: str
    content: str
    train: bool = True


class Text(NamedTuple):
    """One document to pretrain on."""

    text: str


class Chat(NamedTuple):
    """One conversation with at least one assistant turn to train on."""

    messages: tuple[Message, ...]


class Preference(NamedTuple):
    """A prompt that ends with a user message, a better answer and a worse one.

    Attributes:
        margin: by how much the better one's score is to be higher, for reward models.
    """

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    margin: float = 0.0


class Unpaired(NamedTuple):
    """A prompt that ends with a user message, and a completion that is desirable or not.

    Attributes:
        mismatched: a completion of another prompt, which KTO compares with; see `with_mismatched`.
    """

    prompt: tuple[Message, ...]
    completion: Message
    desirable: bool
    mismatched: Message | None = None


class Source(NamedTuple):
    """Where a record was read: the file and its 1-based line, or item of a JSON array."""

    path: Path
    line: int


@dataclass(frozen=True)
class Prompt:
    """A prompt with the row it came from.

    Attributes:
        content: plain text to continue, or the messages of a chat to answer.
        row: the whole row, returned with the completion.
        number: its position among the prompts of the file, from 0.
        source: the file and the line.
    """

    content: str | tuple[Message, ...]
    row: dict[str, Any]
    number: int
    source: tuple[str, int]


Record = Text | Chat | Preference | Unpaired
_Turn = tuple[str, Message]  # the field to name if its role is wrong, and a message


@dataclass(slots=True)
class BadRows:
    """What becomes of rows that cannot be used, and the counts of those left out.

    Args:
        policy: "error" stops at the first one; "skip" leaves them out and counts them.
        max_share: the share of skipped rows above which reading stops all the same.
        max_too_long_share: the share of rows above which reading stops that are left out because
            the maximum length leaves nothing to learn of them.

    Attributes:
        too_long: how many these are, under either policy.
        first_too_long: says which came first.
    """

    policy: Literal["error", "skip"] = "error"
    max_share: float = 0.05
    max_too_long_share: float = 0.05
    too_long: int = field(default=0, init=False)
    first_too_long: DataError | None = field(default=None, init=False)
    seen: int = field(default=0, init=False)  # rows, good and bad, of all reads with this object
    counts: Counter[str] = field(default_factory=Counter, init=False)
    first: dict[str, str] = field(default_factory=dict, init=False)
    unused: set[str] = field(default_factory=set, init=False)  # see `unused_fields`
    notes: defaultdict[Path, Notes] = field(default_factory=lambda: defaultdict(dict), init=False)

    def handle(self, error: DataError) -> None:
        """Count a bad row, or raise its error when the policy is "error".

        Raises:
            DataError: `error` itself.
        """
        if self.policy == "error":
            raise error
        self.counts[error.reason] += 1
        self.first.setdefault(error.reason, f"{error.path}:{error.line}")

    def check(self, total: int) -> None:
        """Refuse to go on when too large a share of `total` rows was skipped.

        Raises:
            DataError: the share is above `max_share`.
        """
        if self.counts.total() > self.max_share * total:
            problem = f"{self.summary()}; that is more than {self.max_share:.1%} of {total} rows"
            raise _error("too_many_bad_rows", None, problem)

    def leave_out(self, error: DataError) -> None:
        """Count a row of which the maximum length leaves nothing to learn.

        Raises:
            DataError: when these are too many of many rows.
        """
        self.too_long += 1
        self.first_too_long = self.first_too_long or error
        if self.seen >= _CHECK_AFTER:
            self.check_too_long(self.seen)

    def check_too_long(self, total: int) -> None:
        """Refuse to go on when too large a share of `total` rows was left out.

        Raises:
            DataError: the share is above `max_too_long_share`.
        """
        first = self.first_too_long
        if first is not None and self.too_long > self.max_too_long_share * total:
            share = f"{self.too_long} of {total} rows, more than {self.max_too_long_share:.1%}"
            raise _error("too_many_too_long", None, f"{first.problem}: {share}").at(
                str(first.path), first.line
            )

    def summary(self) -> str:
        """Return the counts by reason and where each came first, in one line; "" if all are 0."""
        common = self.counts.most_common()
        reasons = ", ".join(f"{count} {name} (first {self.first[name]})" for name, count in common)
        return f"skipped {self.counts.total()} bad rows: {reasons}" if common else ""


def read_records(
    paths: Sequence[str | Path],
    kind: Kind | None,
    bad: BadRows,
    limit: int | None = None,
    special_tokens: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> Iterator[tuple[Record, Source]]:
    """Stream the records of the files, one file after the other, at most `limit` in all.

    Args:
        paths: of files of any form.
        kind: the rows' kind; None reads each row as the kind that its fields tell.
        bad: decides what becomes of bad rows, and counts them.
        limit: the largest number of records.
        special_tokens: texts that documents and answers must not hold.
        columns: the rows' keys that have other names here, such as {"ask": "prompt"}.

    Raises:
        DataError: a file cannot be read or holds no rows, no row of all files can be used, or
            `bad` does not let a row pass.
    """
    good = 0
    rows = (
        (path, *item)
        for path in map(Path, paths)
        for item in scan_rows(path, bad.notes[path], columns)
    )
    for source, line, row in rows:
        if limit is not None and good >= limit:
            break
        bad.seen += 1
        row = renamed(row, columns)
        row_kind = kind or kind_of(row)
        try:
            record = parse_row(row, row_kind, special_tokens)
        except DataError as error:
            bad.handle(error.at(source, line))
            if bad.seen >= _CHECK_AFTER:
                bad.check(bad.seen)
        else:
            bad.unused |= unused_fields(row, row_kind)
            good += 1
            yield record, Source(source, line)
    bad.check(bad.seen)
    if not good and limit != 0:
        problem = f"no {kind or 'data'} row can be used; {bad.summary() or 'no files'}"
        raise _error("no_rows", None, problem)


def renamed(row: object, columns: Mapping[str, str] | None) -> object:
    """Return a decoded row with the names that its keys have here; a key that had one is left out.

    So `{"output": "text"}` learns the outputs of rows that have a text as well.
    """
    if not columns or not isinstance(row, dict):
        return row
    given = {columns[key] for key in row if key in columns}
    return {
        columns.get(key, key): value
        for key, value in row.items()
        if key in columns or key not in given
    }


def expand_files(names: Iterable[str]) -> list[str]:
    """Return the files that names, folders and patterns such as `texts/*.jsonl` stand for.

    A folder stands for the data files in it and below, in the order of their names.

    Raises:
        ConfigError: for a folder or pattern without data files.
    """
    files: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if suffix_of(file) in READABLE)
            matches = [str(file) for file in below if file.is_file()]
        elif glob.has_magic(name) and not path.exists():
            matches = sorted(glob.glob(name, recursive=True))
        else:
            matches = [name]
        if not matches:
            endings = ", ".join(READABLE)
            raise ConfigError(f"{name}: there is no data file ({endings}). Check the name.")
        files += matches
    return list(dict.fromkeys(files))


def parse_row(row: object, kind: Kind, special_tokens: Sequence[str] = ()) -> Record:
    """Turn a decoded JSON row into a record, whose text or answers hold no special token.

    What system and user say may hold them: it is encoded so that they stay text.

    Raises:
        DataError: the row does not fit; it names the field, and the caller adds file and line.
    """
    parser = _RowParser(special_tokens, kind)
    row = _object(row)
    if kind == "chat":
        return parser.chat(row)
    if kind == "preference":
        return parser.preference(row)
    if kind == "unpaired":
        return parser.unpaired(row)
    if "text" not in row:
        raise _missing(row, kind)
    return Text(parser.text(row["text"], "text", "assistant"))


def parse_prompt(row: object) -> tuple[Message, ...] | str:
    """Turn a decoded JSON row into messages to answer, or a string to complete.

    A string comes from ``{"prompt": str}`` alone; next to a ``"system"`` (or ``"system_prompt"``)
    it is a user message.

    Raises:
        DataError: the row does not fit; it names the field, and the caller adds file and line.
    """
    parser = _RowParser()
    row = _object(row)
    if isinstance(row.get("prompt"), str) and _system_key(row) is None:
        return parser.text(row["prompt"], "prompt", "user")
    key = _prompt_key(row)
    if key is None:
        raise _missing(row, "prompt")
    return _messages(parser.opening(row, key), prompt=True)


def load_prompts(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    bad: BadRows | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read a file of prompts, whose keys have other names here by `columns`.

    Args:
        path: a file of any form.
        columns: the rows' keys that have other names here.
        bad: decides what becomes of bad rows, and counts them; by default the first one stops.
        limit: the largest number of prompts.

    Raises:
        DataError: for a missing file or a row without a prompt.
    """
    bad = bad or BadRows()
    prompts: list[Prompt] = []
    for line, row in islice(scan_rows(Path(path), bad.notes[Path(path)], columns), limit):
        bad.seen += 1
        try:
            content = parse_prompt(renamed(row, columns))
        except DataError as error:
            bad.handle(error.at(path, line))
        else:
            assert isinstance(row, dict)
            prompts.append(Prompt(content, row, len(prompts), (str(path), line)))
    bad.check(bad.seen)
    return prompts


def to_line(row: object) -> bytes:
    """Return a row as a line of JSONL, in which a lone surrogate stays an escape.

    What JSON cannot hold, such as a table's dates, is written as text.
    """
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text.encode(errors="backslashreplace") + b"\n"


def completed(row: Mapping[str, object], completion: str) -> bytes:
    """Return a prompt's row as a line, with its completion; that alone if JSON cannot hold the row.

    Rows can be read that are nested too deeply to be written.
    """
    try:
        return to_line({**row, "completion": completion})
    except (ValueError, RecursionError):
        return to_line({"completion": completion})


def kind_of(row: object) -> Kind:
    """Tell a decoded row's kind by its fields; "chat" is the default."""
    if not isinstance(row, dict):
        return "chat"
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return "preference"
    is_labelled = row.get("completion") is not None and _truth(row.get("label")) is not None
    if row.get("kto_tag") is not None or is_labelled:
        return "unpaired"
    return "text" if "text" in row and "messages" not in row else "chat"


def guess_kind(path: Path, columns: Mapping[str, str] | None = None) -> Kind:
    """Tell a file's kind by its first object; "chat" is the default."""
    rows = (renamed(row, columns) for _, row in islice(scan_rows(path, columns=columns), _PEEKED))
    return kind_of(next((row for row in rows if isinstance(row, dict)), None))


def texts_of(record: Record) -> tuple[str, ...]:
    """Return the text of a document, or of each message of another record."""
    if isinstance(record, Text):
        return (record.text,)
    return tuple([message.content for message in messages_of(record)])


def messages_of(record: Chat | Preference | Unpaired) -> tuple[Message, ...]:
    """Return the messages of a chat, or a prompt and then the row's answers to it."""
    if isinstance(record, Chat):
        return record.messages
    if isinstance(record, Unpaired):
        return (*record.prompt, record.completion)
    return (*record.prompt, record.chosen, record.rejected)


def unused_fields(row: object, kind: Kind) -> set[str]:
    """Return the fields of a good row that carry meaning, but are not used in training."""
    of_rows, of_messages = _UNUSED[kind]
    if not isinstance(row, dict) or not of_messages:
        return set()
    named = {name for name in of_rows & row.keys() if row[name] not in _EMPTY_VALUES}
    for value in row.values():
        if isinstance(value, str):
            continue
        for message in value if isinstance(value, list) else (value,):
            if isinstance(message, dict) and len(message) > 2:  # more than role and content
                fields = of_messages & message.keys()
                named.update(name for name in fields if message[name] not in _EMPTY_VALUES)
                if ROLES.get(str(message.get("role", message.get("from")))) != "assistant":
                    named.update(name for name in ("weight", "train") if message.get(name))
    return named


def unused_problem(fields: Iterable[str]) -> str:
    """Return what is said of a file with fields that are not used."""
    return f"its rows have {', '.join(sorted(fields))}, of which training makes no use"


def changes(notes: Notes) -> Iterator[tuple[str, int, str]]:
    """Yield what was changed: the reason, the first line, and the whole in words."""
    for (reason, change), (lines, first) in notes.items():
        where = f": {counted(lines, 'line')}, from line {first:,} on"
        yield reason, first, change + (where if lines else "")


class _RowParser:
    """Reads rows; every string that gets into a record passes through `fault`."""

    def __init__(self, special_tokens: Sequence[str] = (), kind: Kind | None = None) -> None:
        self.special_tokens = special_tokens
        self.kind = kind

    def chat(self, row: _Row) -> Chat:
        for key, answer in _CHAT_KEYS.items():
            if row.get(key) is not None and (not answer or row.get(answer) is not None):
                break
        else:
            raise _missing(row, self.kind or "chat")
        turns = self.opening(row, key)
        if answer:
            _messages(turns, prompt=True)
            turns += self.turns(row[answer], answer, "assistant")
        elif turns[-1][1].role == "user" and "chosen" in row:
            raise _missing(row, "chat")  # the answers are outside the messages
        messages = _messages(turns, prompt=False)
        for message in messages:
            if message.role == "assistant" and message.train:
                return Chat(messages)
        raise _error("no_targets", answer or key, "no answer is to be learnt")

    def preference(self, row: _Row) -> Preference:
        if row.get("chosen") is None or row.get("rejected") is None:
            raise _missing(row, "preference")
        chosen = self.turns(row["chosen"], "chosen", "assistant")
        rejected = self.turns(row["rejected"], "rejected", "assistant")
        key = _prompt_key(row)
        if key is None and len(chosen) == 1:
            raise _missing(row, "preference")
        opening = self.opening(row, key)
        prompt = _messages(opening if key else opening + chosen[:-1], prompt=True)
        better = _answer(chosen, prompt)
        worse = _answer(rejected, prompt)
        if better == worse:
            raise _error("same_answers", "rejected", "the answer equals 'chosen'")
        return Preference(prompt, better, worse, _margin(row.get("margin")))

    def unpaired(self, row: _Row) -> Unpaired:
        desirable = _label(row)
        key = _prompt_key(row)
        if key is None or row.get("completion") is None:
            *before, completion = self.chat(row).messages
            if completion.role != "assistant":
                raise _error("no_assistant", key, "the last message must be the completion")
            return Unpaired(tuple(before), completion, desirable)
        prompt = _messages(self.opening(row, key), prompt=True)
        completion = _answer(self.turns(row["completion"], "completion", "assistant"), prompt)
        return Unpaired(prompt, completion, desirable)

    def opening(self, row: _Row, key: str | None) -> list[_Turn]:
        """Read the row's own system message, if it has one, and what is under `key`."""
        turns: list[_Turn] = []
        if system_key := _system_key(row):
            system = self.text(row[system_key], system_key, "system")
            if system.strip():
                turns.append(("system", Message("system", system)))
        if key == "instruction":
            return turns + self.alpaca(row)
        role = "user" if key == "prompt" or key in QUESTIONS else ""
        return turns + self.turns(row[key], key, role) if key else turns

    def alpaca(self, row: _Row) -> list[_Turn]:
        history = row.get("history") or []
        if not isinstance(history, list):
            raise _wrong_type(history, "a list", "history")
        turns = []
        for i, pair in enumerate(history):
            if not isinstance(pair, list) or len(pair) != 2:
                raise _wrong_type(pair, "a list of a question and an answer", f"history[{i}]")
            turns += self.turns(pair[0], f"history[{i}][0]", "user")
            turns += self.turns(pair[1], f"history[{i}][1]", "assistant")
        texts = [self.text(row.get(k) or "", k, "system") for k in ("instruction", "input")]
        content = "\n".join(text for text in texts if text.strip())
        return turns + self.turns(content, "instruction", "user")

    def turns(self, value: object, field: str, role: str) -> list[_Turn]:
        """Read messages, a single one, or a plain string if that has a `role`."""
        if role and isinstance(value, str):
            return [(field, Message(role, self.text(value, field, role)))]
        if isinstance(value, dict):
            return [self.message(value, field)]
        if not isinstance(value, list):
            raise _wrong_type(value, "a string or a list" if role else "a list of messages", field)
        turns = [self.message(item, f"{field}[{i}]") for i, item in enumerate(value)]
        if turns and not turns[0][1].content.strip():
            del turns[0]  # an empty system message, as exports write where there is none
        if not turns:
            raise _error("no_messages", field, "holds no messages")
        return turns

    def message(self, value: object, field: str) -> _Turn:
        if not isinstance(value, dict):
            raise _wrong_type(value, "a message object", field)
        role_key = "role" if "role" in value else "from"
        content_key = "content" if "content" in value else "value"
        if role_key not in value or content_key not in value:
            problem = (
                f"a message needs {{role, content}} or {{from, value}}; it has {list(value)!r:.99}"
            )
            raise _error("missing_key", field, problem)
        role = value[role_key]
        role = ROLES.get(role) if isinstance(role, str) else None
        if role is None:
            raise _bad_role(value[role_key], f"{field}.{role_key}")
        content = value[content_key]
        if isinstance(content, list):
            content = _joined_parts(content, f"{field}.{content_key}")
        text = self.text(content, f"{field}.{content_key}", role)
        if len(value) == 2 or role != "assistant" or self.kind != "chat":
            return f"{field}.{role_key}", Message(role, text)
        return f"{field}.{role_key}", Message(role, text, _is_trained(value, field))

    def text(self, value: object, field: str, role: str) -> str:
        """Return a text that a role says, or raise a DataError that says what is wrong with it."""
        if fault := self.fault(value, role):
            reason, problem = fault
            raise _error(reason, field, problem)
        return cast(str, value)

    def fault(self, value: object, role: str) -> tuple[str, str] | None:
        """Return what is wrong with a text that a role says: the reason and the problem."""
        if not isinstance(value, str):
            return "wrong_type", _type_problem(value, "a string")
        if role != "system" and (not value or value.isspace()):
            return "empty", "is empty"
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                problem = f"character {error.start + 1} is a lone surrogate, half of a character"
                return "lone_surrogate", problem
        if role == "assistant":  # what the model is trained to say
            for token in self.special_tokens:
                if token and token in value:
                    return "special_token", f"holds the special token {token!r}"
        return None


def _error(reason: str, field: str | None, problem: str, remedy: str | None = None) -> DataError:
    remedy = remedy or _REMEDIES.get(reason)
    return DataError(problem, field=field, remedy=remedy, reason=reason)


def _wrong_type(value: object, expected: str, field: str | None) -> DataError:
    return _error("wrong_type", field, _type_problem(value, expected))


def _type_problem(value: object, expected: str) -> str:
    number = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return f"must be {expected}, not {_TYPES.get(type(value), number)}"


def _bad_role(value: object, field: str) -> DataError:
    if not isinstance(value, str):
        return _wrong_type(value, "a string", field)
    reason = "tool_role" if value in _TOOL_ROLES else "unknown_role"
    return _error(reason, field, f"role {value!r:.40} is not supported")


def _joined_parts(content: list[object], field: str) -> str:
    """Return what a message says where it comes as a list of parts, all of them text."""
    texts: list[str] = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise _wrong_type(part, "a part with a type", f"{field}[{i}]")
        if part.get("type") != "text":
            problem = f"parts of type {part.get('type')!r:.40} are not supported"
            raise _error("part_type", f"{field}[{i}].type", problem)
        if not isinstance(part.get("text"), str):
            raise _wrong_type(part.get("text"), "a string", f"{field}[{i}].text")
        texts.append(part["text"])
    return "".join(texts)


def _is_trained(message: _Row, field: str) -> bool:
    """Whether an answer is to be learnt: null stands for no field, as in columns of tables."""
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _error("weight", f"{field}.weight", f"must be 0 or 1, not {weight!r:.40}")
    if train is not None and not isinstance(train, bool):
        raise _error("weight", f"{field}.train", f"must be true or false, not {train!r:.40}")
    return weight != 0 and train is not False


def _margin(value: object) -> float:
    """Return the margin of a preference; null stands for no field, as in columns of tables."""
    if value is None or value == "":
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong_type(value, "a number", "margin")
    try:
        margin = float(value)  # tables of text hold numbers as strings
    except (ValueError, OverflowError):
        margin = math.nan
    if not abs(margin) <= LARGEST_MARGIN:
        problem = f"must be a number of at most {LARGEST_MARGIN:g}, not {value!r:.40}"
        raise _error("margin", "margin", problem)
    return margin


def _truth(value: object) -> bool | None:
    """Return what a label says, as files and tables write it; None where it is none."""
    return _TRUTHS.get(str(value).strip().lower())


def _label(row: _Row) -> bool:
    """Return whether a row's completion is desirable."""
    field = next((name for name in _LABELS if row.get(name) is not None), None)
    if field is None and (_prompt_key(row) is None or "chosen" in row):
        raise _missing(row, "unpaired")
    if field is None:
        raise _error("label", "label", "the row has none")
    desirable = _truth(row[field])
    if desirable is None:
        raise _error("label", field, f"must be true or false, not {row[field]!r:.40}")
    return desirable


def _object(row: object) -> _Row:
    if isinstance(row, DataError):  # what `scan_rows` yields for a line that is not JSON
        raise row
    if not isinstance(row, dict):
        raise _wrong_type(row, "a JSON object", None)
    return row


def _prompt_key(row: _Row) -> str | None:
    return next((key for key in _PROMPT_KEYS if row.get(key) is not None), None)


def _system_key(row: _Row) -> str | None:
    return next((key for key in _SYSTEM_KEYS if row.get(key)), None)


def _missing(row: _Row, kind: str) -> DataError:
    likely = next((rows for key, rows in _LOOKS_LIKE.items() if key in row), kind)
    hint = "" if likely.startswith(kind) else f"This looks like {likely}. "
    remedy = f"{hint}Accepted are {_ACCEPTED[kind]}. {_renaming(row, kind)}"
    article = "an" if kind == "unpaired" else "a"
    problem = f"not {article} {kind} row: its keys are {list(row)!r:.200}"
    return _error("missing_key", None, problem, remedy)


def _renaming(row: _Row, kind: str) -> str:
    """Return the options by which the keys of a row get the names of its kind, as far as guessed.

    Keys without a meaning here take the names that are missing, in their order.
    """
    key = _prompt_key(row)
    names = (key, _CHAT_KEYS[key] or key) if key and kind == "chat" else _NAMES[kind]
    missing = [name for name in names if name not in row]
    if key and "prompt" in missing:
        missing.remove("prompt")
    used = {*_PROMPT_KEYS, *_CHAT_KEYS.values(), *_SYSTEM_KEYS, *_NAMES[kind], *_ROW_FIELDS, "id"}
    others = [
        name
        for name in row
        if name not in used and "=" not in name and len(name) < 40 and name.isprintable()
    ]
    if not missing or len(others) < len(missing):
        return "Keys with other names: see columns."
    pairs = list(zip(others, missing, strict=False))
    options = " ".join(shlex.quote(f"{old}={new}") for old, new in pairs)
    plain = [old if re.fullmatch(r"[^\W\d]\w*", old) else json.dumps(old) for old, _ in pairs]
    listed = ", ".join(f"{old}: {new}" for old, (_, new) in zip(plain, pairs, strict=True))
    return (
        f"Keys with other names: --columns {options} in data verbs, "
        f"--data.init_args.columns {shlex.quote(f'{{{listed}}}')} in training, if these are meant."
    )


def _messages(turns: Sequence[_Turn], *, prompt: bool) -> tuple[Message, ...]:
    """Check the order of the roles and, of a prompt, that the user has the last word."""
    body = turns[1:] if turns and turns[0][1].role == "system" else turns
    for (role_field, message), expected in zip(body, cycle(("user", "assistant")), strict=False):
        if message.role != expected:
            problem = f"the role is {message.role!r} where {expected!r} must come"
            raise _error("role_order", role_field, problem)
    field = turns[-1][0]
    if not body:
        raise _error("no_messages", field, "there are no messages but the system's")
    if prompt and body[-1][1].role != "user":
        raise _error("prompt_end", field, "a prompt must end with a user message")
    if not prompt and len(body) == 1:
        raise _error("no_assistant", field, "there is no assistant message to learn from")
    return tuple(message for _, message in turns)


def _answer(turns: Sequence[_Turn], prompt: tuple[Message, ...]) -> Message:
    *before, answer = (message for _, message in turns)
    without_system = prompt[1:] if prompt[0].role == "system" else prompt
    if before and tuple(before) not in (prompt, without_system):
        problem = "must be one answer, alone or after exactly the messages of the prompt"
        raise _error("prompt_mismatch", turns[0][0].partition("[")[0], problem)
    if answer.role != "assistant":
        raise _error("answer_role", turns[-1][0], "the answer must be an assistant message")
    return answer


def iter_rows(
    path: str | Path, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[int, object]]:
    """Stream the decoded rows of a file with their 1-based line, or item of a JSON array.

    Args:
        path: of the file.
        columns: see `scan_rows`.

    Raises:
        DataError: the file or a line of it cannot be read, or it holds no rows.
    """
    for line, row in scan_rows(Path(path), columns=columns):
        if isinstance(row, DataError):
            raise row.at(path, line)
        yield line, row


def scan_rows(
    path: Path, notes: Notes | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[int, object]]:
    """Stream rows; a line that is not JSON comes as its error, so that others may follow.

    Args:
        path: of the file.
        notes: gets what was changed in its text so that it could be read.
        columns: the names that keys get later (`renamed`), which say which cells of a table hold
            JSON.

    Raises:
        DataError: the file cannot be read, or it holds no rows.
    """
    with _data_errors(path), _opened(path) as stream:
        rows = _rows_of(path, stream, {} if notes is None else notes, columns or {})
        first = next(rows, None)
        if first is None:
            raise _error("no_rows", None, "the file holds no rows")
        yield first
        yield from rows


def whole_text(path: Path) -> str:
    """Return the text of a plain text file in any of the encodings that rows may have.

    Raises:
        DataError: when it cannot be read, or has more than `LARGEST_FILE` bytes.
    """
    lines: list[str] = []
    size = 0
    with _data_errors(path), open_data(path) as stream:
        for number, line in enumerate(lines_of(stream), 1):
            size += len(line)
            if size > LARGEST_FILE:  # compressed files may be small and unpack to any size
                problem = f"the text has more than {LARGEST_FILE:,} bytes"
                raise _error("row_size", None, problem, "Cut it into several files.")
            lines.append(text_of_line(line, number))
    return "".join(lines)


@contextmanager
def _data_errors(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into a DataError that names it."""
    try:
        yield
    except DataError as error:
        raise error.at(path, error.line) from None
    except (*DAMAGED, OSError) as error:
        if not isinstance(error, OSError) or error.errno is None:
            problem = f"cut off or damaged compressed data: {error}"
            raise _error("bad_compression", None, problem).at(path) from None
        reason = "missing_file" if isinstance(error, FileNotFoundError) else "unreadable"
        raise _error(reason, None, f"cannot be read: {error.strerror}").at(path) from None


@contextmanager
def watch_reads(report: Callable[[int, int], None]) -> Iterator[None]:
    """Report, while inside, how many bytes of a data file have been read, and its size."""
    _watchers.append(report)
    try:
        yield
    finally:
        _watchers.pop()


class ReadHash:
    """The SHA-256 of what is read from a data file, byte by byte from its beginning.

    Attributes:
        bytes_read: how many bytes that are.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._sha256 = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Add what follows."""
        self.bytes_read += len(data)
        self._sha256.update(data)

    def with_rest_of(self, path: Path) -> str:
        """Return the digest, in hexadecimal, of what was read and of what follows it in a file."""
        with path.open("rb") as file:
            file.seek(self.bytes_read)
            while data := file.read(_BUFFER):
                self.update(data)
        return self._sha256.hexdigest()


@contextmanager
def hash_reads() -> Iterator[ReadHash]:
    """Hash, while inside, what is read from the one data file that is opened there."""
    read_hash = ReadHash()
    _hashes.append(read_hash)
    try:
        yield read_hash
    finally:
        _hashes.remove(read_hash)


class _WatchedFile(io.FileIO):
    """A file that reports each read to the last of `_watchers`, and its bytes to `_hashes`."""

    bytes_read = 0  # counted here, because a pipe has no position

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        count = super().readinto(buffer)
        self._note(memoryview(buffer)[: count or 0])
        return count

    def readall(self) -> bytes:
        data = super().readall()
        self._note(data)
        return data

    def _note(self, data: bytes | memoryview) -> None:
        self.bytes_read += len(data)
        for read_hash in _hashes:
            read_hash.update(data)
        if _watchers:
            _watchers[-1](self.bytes_read, os.fstat(self.fileno()).st_size)


def _rows_of(
    path: Path, stream: io.BufferedReader, notes: Notes, columns: Mapping[str, str]
) -> Iterator[tuple[int, object]]:
    beginning = stream.peek(LOOKED_AT_BYTES)[:LOOKED_AT_BYTES]
    if not begins_as_json(stream):
        is_plain = isinstance(stream.raw, _WatchedFile)
        if is_plain and (read := reader_of(path, beginning, columns)):
            return columnar_rows(path, read)
        refuse_foreign(path, beginning)
    text = io.BufferedReader(_Utf8(notes, _blocks(stream)), _BUFFER)
    suffix = suffix_of(path)
    if suffix == ".txt":
        return text_rows(path, lines_of(text))
    if suffix in DELIMITERS:
        return table_rows(lines_of(text), DELIMITERS[suffix], columns)
    if suffix not in READABLE and text.peek().lstrip()[:1] not in (b"{", b"[", b""):
        raise _no_rows_by_name(beginning)
    return _rows(text)


def _no_rows_by_name(beginning: bytes) -> DataError:
    """Return the error for a file that is no JSON, and whose name does not say what it is."""
    if is_binary(beginning):
        remedy = "Give the text in it as JSONL, CSV or plain text."
        return _error("foreign", None, "the file is binary, of a kind that is not read", remedy)
    problem = "the file is plain text, by a name that does not say so"
    return _error("foreign", None, problem, "Rename it to .txt, or give its rows as JSONL.")


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file, which is decompressed by what it begins with."""
    raw: io.BufferedReader = io.BufferedReader(_WatchedFile(path), _BUFFER)
    with raw:
        if begins_as_json(raw):
            yield raw
        else:
            with decompressed(raw) as stream:
                yield stream


@contextmanager
def open_data(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file, which is decompressed by what it begins with, as lines in UTF-8.

    Raises:
        DataError: when the file holds no text, or the package that decompresses it is missing.
    """
    with _opened(path) as stream:
        if not begins_as_json(stream):
            refuse_foreign(path, stream.peek(LOOKED_AT_BYTES)[:LOOKED_AT_BYTES])
        yield io.BufferedReader(_Utf8({}, _blocks(stream)), _BUFFER)


class _Utf8(io.RawIOBase):
    """The bytes of a file as UTF-8, without what no row can hold (`minigpt.data.encodings`).

    Args:
        notes: gets what was changed.
        blocks: of the file.
    """

    def __init__(self, notes: Notes, blocks: Iterator[bytes]) -> None:
        self._notes = notes
        self._mender: Mender | None = None  # of a file that is not plain UTF-8
        self._blocks = blocks
        self._data = memoryview(b"")  # is to be read next
        self._blank = 0  # bytes read since the last that a row could hold
        self._line = 1
        self._begins_line = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._data:
            block = next(self._blocks, b"")
            if not block:
                return 0
            data = self._mended(block)
            is_blank = not data or data.isspace()
            self._blank = self._blank + len(block) if is_blank else 0
            if self._blank > LARGEST_BLANK:
                problem = f"{LARGEST_BLANK:,} bytes and more hold no row"
                raise DataError(problem, line=self._line, remedy=_REMEDIES["no_rows"])
            self._line += data.count(b"\n")
            self._begins_line = data.endswith(b"\n") if data else self._begins_line
            self._data = memoryview(data)
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._data))
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def _mended(self, block: bytes) -> bytes:
        is_needed = self._mender is not None and self._mender.is_needed
        if not is_needed and _is_plain(block):
            return block
        self._mender = self._mender or Mender(self._notes)
        return self._mender.mend(block, self._line, self._begins_line)


def _blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield a stream's bytes in blocks that end with a whole line or at least a whole character.

    No character of UTF-8 or GB18030 ends with one of `_ENDS` but these themselves.
    """
    parts: list[bytes] = []
    size = 0
    while data := stream.read(_BUFFER):
        end = data.rfind(b"\n") + 1 or max(map(data.rfind, _ENDS)) + 1
        size += len(data)
        if not end and size <= LARGEST_ROW:
            parts.append(data)
            continue
        end = end or len(data)
        yield b"".join([*parts, data[:end]])
        parts = [data[end:]]
        size = len(parts[0])
    yield b"".join(parts)


def _is_plain(block: bytes) -> bool:
    """Whether a block is UTF-8 without what `Mender` leaves out."""
    if len(block.translate(None, CONTROL_BYTES)) < len(block) or codecs.BOM_UTF8 in block:
        return False
    try:
        return block.isascii() or bool(block.decode())
    except UnicodeDecodeError:
        return False


def begins_as_json(stream: io.BufferedReader) -> bool:
    """Whether a file is JSON by its first bytes; of other kinds, RTF alone begins with a brace."""
    beginning = stream.peek(2)[:2]
    return beginning.startswith((b"{", b"[")) and beginning != b"{\\"


def suffix_of(path: PurePath) -> str:
    """Return a file's ending in lower case, without that of its compression."""
    endings = [suffix.lower() for suffix in path.suffixes]
    while endings and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings else ""


def lines_of(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream of bytes, in bounded memory.

    Raises:
        DataError: for a line of more than `LARGEST_ROW` bytes.
    """
    for line, data in enumerate(iter(partial(stream.readline, LARGEST_ROW + 1), b""), 1):
        if len(data) > LARGEST_ROW:
            raise _too_large(line)
        yield data


def _too_large(line: int) -> DataError:
    problem = f"the row has more than {LARGEST_ROW:,} bytes"
    return DataError(problem, line=line, remedy=_REMEDIES["row_size"], reason="row_size")


def _rows(stream: IO[bytes]) -> Iterator[tuple[int, object]]:
    rows = 0
    for line in count(1):
        data = stream.readline(_BUFFER)
        if not data:
            break
        if not rows and data.lstrip().startswith(b"["):
            yield from enumerate(_Array(stream, data, line).items(), 1)
            return
        if not data.endswith(b"\n"):
            data += stream.readline(LARGEST_ROW)
        if len(data) > LARGEST_ROW:
            raise _too_large(line)
        if data.strip():
            rows += 1
            yield line, _decode(data, line)


class _Array:
    """A JSON array whose items are decoded one after the other, in bounded memory.

    Args:
        stream: of bytes, of which `data` has been read.
        data: the file's beginning, from the array's bracket on.
        line: its number in the file.
    """

    def __init__(self, stream: IO[bytes], data: bytes, line: int) -> None:
        self.stream = stream
        self.data = data  # to be decoded next
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.line = line  # of the buffer's first character
        self.column = 0  # characters of that line that are no longer in the buffer
        self.buffer = ""
        self.position = 0
        self.ended = False

    def items(self) -> Iterator[object]:
        """Yield the items.

        Raises:
            DataError: where the file is not one JSON array.
        """
        self._take("[", "Expecting value")
        if self._next() != "]":
            yield self._item()
            while self._next() != "]":
                self._take(",", "Expecting ',' delimiter")
                self._next()
                yield self._item()
        self.position += 1
        if self._next():
            raise self._invalid("Extra data", self.position)

    def _next(self) -> str:
        """Return the next character that is no white space, "" at the end."""
        while True:
            space = _SPACE.match(self.buffer, self.position)
            self.position = space.end() if space else self.position
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self._read():
                return ""

    def _take(self, character: str, problem: str) -> None:
        """Pass over a character; raise a DataError with the problem where another one comes."""
        if self._next() != character:
            raise self._invalid(problem, self.position)
        self.position += 1

    def _item(self) -> object:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.position)
            except (json.JSONDecodeError, RecursionError, ValueError) as error:
                if not isinstance(error, json.JSONDecodeError):
                    raise _bad_json(_limit_problem(error), self._line(self.position)) from None
                if self.ended:
                    raise self._invalid(error.msg, error.pos) from None
            else:
                if end + len("e+5") <= len(self.buffer) or self.ended:  # a number may go on
                    self.position = end
                    return cast(object, value)
            # Twice as much each time, or what is long would be decoded again and again.
            self._read(max(_BUFFER, len(self.buffer) - self.position))

    def _read(self, size: int = _BUFFER) -> bool:
        """Drop what was decoded from the buffer and add a block; return False at the file's end.

        Raises:
            DataError: when an item is too large, or the file is not UTF-8.
        """
        if len(self.buffer) - self.position > LARGEST_ROW:
            raise _too_large(self._line(self.position))
        data = self.data or self.stream.read(size)
        self.data = b""
        self.column = self._column(self.position) - 1
        self.line = self._line(self.position)
        self.buffer = self.buffer[self.position :]
        self.position = 0
        try:
            self.buffer += self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            text = self.buffer + error.object[: error.start].decode()
            line = self.line + text.count("\n")
            raise not_utf8(len(text.rpartition("\n")[2].encode()) + 1, line) from None
        self.ended = not data
        return bool(data)

    def _line(self, position: int) -> int:
        return self.line + self.buffer.count("\n", 0, position)

    def _column(self, position: int) -> int:
        start = self.buffer.rfind("\n", 0, position)
        return position - start + (self.column if start < 0 else 0)

    def _invalid(self, problem: str, position: int) -> DataError:
        at_end = position >= len(self.buffer)
        problem = _syntax_problem(problem, self._column(position), at_end)
        return _bad_json(problem, self._line(position))


def _decode(data: bytes, line: int) -> object:
    """Decode JSON that starts at `line` of its file; return the error if it cannot be."""
    try:
        text = data.decode().rstrip()
        if text.startswith("{"):  # `loads` takes half as long again
            value, end = _DECODER.raw_decode(text)
            if end == len(text):
                return cast(object, value)
        return cast(object, json.loads(text))
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = error.start - data.rfind(b"\n", 0, error.start)
        return not_utf8(byte, line)
    except json.JSONDecodeError as error:
        problem = _syntax_problem(error.msg, error.colno, error.pos >= len(error.doc))
        line += error.lineno - 1
    except (RecursionError, ValueError) as error:
        problem = _limit_problem(error)
    return _bad_json(problem, line)


def _limit_problem(error: RecursionError | ValueError) -> str:
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    return "the JSON holds a number with too many digits"


def _syntax_problem(problem: str, column: int, at_end: bool) -> str:
    cut_off = " (the line ends inside an object: cut off, or pretty-printed?)" if at_end else ""
    return f"invalid JSON at column {column}: {problem}{cut_off}"


def _bad_json(problem: str, line: int) -> DataError:
    return DataError(problem, line=line, remedy=_REMEDIES["bad_json"], reason="bad_json")
