"""Exams: items with a known answer, how a reply is judged, and the run that asks them.

One row format serves exams, where a model replies, and multiple choice, where it is asked for
likelihoods (`minigpt.evaluate.choices`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt.data.formats import QUESTIONS, Message, Text, iter_rows, parse_prompt, parse_row
from minigpt.errors import DataError

if TYPE_CHECKING:  # `minigpt data check` reads exams without torch
    from minigpt.infer.engine import Engine, Reply, Sampling

ItemKind = Literal["exam", "choices", "pairs"]

PUNCTUATION = ".,;:!?…。，；：！？、\"'“”‘’ \n\t"


@dataclass(frozen=True)
class Item:
    """A question with a known answer.

    Attributes:
        id: names the item; by default its line in the file.
        family: groups items in the results; by default the name of the file.
        prompt: a text that the answer continues, or a chat that it answers; empty for a minimal
            pair, whose texts stand alone.
        answer: the correct answer. With choices it is one of them.
        choices: possible answers. A correct reply holds the answer and no other choice.
        avoid: markers of a bad style. A correct reply holds the answer and none of them.
    """

    id: str
    family: str
    prompt: str | tuple[Message, ...]
    answer: str
    choices: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The chat that asks an exam's item."""
        assert not isinstance(self.prompt, str)
        return self.prompt


def load_items(path: str | Path, kind: ItemKind) -> list[Item]:
    """Read a file of items.

    Args:
        path: JSONL or a JSON array.
        kind: "exam" for rows of ``{prompt | messages, answer, choices?, avoid?}``, in which a
            prompt is what the user asks, "choices" for rows of ``{prompt | messages, choices,
            answer}``, in which the choices continue a prompt, "pairs" for rows of ``{good, bad}``:
            two texts of which a good model finds the first likelier.

    Raises:
        DataError: with the file, line and field of what cannot be used.
    """
    items = []
    for line, row in iter_rows(path):
        try:
            if not isinstance(row, dict):
                raise _error(None, "must be a JSON object")
            item = _pair(row) if kind == "pairs" else _question(row, kind)
            family = str(row.get("family") or Path(path).stem)
            items.append(replace(item, id=str(row.get("id", line)), family=family))
        except DataError as error:
            raise error.at(path, line) from None
    return items


def _question(row: dict[str, Any], kind: ItemKind) -> Item:
    """Read an item of an exam or of multiple choice; the caller adds its names."""
    prompt = parse_prompt(row)
    if kind == "exam" and isinstance(prompt, str):
        prompt = (Message("user", prompt),)
    choices, avoid = _texts(row, "choices"), _texts(row, "avoid")
    if kind == "choices" and len(choices) < 2:
        raise _error("choices", "must be a list of at least two strings")
    if len(set(choices)) < len(choices):
        raise _error("choices", "holds the same choice twice")
    answer = next((row[key] for key in QUESTIONS.values() if key in row), None)
    if choices:
        answer = _choice_of(answer, choices)
    if not isinstance(answer, str):
        raise _error("answer", "must be a string")
    item = Item("", "", prompt, answer, choices, avoid)
    if kind == "exam" and not is_correct(answer, item):
        raise _error("avoid", "holds a part of the answer, so that no reply can be right")
    return item


def _choice_of(answer: object, choices: tuple[str, ...]) -> str:
    """Return the choice that an answer names: by its text, or by its index."""
    if isinstance(answer, str):
        if answer in choices:
            return answer
        folded = [normalise(choice) for choice in choices]
        if normalise(answer) in folded:
            return choices[folded.index(normalise(answer))]
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    raise _error("answer", f"must be one of the choices, or its index from 0; is {answer!r:.40}")


def _pair(row: dict[str, Any]) -> Item:
    good, bad = (_text(row.get(key), key) for key in ("good", "bad"))
    if good == bad:
        raise _error("bad", "equals 'good'")
    return Item("", "", "", good, (good, bad))


def _texts(row: dict[str, Any], field: str) -> tuple[str, ...]:
    """Read an optional list of strings. An empty one would be part of any reply."""
    value = row.get(field) or []
    if not isinstance(value, list):
        raise _error(field, "must be a list of strings")
    return tuple(_text(text, f"{field}[{i}]") for i, text in enumerate(value))


def _text(value: object, field: str) -> str:
    try:
        record = parse_row({"text": value}, "text")
    except DataError as error:
        raise _error(field, error.problem) from None
    assert isinstance(record, Text)
    return record.text


def _error(field: str | None, problem: str) -> DataError:
    remedy = "Correct the item, or leave it out."
    return DataError(problem, field=field, remedy=remedy, reason="wrong_type")


def fold(text: str) -> str:
    """Fold case and width."""
    if text.isascii():  # quickly, because data have many texts
        return text.lower()
    return unicodedata.normalize("NFKC", text).casefold()


def normalise(text: str) -> str:
    """Fold case and width and strip outer spaces and punctuation."""
    return fold(text).strip(PUNCTUATION)


def is_correct(reply: str, item: Item) -> bool:
    """Judge a reply: see `Item` for choices and markers; without them it equals the answer."""
    text, answer = normalise(reply), normalise(item.answer)
    if item.choices:
        return _named_choices(text, item.choices) == {answer}
    if item.avoid:
        return answer in text and not any(fold(marker) in fold(reply) for marker in item.avoid)
    return text == answer


def _named_choices(text: str, choices: tuple[str, ...]) -> set[str]:
    """Return the choices in a text. A choice inside a longer one that it names does not count."""
    named = set()
    for choice in sorted(filter(None, map(normalise, choices)), key=len, reverse=True):
        if choice in text:
            named.add(choice)
            text = text.replace(choice, "\n")
    return named


@dataclass(frozen=True)
class ItemResult:
    """A model's reply to an item.

    Attributes:
        item: the question.
        reply: the text of the reply.
        matches: whether the text is a correct answer.
        ended: whether the model ended its turn by itself. A model that answers and goes on
            with the next question, as text does, has not given an answer.
    """

    item: Item
    reply: str
    matches: bool
    ended: bool

    @property
    def correct(self) -> bool:
        """Whether the reply counts as correct."""
        return self.matches and self.ended


def run_eval(engine: Engine, items: Sequence[Item], sampling: Sampling) -> list[ItemResult]:
    """Ask all items and judge the replies."""
    replies = engine.complete([item.prompt for item in items], sampling)
    return list(map(judge, items, replies))


def judge(item: Item, reply: Reply) -> ItemResult:
    """Judge a reply to an item."""
    return ItemResult(item, reply.text, is_correct(reply.text, item), reply.ended_by is not None)


def by_family(results: Sequence[ItemResult]) -> dict[str, list[bool]]:
    """Return whether each reply is correct, grouped by the items' families."""
    families: dict[str, list[bool]] = {}
    for result in results:
        families.setdefault(result.item.family, []).append(result.correct)
    return families


def accuracies(results: Sequence[ItemResult]) -> dict[str, float]:
    """Return each family's share of correct replies, 0 to 1."""
    return {family: sum(correct) / len(correct) for family, correct in by_family(results).items()}
