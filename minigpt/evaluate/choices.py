"""Multiple choice and minimal pairs: which of several texts a model finds likeliest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from minigpt.data.formats import Message, Text, iter_rows, parse_prompt, parse_row
from minigpt.errors import ConfigError, DataError
from minigpt.evaluate.likelihood import Pair, continuation, score
from minigpt.evaluate.scores import Score, share
from minigpt.infer.engine import Engine

Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """A question with possible answers.

    Attributes:
        family: groups items in the table.
        prompt: a text that the choices continue as they stand, or a chat that they answer;
            empty for a minimal pair, whose texts stand alone.
        choices: at least two, all different.
        answer: index of the right one.
    """

    family: str
    prompt: str | tuple[Message, ...]
    choices: tuple[str, ...]
    answer: int


Parser = Callable[[Row, str], Choice]


def load(path: str, parse: Parser) -> list[Choice]:
    """Read a file's items: rows that are each a `choice`, or each a `pair`.

    Raises:
        DataError: with the file, line and field of what cannot be used.
    """
    items = []
    for line, row in iter_rows(path):
        try:
            if not isinstance(row, dict):
                raise _error(None, "must be a JSON object")
            items.append(parse(row, str(row.get("family") or Path(path).stem)))
        except DataError as error:
            raise error.at(path, line) from None
    return items


def _error(field: str | None, problem: str) -> DataError:
    return DataError(problem, field=field, reason="wrong_type")


def choice(row: Row, family: str) -> Choice:
    """Read ``{prompt | messages, choices, answer}``; the answer is an index or a choice."""
    prompt, given, answer = parse_prompt(row), row.get("choices"), row.get("answer")
    if not isinstance(given, list) or len(given) < 2:
        raise _error("choices", "must be a list of at least two strings")
    choices = tuple(_text(text, f"choices[{i}]") for i, text in enumerate(given))
    if len(set(choices)) < len(choices):
        raise _error("choices", "holds the same choice twice")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise _error("answer", f"must be one of the choices, or its index from 0; is {answer!r}")
    return Choice(family, prompt, choices, answer)


def pair(row: Row, family: str) -> Choice:
    """Read ``{good, bad}``: two texts of which a good model prefers the first."""
    good, bad = (_text(row.get(key), key) for key in ("good", "bad"))
    if good == bad:
        raise _error("bad", "equals 'good'")
    return Choice(family, "", (good, bad), 0)


def _text(value: object, field: str) -> str:
    try:
        record = parse_row({"text": value}, "text")
    except DataError as error:
        raise _error(field, error.problem) from None
    assert isinstance(record, Text)
    return record.text


def _alternatives(engine: Engine, item: Choice) -> list[Pair]:
    """Return the ids of each choice with those of what stands before it."""
    if isinstance(item.prompt, str) and item.prompt:
        return [continuation(engine, item.prompt, choice) for choice in item.choices]
    if item.prompt:
        if engine.codec is None:
            raise ConfigError("This model has no chat template: give 'prompt', not 'messages'.")
        start, choices = engine.codec.encode_answers(item.prompt, item.choices)
        return [(start, ids) for ids in choices]
    texts = [engine.encode(choice) for choice in item.choices]
    same = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*texts, strict=False)))
    # What all begin with decides nothing. Without it an end of text stands before the first token.
    same = min(same, min(map(len, texts)) - 1)
    return [(ids[:same] or engine.encode(""), ids[same:]) for ids in texts]


def choose(engine: Engine, items: Sequence[Choice], source: str) -> dict[str, Score]:
    """Let a model choose by likelihood.

    Returns:
        ``accuracy``, by the log-likelihood per byte of the choice; ``accuracy (sum)``, by the
        whole; for minimal pairs ``accuracy`` alone, by the whole. Then each family's.
    """
    pairs = [_alternatives(engine, item) for item in items]
    logp = iter(score(engine, [pair for group in pairs for pair in group], source)[0])
    judged = [(item, [next(logp) for _ in group]) for item, group in zip(items, pairs, strict=True)]
    asked = any(item.prompt for item in items)
    scores = {"accuracy": _accuracy(judged, per_byte=asked)}
    if asked:
        scores["accuracy (sum)"] = _accuracy(judged, per_byte=False)
    families = list(dict.fromkeys(item.family for item in items))
    for family in families if len(families) > 1 else []:
        scores[family] = _accuracy([j for j in judged if j[0].family == family], asked)
    return scores


def _accuracy(judged: Sequence[tuple[Choice, list[float]]], per_byte: bool) -> Score:
    rights = []
    for item, logp in judged:
        sizes = [len(choice.encode()) if per_byte else 1 for choice in item.choices]
        means = [x / size for x, size in zip(logp, sizes, strict=True)]
        rights.append(means.index(max(means)) == item.answer)
    return share(rights, sum(1 / len(item.choices) for item, _ in judged) / len(judged))
