"""Rewards that are rules: what an answer's text must be, contain or parse as."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers import TrainerState

from minigpt.data.formats import Message
from minigpt.errors import ConfigError, DataError, TrainingError
from minigpt.reading import reason_of

NOT_SCORED = math.nan  # the answer is left out of its group's statistics and of the loss

_NUMBER = re.compile(
    r"""(?:(?<![0-9A-Za-z.)\]])[-+−])?  # a sign; behind a value it would be an operator
    (?:[0-9]+/[0-9]+
    |(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?
    |\.[0-9]+)  # such as .5
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class AnswerToScore:
    """A sampled answer to a row's prompt, as rewards see it.

    Attributes:
        prompt: text to continue, or the messages of a chat to answer.
        prompt_ids: its tokens.
        completion: text of the answer.
        completion_ids: its tokens as they were sampled, with the one that ended it.
        ended: whether it ended by itself; otherwise it was cut off at the longest length.
        fields: of the row.
        source: file and line of the row.
    """

    prompt: str | tuple[Message, ...]
    prompt_ids: list[int]
    completion: str
    completion_ids: list[int]
    ended: bool
    fields: Mapping[str, object]
    source: tuple[str | Path, int]


@dataclass(frozen=True)
class Scores:
    """What a reward says of answers.

    Attributes:
        values: a finite number for each; NaN if it cannot be scored.
        metrics: numbers to log beside.
    """

    values: list[float]
    metrics: dict[str, float] = field(default_factory=dict)


class Scorer(ABC):
    """A reward that is ready to score.

    Attributes:
        name: under which it is logged.
    """

    name: str

    def check_fields(self, fields: Mapping[str, object]) -> None:  # noqa: B027  (most need none)
        """Check that a row has what the reward needs.

        Raises:
            DataError: with the field, when it does not.
        """

    @abstractmethod
    def score(self, answers: Sequence[AnswerToScore], state: TrainerState) -> Scores:
        """Score answers.

        Args:
            answers: to any prompts.
            state: the step, and how many there will be.

        Raises:
            TrainingError: when that is not possible.
        """


class Rule(Scorer):
    """A reward of each answer by itself."""

    def score(self, answers: Sequence[AnswerToScore], state: TrainerState) -> Scores:
        """Score each answer."""
        return Scores([float(self.score_one(answer)) for answer in answers])

    @abstractmethod
    def score_one(self, answer: AnswerToScore) -> float:
        """Return the reward of an answer, or NaN if it cannot be scored."""


class Exact(Rule):
    """1 if the answer ended and its text is that of a field of the row, otherwise 0.

    White space around both does not count. Where the field is null, the answer cannot be scored.
    """

    def __init__(self, field: str) -> None:
        self.name, self.field = "exact", field

    def check_fields(self, fields: Mapping[str, object]) -> None:
        """Check that the field is a string, a number or null."""
        expected_text(fields, self.field)

    def score_one(self, answer: AnswerToScore) -> float:
        """Compare with the field."""
        expected = expected_text(answer.fields, self.field)
        if expected is None:
            return NOT_SCORED
        return answer.ended and answer.completion.strip() == expected


class Numeric(Rule):
    """1 if the last number of the answer is that of a field of the row, otherwise 0.

    See `last_number` for what is a number. Values are compared exactly: 0.5, .50 and 1/2 are
    equal, 0.333 and 1/3 are not. Where the field is null, the answer cannot be scored; one without
    a number gets 0.
    """

    def __init__(self, field: str) -> None:
        self.name, self.field = "numeric", field

    def check_fields(self, fields: Mapping[str, object]) -> None:
        """Check that the field is null, a number, or a string that holds one."""
        expected = expected_text(fields, self.field)
        if expected is not None and last_number(expected) is None:
            raise DataError(
                f"{expected[:40]!r} holds no number, which the reward 'numeric' compares with",
                field=self.field,
                remedy="Write the number, or null for a row that shall not be scored.",
            )

    def score_one(self, answer: AnswerToScore) -> float:
        """Compare with the field's number."""
        expected = expected_text(answer.fields, self.field)
        if expected is None:
            return NOT_SCORED
        return last_number(answer.completion) == last_number(expected)


class Regex(Rule):
    """1 if the answer contains a regular expression, otherwise 0.

    With a field, what the first match holds in its first group (of a pattern without groups: the
    whole match) must also be the field's text, without white space around both. Where the field is
    null, the answer cannot be scored.
    """

    def __init__(self, pattern: str, field: str | None) -> None:
        self.name, self.pattern, self.field = "regex", re.compile(pattern), field

    def check_fields(self, fields: Mapping[str, object]) -> None:
        """Check that the field, if one is compared, is a string, a number or null."""
        if self.field is not None:
            expected_text(fields, self.field)

    def score_one(self, answer: AnswerToScore) -> float:
        """Search the answer."""
        match = self.pattern.search(answer.completion)
        if self.field is None:
            return match is not None
        expected = expected_text(answer.fields, self.field)
        if expected is None:
            return NOT_SCORED
        written = match[1 if self.pattern.groups else 0] if match else None
        return written is not None and written.strip() == expected


class Length(Rule):
    """The number of the answer's tokens, with the one that ended it.

    With a weight such as -0.001 it makes long answers dearer. As the only reward, a positive weight
    teaches to ramble, and a negative one to say nothing.
    """

    name = "length"

    def score_one(self, answer: AnswerToScore) -> float:
        """Count the tokens."""
        return len(answer.completion_ids)


class Json(Rule):
    """1 if the whole answer is JSON, valid by a schema if one is given, otherwise 0.

    White space around it does not count; NaN and Infinity are not JSON, nor are code fences.

    Args:
        schema: JSON Schema, draft 2020-12.
        source: of the schema, in errors.

    Raises:
        ConfigError: when the schema is none, or jsonschema is not installed.
    """

    def __init__(self, schema: object = None, source: str = "schema") -> None:
        self.name = "json"
        self.validator = None if schema is None else validator_of(schema, source)

    def score_one(self, answer: AnswerToScore) -> float:
        """Parse and validate the answer."""
        try:
            value = json.loads(answer.completion, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        if self.validator is None:
            return 1.0
        try:
            return bool(self.validator.is_valid(value))
        except Exception as error:  # a $ref to what is not in the schema, or to itself
            raise TrainingError(
                f"No answer can be judged by the schema of the reward json: {reason_of(error)}."
            ) from error


def validator_of(schema: object, source: str) -> Any:
    """Return jsonschema's validator of a schema, which fetches nothing from elsewhere."""
    try:
        from jsonschema import Draft202012Validator, SchemaError
        from referencing import Registry
    except ImportError as error:
        raise ConfigError(
            "The reward json validates by a schema with jsonschema: pip install 'minigpt[schema]'"
        ) from error
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        part = error.json_path.removeprefix("$")
        raise ConfigError(f"{source}{part} is no JSON Schema: {error.message:.200}.") from None
    return Draft202012Validator(schema, registry=Registry())


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def expected_text(fields: Mapping[str, object], name: str) -> str | None:
    """Return a field's text without white space around it; None for null.

    Raises:
        DataError: with the field, when the row lacks it, or it is not a string or a number.
    """
    if name not in fields:
        raise DataError(
            f"the row has no field {name!r}, which a reward compares with",
            field=name,
            remedy=f"Its fields are {', '.join(sorted(fields))}. Add it, or set the reward's field "
            "to one of them.",
        )
    value = fields[name]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            "a reward compares with it, so it must be a string or a number, or null for a row "
            "that shall not be scored",
            field=name,
        )
    return str(value).strip()


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, exactly; None if there is none.

    Numbers are integers and decimals in ASCII digits, with or without a sign, thousands separators
    (1,234.5) and an exponent of at most two digits (1.5e3), and fractions of two integers (3/4). A
    sign right behind a value is an operator: 7-4 ends with 4.
    """
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    try:
        return Fraction(numbers[-1].replace(",", "").replace("−", "-"))
    except (ValueError, ZeroDivisionError):  # thousands of digits; 1/0
        return None
