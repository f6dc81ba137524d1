"""The schema takes each shipped config, and no misspelt key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from minigpt.cli.schema import OPEN, config_schema

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(json.dumps(config_schema()))  # type: ignore[no-any-return]


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return bool(kind(schema).is_valid(value))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_is_valid(path: Path, schema: dict[str, Any]) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert is_valid(config, schema)


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
        # An option that stages have by one name takes the values of each.
        ("model.init_args.loss", "simpo", True),
        ("model.init_args.loss", "cispo", True),
        ("model.init_args.loss", "sipmo", False),
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
    assert is_valid(BASE, schema)
    assert is_valid(config, schema) == valid


def test_a_stage_of_the_users_own_takes_any_option(schema: dict[str, Any]) -> None:
    model = {"class_path": "toy.EqualChatsModule", "init_args": {"power": 0.5}}
    assert is_valid({**BASE, "model": model}, schema)
    model["class_path"] = "SFTModule"
    assert not is_valid({**BASE, "model": model}, schema)


def test_the_verb_prints_it(schema: dict[str, Any], minigpt: Any) -> None:
    outcome = minigpt("schema")
    assert (outcome.status, json.loads(outcome.out)) == (0, schema)
