"""Rewards that are rules: what each means, and what it cannot score."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest

from minigpt.errors import ConfigError, DataError, TrainingError
from minigpt.stages.reward_rules import (
    AnswerToScore,
    Exact,
    Json,
    Length,
    Numeric,
    Regex,
    Rule,
    last_number,
)


def answer(text: str, fields: Mapping[str, Any] = {}, ended: bool = True) -> AnswerToScore:
    return AnswerToScore("?", [4], text, [5, 6, 7], ended, fields, ("rows.jsonl", 3))


@pytest.mark.parametrize(
    ("rule", "text", "expected", "reward"),
    [
        (Exact("answer"), " 42\n", "42 ", 1),
        (Exact("answer"), "42", 42, 1),
        (Exact("answer"), "042", "42", 0),
        (Numeric("answer"), "3 + 4 = 7.", "7", 1),
        (Numeric("answer"), "7, not 8", 7, 0),
        (Numeric("answer"), "a half: 1/2", 0.5, 1),
        (Numeric("answer"), "none", 7, 0),
        (Numeric("answer"), "1,234.50", "the sum is #### 1234.5", 1),
        (Numeric("answer"), "1e-07", 1e-07, 1),
        (Regex(r"(?i)yes", None), "Oh YES", "not read", 1),
        (Regex(r"^yes", None), "Oh yes", "not read", 0),
        (Regex(r"= *(\w+)", "answer"), "x = 7", " 7", 1),
        (Regex(r"= *(\w+)", "answer"), "x = 8", 7, 0),
        (Regex(r"= *(\w+)", "answer"), "x is 7", "7", 0),
        (Regex(r"(a)|b", "answer"), "b", "b", 0),  # its first group matches nothing
        (Regex(r"\d+", "answer"), "x = 17", "17", 1),
        (Length(), "any", None, 3),
    ],
)
def test_rewards_of_answers(rule: Rule, text: str, expected: object, reward: float) -> None:
    fields = {"answer": expected}
    rule.check_fields(fields)
    assert rule.score_one(answer(text, fields)) == reward


def test_only_exact_needs_an_answer_that_ended() -> None:
    cut_off = answer("42", {"answer": "42"}, ended=False)
    assert Exact("answer").score_one(cut_off) == 0
    assert Numeric("answer").score_one(cut_off) == 1


@pytest.mark.parametrize("rule", [Exact("answer"), Numeric("answer"), Regex("a", "answer")])
def test_what_each_row_must_have(rule: Rule) -> None:
    """A null says that the row cannot be scored, which is not a reward of 0."""
    rule.check_fields({"answer": None})
    assert math.isnan(rule.score_one(answer("a", {"answer": None})))
    with pytest.raises(
        DataError, match=r"^answer: the row has no field 'answer'.*are b, c"
    ) as error:
        rule.check_fields({"b": 1, "c": 2})
    assert error.value.field == "answer"
    for value in (True, ["7"], {"a": 7}):
        with pytest.raises(DataError, match=r"^answer: .*must be a string or a number"):
            rule.check_fields({"answer": value})


def test_numeric_refuses_fields_without_a_number() -> None:
    for value in ("seven", "1/0", math.nan):
        with pytest.raises(DataError, match=r"^answer: .* holds no number"):
            Numeric("answer").check_fields({"answer": value})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-4", -4),
        ("答案是-4", -4),
        ("−4", -4),
        ("+4", 4),
        ("7-4", 4),
        ("(7)-4", 4),
        ("1,2,3", 3),
        ("1,234,567", 1234567),
        ("1,2345", 2345),
        (".25", Fraction(1, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("1.5e3", 1500),
        ("2E-2", Fraction(1, 50)),
        ("50%", 50),
        ("5.", 5),
        ("1/0", None),
        ("9" * 5000, None),
        ("1e999999999", 999999999),  # no number of a billion digits
        ("１２", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: Fraction | int | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (' {"a": 1}\n', 1),
        ('{"a": "b"}', 0),
        ("[1]", 0),
        ('{"a": 1', 0),
        ('{"a": NaN}', 0),
        ('```json\n{"a": 1}\n```', 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_by_a_schema(text: str, reward: float) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "number"}}}
    assert Json(schema).score_one(answer(text)) == reward


def test_json_without_a_schema() -> None:
    assert Json().score_one(answer("[1]")) == 1
    assert Json().score_one(answer("one")) == 0


PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", 1]}, "minItems": 1, "maxItems": 2},
        "kind": {"const": "person"},
        "height": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 3},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"age": 3.0, "tags": ["a", 1], "kind": "person", "height": None}, True),
        ({"name": ""}, False),
        ({"name": "Abcdef"}, False),
        ({"name": "ann"}, False),
        ({"name": None}, False),
        ({"age": -1}, False),
        ({"age": 150}, False),
        ({"age": 1.5}, False),
        ({"age": True}, False),
        ({"tags": []}, False),
        ({"tags": ["a"] * 3}, False),
        ({"tags": ["b"]}, False),
        ({"tags": [True]}, False),  # Python's True == 1
        ({"kind": "dog"}, False),
        ({"height": 0}, False),
        ({"height": 3.5}, False),
        ({"other": 1}, False),
    ],
)
def test_values_are_judged_by_a_schema(changes: dict[str, Any], valid: bool) -> None:
    text = json.dumps({"name": "Ann"} | changes)
    assert Json(PERSON).score_one(answer(text)) == valid


@pytest.mark.parametrize(
    ("text", "schema", "valid"),
    [
        ("[]", PERSON, False),
        ("{}", PERSON, False),  # the name is required
        ('{"name": "Ann", "age": 1e999}', PERSON, False),
        ('"anything"', {}, True),
        ('{"x": [1]}', {"additionalProperties": {"type": "array"}}, True),
        ('{"x": 1}', {"additionalProperties": {"type": "array"}}, False),
        ("[1]", {"items": True}, True),
        ("[1]", {"items": False}, False),
        ('"short"', {"minItems": 9, "minimum": 9, "required": ["a"]}, True),  # of other types
        ("3", {"$ref": "#/$defs/a", "$defs": {"a": {"oneOf": [{"const": 3}, {"not": {}}]}}}, True),
    ],
)
def test_schemas_of_any_kind(text: str, schema: Any, valid: bool) -> None:
    assert Json(schema).score_one(answer(text)) == valid


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "text"}, "schema.type is no JSON Schema"),
        ({"items": {"type": 3}}, "schema.items.type is no JSON Schema"),
        ({"properties": {"a": {"minimum": "3"}}}, "schema.properties.a.minimum is no"),
        ({"properties": {"a": 1}}, "schema.properties.a is no"),
        ({"properties": []}, "schema.properties is no"),
        ({"pattern": "("}, "schema.pattern is no"),
        ({"required": "name"}, "schema.required is no"),
        ({"minLength": -1}, "schema.minLength is no"),
        ({"items": []}, "schema.items is no"),
        ([], "schema is no JSON Schema"),
    ],
)
def test_what_is_no_schema_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Json(schema)


@pytest.mark.parametrize("reference", ["https://example.org/a.json", "#/nowhere", "#"])
def test_a_schema_that_judges_nothing_ends_the_run(reference: str) -> None:
    with pytest.raises(TrainingError, match="No answer can be judged by the schema"):
        Json({"$ref": reference}).score_one(answer("1"))


def test_a_schema_needs_jsonschema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert Json().score_one(answer("1")) == 1
    with pytest.raises(ConfigError, match=r"pip install 'minigpt\[schema\]'"):
        Json({})
