"""Rows as flat tuples of strings, which costs a fraction of making records of them.

A flat row is (role, content, role, content, ...): ("text", text), the messages of a chat, or a
preference's prompt, better answer and worse answer. Rows of a usual form are read here, and
their texts examined many at a time; whatever is not plainly good goes through `parse_row`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from minigpt.data.records import Chat, Kind, Message, Preference, Record, Text, parse_row
from minigpt.errors import DataError

Flat = tuple[str, ...]
CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff"
CONTROL_BYTES = bytes({*range(32), 127} - set(b"\t\n\r"))
_ROWS, _CHARACTERS = 500, 1 << 21  # examined together; more rows would keep the collector busy
_C1 = re.compile(b"\xc2[\x80-\x9f]")  # U+0080 to U+009F
_ROLES = {role: role for role in ("system", "user", "assistant")}
_ROLES |= {"human": "user", "gpt": "assistant"}
_PROMPTS = [
    (*system, *("user", "assistant") * turns, "user")
    for system in ((), ("system",))
    for turns in range(32)
]
_ORDERS = {
    "text": {("text",)},
    "chat": {p for p in _PROMPTS if p.count("user") > 1} | {(*p, "assistant") for p in _PROMPTS},
    "preference": {(*p, "assistant", "assistant") for p in _PROMPTS},
}
_UNUSUAL = (AttributeError, IndexError, KeyError, TypeError)  # what other rows raise when read


class Batch(NamedTuple):
    """Rows of a file.

    Attributes:
        lines: where they are.
        flats: what they hold, or what is wrong with them.
        special: by their places in the lists, the values of the rows that are wrong or whose
            texts hold control characters or U+FFFD.
    """

    lines: list[int]
    flats: list[Flat | DataError]
    special: dict[int, object]


def batches(
    rows: Iterable[tuple[int, object]], kind: Kind, special_tokens: Sequence[str] = ()
) -> Iterator[Batch]:
    """Yield all rows, good and bad, some hundreds at a time.

    Raises:
        DataError: whatever `rows` raises, after the rows before it.
    """
    tokens = [token for token in special_tokens if token]
    odd = re.compile("|".join([f"[{CONTROL}\ufffd\ud800-\udfff]", *map(re.escape, tokens)]))
    batch, size, stopped = Batch([], [], {}), 0, None
    values: list[object] = []
    texts: list[str] = []

    def examined() -> Batch:
        if _is_odd("\n".join(texts), tokens):
            for i, text in enumerate(texts):
                if odd.search(text):
                    batch.special[i] = values[i]
                    batch.flats[i] = parse(values[i], kind, special_tokens)
        return batch

    try:
        for line, value in rows:
            flat: Flat | DataError
            try:
                flat = _read(value, kind)
                text = "\n".join(flat)
            except _UNUSUAL:
                flat, text = parse(value, kind, special_tokens), ""
                if isinstance(flat, DataError):
                    batch.special[len(texts)] = value
                else:
                    text = "\n".join(flat)
            batch.lines.append(line)
            batch.flats.append(flat)
            values.append(value)
            texts.append(text)
            size += len(text)
            if len(texts) == _ROWS or size > _CHARACTERS:
                yield examined()
                batch, size, values, texts = Batch([], [], {}), 0, [], []
    except DataError as error:
        stopped = error
    if texts:
        yield examined()
    if stopped:
        raise stopped


def parse(row: object, kind: Kind, special_tokens: Sequence[str]) -> Flat | DataError:
    """Return any row as a flat one, or what is wrong with it."""
    try:
        return flat_of(parse_row(row, kind, special_tokens))
    except DataError as error:
        return error


def flat_of(record: Record) -> Flat:
    """Return a record as a flat row."""
    if isinstance(record, Text):
        return ("text", record.text)
    if isinstance(record, Chat):
        messages = record.messages
    else:
        messages = (*record.prompt, record.chosen, record.rejected)
    return tuple(part for message in messages for part in (message.role, message.content))


def record_of(flat: Flat, kind: Kind) -> Record:
    """Return the record that a flat row was made of."""
    messages = tuple(map(Message, flat[::2], flat[1::2]))
    if kind == "preference":
        return Preference(messages[:-2], *messages[-2:])
    return Chat(messages) if kind == "chat" else Text(flat[1])


def _is_odd(text: str, tokens: Sequence[str]) -> bool:
    """Tell quickly whether a text may hold control or lost characters, or one of the tokens."""
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return True
    control = len(data.translate(None, CONTROL_BYTES)) < len(data) or bool(_C1.search(data))
    return control or any(part in text for part in (*"\ufffd\ufeff\ufffe\uffff", *tokens))


def _read(row: Any, kind: Kind) -> Flat:
    """Read a good row of a usual form, but for odd characters and special tokens in it."""
    if kind == "text":
        flat: Flat = ("text", row["text"])
    else:
        system = ["system", row["system"]] if row.get("system") else []
        flat = tuple((_pair if kind == "preference" else _chat)(row, system))
    _whole(flat[1::2])
    if flat[::2] not in _ORDERS[kind]:
        raise KeyError
    return flat


def _whole(texts: Sequence[str]) -> Sequence[str]:
    if "" in texts or any(map(str.isspace, texts)):
        raise KeyError
    return texts


def _chat(row: Any, system: list[str]) -> list[str]:
    if (value := row.get("messages")) is None:
        value = row.get("conversations")
    if value is not None:
        said = system + _said(value)
        if said[-2] == "user" and "chosen" in row:
            raise KeyError
        return said
    if "instruction" not in row:
        return [*system, "user", row["prompt"], "assistant", row["completion"]]
    if row.get("history"):
        raise KeyError
    asked = _whole([row["instruction"], *filter(None, [row.get("input")])])
    return [*system, "user", "\n".join(asked), "assistant", row["output"]]


def _pair(row: Any, system: list[str]) -> list[str]:
    good, bad = _said(row["chosen"], "assistant"), _said(row["rejected"], "assistant")
    if (value := row.get("prompt")) is not None:
        prompt = system + _said(value, "user")
    elif row.keys() & {"messages", "conversations", "instruction"}:
        raise KeyError
    else:
        prompt = system + good[:-2]
    for answer in (good, bad):
        if answer[:-2] not in ([], prompt):
            raise KeyError
    if good[-2:] == bad[-2:]:
        raise KeyError
    return prompt + good[-2:] + bad[-2:]


def _said(value: Any, role: str = "") -> list[str]:
    if role and isinstance(value, str):
        return [role, value]
    said = []
    for message in value:
        said.append(_ROLES[message["role"] if "role" in message else message["from"]])
        said.append(message["content"] if "content" in message else message["value"])
    return said
