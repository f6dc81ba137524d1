"""The schema takes each shipped config, and no misspelt key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt.cli.schema import OPEN, config_schema

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
KEYWORDS = {
    "$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "description",
    "enum", "format", "items", "not", "properties", "required", "type",
}  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(json.dumps(config_schema()))  # type: ignore[no-any-return]


def has_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        kind = int if name == "integer" else int | float
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, TYPES[name])


def is_valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value fits the part of JSON Schema that the schema is written in."""
    assert schema.keys() <= KEYWORDS
    if "$ref" in schema:
        definition = root["$defs"][schema["$ref"].rpartition("/")[2]]
        if not is_valid(value, definition, root):
            return False
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    checks = [
        not types or any(has_type(value, name) for name in types),
        value in schema.get("enum", [value]),
        value == schema.get("const", value),
        "anyOf" not in schema or any(is_valid(value, each, root) for each in schema["anyOf"]),
        "not" not in schema or not is_valid(value, schema["not"], root),
    ]
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        checks.append(set(schema.get("required", [])) <= value.keys())
        for key, item in value.items():
            part = properties.get(key, others)
            checks.append(part if isinstance(part, bool) else is_valid(item, part, root))
    if isinstance(value, list) and "items" in schema:
        checks += [is_valid(item, schema["items"], root) for item in value]
    return all(checks)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_is_valid(path: Path, schema: dict[str, Any]) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert is_valid(config, schema, schema)


BASE: dict[str, Any] = {
    "model": {"class_path": "SFTModule", "init_args": {"init_from": "a"}},
    "data": {"class_path": "SFTDataModule", "init_args": {"train": "a.jsonl"}},
    "trainer": {"max_steps": 4},
    "run_dir": "outputs/a",
}


@pytest.mark.parametrize(
    ("path", "value", "valid"),
    [
        ("run_dir", "b", True),
        ("run_dri", "b", False),
        ("model.init_args.lora", {"r": 4}, True),
        ("model.init_args.lora", {"rank": 4}, False),
        ("model.init_args.init_form", "a", False),
        ("model.init_args.optimizer", {"name": "muon", "lr": 1e-3}, True),
        ("model.init_args.optimizer", {"name": "muon", "rate": 1e-3}, False),
        ("model.class_path", "minigpt.stages.DPOModule", True),
        ("model.class_path", "SFTModul", True),  # it might be a class of the user's own
        ("data.init_args.max_too_long_share", 0.5, True),
        ("data.init_args.max_length", "long", False),
        ("data.init_args.max_lenght", 5, False),
        ("trainer.max_step", 5, False),
        ("trainer.max_epochs", "many", False),
        ("checkpoint", {"every": 5}, True),
        ("checkpoint", {"evry": 5}, False),
        ("validate", {"every": "epoch"}, True),
        ("validate", {"every": "day"}, False),
        ("ckpt_path", "auto", True),
        ("seed_everything", 1, True),
        *((f"trainer.{name}", "any", True) for name in OPEN),
    ],
)
def test_a_misspelt_key_is_not(
    path: str, value: object, valid: bool, schema: dict[str, Any]
) -> None:
    config = json.loads(json.dumps(BASE))
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[last] = value
    assert is_valid(BASE, schema, schema)
    assert is_valid(config, schema, schema) == valid


def test_a_stage_of_the_users_own_takes_any_option(schema: dict[str, Any]) -> None:
    model = {"class_path": "toy.EqualChatsModule", "init_args": {"power": 0.5}}
    assert is_valid({**BASE, "model": model}, schema, schema)
    model["class_path"] = "SFTModule"
    assert not is_valid({**BASE, "model": model}, schema, schema)


def test_the_verb_prints_it(schema: dict[str, Any], minigpt: Any) -> None:
    outcome = minigpt("schema")
    assert (outcome.status, json.loads(outcome.out)) == (0, schema)
