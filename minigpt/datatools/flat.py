"""Rows as flat tuples of strings, which cost a fraction of what records do.

A flat row is (role, content, role, content, ...): ("text", text), the messages of a chat, or a
preference's prompt, better answer and worse answer. The role of an answer that is only read is
`UNTRAINED`. Rows of a usual form are read here, and
their texts examined many at a time; whatever is not plainly good goes through `parse_row`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

from minigpt.data.formats import (
    MESSAGE_FIELDS,
    ROLES,
    ROW_FIELDS,
    Chat,
    Kind,
    Message,
    Preference,
    Record,
    Text,
    parse_row,
)
from minigpt.errors import DataError

Flat = tuple[str, ...]

UNTRAINED = "assistant, untrained"
CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff"
CONTROL_BYTES = bytes({*range(32), 127} - set(b"\t\n\r"))
_ROWS = 300  # examined together; more of them would keep the garbage collector busy
_C1 = re.compile(b"\xc2[\x80-\x9f]")  # U+0080 to U+009F
_TURNS = [("user", "assistant") * pairs for pairs in range(1, 33)]
_CHATS = {(*system, *turns) for system in ((), ("system",)) for turns in _TURNS}
_ORDERS = {"text": {("text",)}, "chat": _CHATS}
_ORDERS["preference"] = {(*chat, "assistant") for chat in _CHATS}
_PROMPT_KEYS = {"messages", "conversations", "instruction"}
_UNUSUAL = (AttributeError, IndexError, KeyError, TypeError)  # what other rows raise when read


class Batch(NamedTuple):
    """Rows that follow each other in a file.

    Attributes:
        lines: where they are.
        flats: what they hold, each a flat row, or the error that says what is wrong.
        special: the decoded values of those, by place in the lists, that may be wrong, hold
            control characters or U+FFFD, or have fields beside the text that say something; the
            other rows are good.
    """

    lines: list[int]
    flats: list[Any]
    special: dict[int, object]


def batches(
    rows: Iterable[tuple[int, object]], kind: Kind, special_tokens: Sequence[str] = ()
) -> Iterator[Batch]:
    """Yield all rows, good and bad, some hundreds at a time.

    Raises:
        DataError: whatever `rows` raises, after the rows before it.
    """
    held: list[tuple[int, object]] = []
    try:
        for row in rows:
            held.append(row)
            if len(held) == _ROWS:
                yield _examined(held, kind, special_tokens)
                held = []
    except DataError:
        yield _examined(held, kind, special_tokens)
        raise
    yield _examined(held, kind, special_tokens)


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
    if isinstance(record, Preference):
        messages = (*record.prompt, record.chosen, record.rejected)
    else:
        messages = record.messages
    roles = (message.role if message.train else UNTRAINED for message in messages)
    contents = (message.content for message in messages)
    return tuple(chain.from_iterable(zip(roles, contents, strict=True)))


def record_of(flat: Flat, kind: Kind) -> Record:
    """Return the record that a flat row stands for."""
    pairs = zip(flat[::2], flat[1::2], strict=True)
    messages = tuple(
        Message("assistant", text, train=False) if role == UNTRAINED else Message(role, text)
        for role, text in pairs
    )
    if kind == "preference":
        return Preference(messages[:-2], *messages[-2:])
    return Chat(messages) if kind == "chat" else Text(flat[1])


def _examined(rows: list[tuple[int, object]], kind: Kind, special_tokens: Sequence[str]) -> Batch:
    batch = Batch([line for line, _ in rows], [], {})
    for number, (_, value) in enumerate(rows):
        try:
            batch.flats.append(_read(value, kind))
        except _UNUSUAL:
            batch.special[number] = value
            batch.flats.append(())
    if _is_odd("\n".join(map("\n".join, batch.flats)), special_tokens):
        odd = _odd(tuple(special_tokens))
        texts = enumerate(map("\n".join, batch.flats))
        batch.special.update({i: rows[i][1] for i, text in texts if odd.search(text)})
    for number, value in batch.special.items():
        batch.flats[number] = parse(value, kind, special_tokens)
    return batch


@cache
def _odd(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    tokens = map(re.escape, filter(None, special_tokens))
    return re.compile("|".join([f"[{CONTROL}\ufffd\ud800-\udfff]", *tokens]))


def _is_odd(text: str, special_tokens: Sequence[str]) -> bool:
    """Tell quickly whether a text may hold what `_odd` finds."""
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return True
    control = len(data.translate(None, CONTROL_BYTES)) < len(data) or bool(_C1.search(data))
    return control or any(part in text for part in (*"\ufffd\ufeff\ufffe\uffff", *special_tokens))


def _read(row: Any, kind: Kind) -> Flat:
    """Read a row of a usual form; odd characters and special tokens may be in it."""
    if kind == "text":
        flat: Flat = ("text", row["text"])
    else:
        if ROW_FIELDS & row.keys():
            raise KeyError
        system = ["system", row["system"]] if row.get("system") else []
        flat = tuple((_pair if kind == "preference" else _chat)(row, system))
    if flat[::2] not in _ORDERS[kind]:
        raise KeyError
    _refuse_blanks(flat[1::2])
    return flat


def _refuse_blanks(texts: Sequence[str]) -> None:
    if "" in texts or any(map(str.isspace, texts)):
        raise KeyError


def _chat(row: Any, system: list[str]) -> list[str]:
    if (value := row.get("messages")) is None:
        value = row.get("conversations")
    if value is not None:
        return system + _said(value)
    if "instruction" not in row:
        return [*system, "user", row["prompt"], "assistant", row["completion"]]
    asked = [row["instruction"], *filter(None, [row.get("input")])]
    _refuse_blanks([*asked, "" if row.get("history") else "no history"])
    return [*system, "user", "\n".join(asked), "assistant", row["output"]]


def _pair(row: Any, system: list[str]) -> list[str]:
    good, bad = _said(row["chosen"], "assistant"), _said(row["rejected"], "assistant")
    if "prompt" in row:
        prompt = system + _said(row["prompt"], "user")
    else:
        prompt = [] if row.keys() & _PROMPT_KEYS else system + good[:-2]
    before, one, other = good[:-2], good[-2:], bad[-2:]
    if before != bad[:-2] or before not in ([], prompt) or one == other or not (one and other):
        raise KeyError
    return prompt + one + other


def _said(value: Any, role: str = "") -> list[str]:
    if role and isinstance(value, str):
        return [role, value]
    said = []
    for message in value:
        if len(message) > 2 and MESSAGE_FIELDS & message.keys():
            raise KeyError
        said.append(ROLES[message["role"] if "role" in message else message["from"]])
        said.append(message["content"] if "content" in message else message["value"])
    return said
