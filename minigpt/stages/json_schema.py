"""The part of JSON Schema by which answers are judged.

Its keywords are those of `KEYWORDS`, with the meaning of the 2020-12 drafts, beside those that only
describe. A schema with any other is refused, because an answer could not be judged by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from minigpt.errors import ConfigError

DESCRIBING = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and value == value // 1,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


class Keyword(NamedTuple):
    """A keyword of schemas.

    Attributes:
        type: the type of values that it says something of; of all if "".
        parameter: what a schema gives for it, in words.
        fits: whether something is such a parameter.
        holds: whether a value of the type is as the parameter says.
    """

    type: str
    parameter: str
    fits: Callable[[Any], bool]
    holds: Callable[[Any, Any], bool]


def matches(value: Any, schema: Any) -> bool:
    """Whether a JSON value is valid by a schema that `check_schema` has let pass."""
    if isinstance(schema, bool):
        return schema
    for name, parameter in schema.items():
        keyword = KEYWORDS.get(name)
        if keyword is None or (keyword.type and not TYPES[keyword.type](value)):
            continue
        if not keyword.holds(value, parameter):
            return False
    return not isinstance(value, dict) or _properties_match(value, schema)


def check_schema(schema: Any, path: str = "schema") -> None:
    """Check that answers can be judged by a schema.

    Args:
        schema: to check.
        path: where in the config it stands.

    Raises:
        ConfigError: when a keyword is not supported, or what it is given does not fit.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ConfigError(f"{path} must be an object, as JSON Schema has it, but is {schema!r}.")
    if unknown := sorted(map(str, set(schema) - set(KEYWORDS) - _NESTING - DESCRIBING)):
        supported = ", ".join(sorted({*KEYWORDS, *_NESTING}))
        raise ConfigError(
            f"{path} has {', '.join(unknown)}, but answers are judged only by {supported}. Leave "
            "that out, or judge them by a reward of kind: function."
        )
    for name in schema.keys() & KEYWORDS.keys():
        if not KEYWORDS[name].fits(schema[name]):
            needed = KEYWORDS[name].parameter
            raise ConfigError(f"{path}.{name} must be {needed}, but is {schema[name]!r}.")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise ConfigError(f"{path}.properties must be an object, but is {properties!r}.")
    nested = {f"properties.{name}": part for name, part in properties.items()}
    nested |= {name: schema[name] for name in ("items", "additionalProperties") if name in schema}
    for name, part in nested.items():
        check_schema(part, f"{path}.{name}")


def _properties_match(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    properties, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(matches(part, properties.get(name, other)) for name, part in value.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _has_type(value: Any, types: str | list[str]) -> bool:
    return any(TYPES[name](value) for name in ([types] if isinstance(types, str) else types))


def _are_types(types: Any) -> bool:
    names = [types] if isinstance(types, str) else types
    return isinstance(names, list) and all(isinstance(n, str) and n in TYPES for n in names)


def _is_pattern(pattern: Any) -> bool:
    try:
        return isinstance(pattern, str) and bool(re.compile(pattern))
    except re.error:
        return False


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


_NUMBER = ("a number", _is_number)
_COUNT = ("a number from 0 up", _is_count)
_NESTING = {"properties", "additionalProperties"}  # see `_properties_match`
KEYWORDS = {
    "type": Keyword("", f"one of {', '.join(TYPES)}, or a list of them", _are_types, _has_type),
    "const": Keyword("", "a string, a number, true, false or null", _is_plain, _same),
    "enum": Keyword(
        "",
        "a list of strings, numbers, true, false or null",
        lambda values: isinstance(values, list) and all(map(_is_plain, values)),
        lambda value, allowed: any(_same(value, other) for other in allowed),
    ),
    "required": Keyword(
        "object",
        "a list of names",
        _are_names,
        lambda value, names: all(name in value for name in names),
    ),
    "items": Keyword(
        "array",
        "a schema",
        lambda schema: isinstance(schema, dict | bool),
        lambda value, schema: all(matches(item, schema) for item in value),
    ),
    "minItems": Keyword("array", *_COUNT, lambda value, bound: len(value) >= bound),
    "maxItems": Keyword("array", *_COUNT, lambda value, bound: len(value) <= bound),
    "minLength": Keyword("string", *_COUNT, lambda value, bound: len(value) >= bound),
    "maxLength": Keyword("string", *_COUNT, lambda value, bound: len(value) <= bound),
    "pattern": Keyword(
        "string",
        "a regular expression",
        _is_pattern,
        lambda value, pattern: re.search(pattern, value) is not None,
    ),
    "minimum": Keyword("number", *_NUMBER, lambda value, bound: value >= bound),
    "maximum": Keyword("number", *_NUMBER, lambda value, bound: value <= bound),
    "exclusiveMinimum": Keyword("number", *_NUMBER, lambda value, bound: value > bound),
    "exclusiveMaximum": Keyword("number", *_NUMBER, lambda value, bound: value < bound),
}
