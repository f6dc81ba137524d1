"""The part of JSON Schema by which answers are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minigpt.errors import ConfigError
from minigpt.stages.json_schema import KEYWORDS, check_schema, matches

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
        ({"age": float("inf")}, False),  # what json makes of 1e999
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
def test_values_are_judged(changes: dict[str, Any], valid: bool) -> None:
    check_schema(PERSON)
    assert matches({"name": "Ann"} | changes, PERSON) is valid


def test_all_keywords_are_judged_above() -> None:
    assert [name for name in KEYWORDS if f'"{name}"' not in Path(__file__).read_text()] == []


def test_other_values_than_objects_and_booleans_as_schemas() -> None:
    assert not matches([], PERSON)
    assert not matches({}, PERSON)  # the name is required
    assert matches("anything", {})
    assert matches({"x": [1]}, {"additionalProperties": {"type": "array"}})
    assert not matches({"x": 1}, {"additionalProperties": {"type": "array"}})
    assert matches([1], {"items": True})
    assert not matches([1], {"items": False})
    assert matches("short", {"minItems": 9, "minimum": 9, "required": ["a"]})  # of other types


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#/a", "oneOf": []}, r"schema has \$ref, oneOf, but answers are judged only by"),
        ({"type": "text"}, "schema.type must be one of object, .* but is 'text'"),
        ({"items": {"type": 3}}, "schema.items.type must be one of"),
        ({"properties": {"a": {"minimum": "3"}}}, "schema.properties.a.minimum must be a number"),
        ({"properties": {"a": 1}}, "schema.properties.a must be an object"),
        ({"properties": []}, "schema.properties must be an object"),
        ({"additionalProperties": {"not": {}}}, "schema.additionalProperties has not"),
        ({"pattern": "("}, "schema.pattern must be a regular expression"),
        ({"enum": [[1]]}, "schema.enum must be a list of strings"),
        ({"const": {}}, "schema.const must be a string"),
        ({"required": "name"}, "schema.required must be a list of names"),
        ({"minLength": -1}, "schema.minLength must be a number from 0 up"),
        ({"items": []}, "schema.items must be a schema"),
    ],
)
def test_what_cannot_be_judged_by_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_schema(schema)
