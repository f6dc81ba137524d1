"""The options of rewards, and their weighted sum."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from jsonargparse import ArgumentParser

from minigpt.errors import ConfigError, DataError
from minigpt.stages.reward_rules import AnswerToScore
from minigpt.stages.rewards import Reward, RewardKind, RewardModel, Rewards

ANSWERS = [
    AnswerToScore("2+2=", [7], "4", [1, 2], True, {"answer": "4"}, ("a.jsonl", 1)),
    AnswerToScore("2+2=", [7], "so 4", [1, 2, 3], True, {"answer": "4"}, ("a.jsonl", 1)),
    AnswerToScore("2+2=", [7], "four", [1], True, {"answer": None}, ("a.jsonl", 2)),
]


class LengthModel:
    """A reward model that prefers short answers."""

    def scores(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[float]:
        assert prompts == [[7]] * len(answers)
        return [-float(len(answer)) for answer in answers]


def load(model: str) -> RewardModel:
    assert model == "outputs/reward"
    return LengthModel()


def test_the_weighted_sum() -> None:
    """An answer that one part cannot score has no sum."""
    rewards = Rewards(
        [
            Reward("exact", 2.0),
            Reward("numeric"),
            Reward("regex", 0.5, pattern="so"),
            Reward("regex", -1.0, pattern="f"),
            Reward("length", -0.01),
            Reward("json", 0.0),
            Reward("reward_model", model="outputs/reward"),
        ],
        load,
    )
    table = rewards.score(ANSWERS, 0, 10)
    names = ["exact", "numeric", "regex_1", "regex_2", "length", "json", "reward_model"]
    assert rewards.names == names
    parts = dict(zip(names, table.unweighted.tolist(), strict=True))
    assert parts["exact"][:2] == [1, 0]
    assert parts["numeric"][:2] == [1, 1]
    assert (parts["regex_1"], parts["regex_2"]) == ([0, 1, 0], [0, 0, 1])
    assert (parts["length"], parts["json"]) == ([2, 3, 1], [1, 0, 0])
    assert parts["reward_model"] == [-2, -3, -1]
    totals = rewards.total(table.unweighted).tolist()
    assert rewards.total(table.unweighted.view(len(rewards), 3, 1)).shape == (3, 1)
    assert totals[:2] == pytest.approx([2 + 1 - 0.02 - 2, 1 + 0.5 - 0.03 - 3])
    assert [math.isnan(value) for value in (totals[2], parts["exact"][2])] == [True, True]


def test_rows_are_checked_with_file_and_line() -> None:
    rewards = Rewards([Reward("length"), Reward("numeric", field="solution")], load)
    rewards.check_fields({"solution": "7"}, "a.jsonl", 4)
    with pytest.raises(DataError, match=r"^a.jsonl:4:solution: the row has no field 'solution'"):
        rewards.check_fields({"answer": "7"}, "a.jsonl", 4)


def test_a_schema_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "integer"}))
    rewards = Rewards([Reward("json", schema=str(file))], load)
    assert rewards.score(ANSWERS, 0, 10).unweighted.tolist() == [[1, 0, 0]]
    file.write_text('{"not": 3}')
    with pytest.raises(ConfigError, match=r"schema.json.not is no JSON Schema: 3 is not of type"):
        Rewards([Reward("json", schema=str(file))], load)
    with pytest.raises(ConfigError, match=r"The schema missing.json cannot be read: No such file"):
        Rewards([Reward("json", schema="missing.json")], load)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "exactly"}, "The reward 'exactly' is not known. There are exact, numeric"),
        ({"kind": "exact", "weight": math.nan}, "exact must be a number, but is nan"),
        ({"kind": "exact", "pattern": "a"}, "pattern belongs to regex, not to the reward exact"),
        ({"kind": "length", "field": "a"}, "field belongs to exact or numeric or regex, not"),
        ({"kind": "regex"}, "The reward regex needs a pattern"),
        ({"kind": "regex", "pattern": "("}, r"The pattern '\(' of the reward regex is no regular"),
        ({"kind": "function"}, "The reward function needs a function"),
        ({"kind": "reward_model"}, "The reward reward_model needs a model"),
        (
            {"kind": "json", "schema": {"type": "text"}},
            "schema.type is no JSON Schema: 'text' is not valid",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Reward(**options)


@pytest.mark.parametrize("rewards", [[], [Reward("length", 0.0)]])
def test_something_must_weigh(rewards: list[Reward]) -> None:
    with pytest.raises(ConfigError, match="at least one reward whose weight is not 0"):
        Rewards(rewards, load)


def test_a_config_holds_a_list_of_them() -> None:
    parser = ArgumentParser()
    parser.add_argument("--rewards", type=list[Reward])
    values = [{"kind": "json", "schema": {"type": "object"}}, {"kind": "length", "weight": -0.01}]
    config = parser.instantiate_classes(parser.parse_object({"rewards": values}))
    assert config.rewards == [Reward("json", schema={"type": "object"}), Reward("length", -0.01)]


def test_the_rewards_of_the_guide_are_accepted() -> None:
    text = (Path(__file__).parents[3] / "docs" / "grpo.md").read_text(encoding="utf-8")
    section = text.partition("## Rewards\n")[2]
    config = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    rewards = [Reward(**options) for options in config["model"]["init_args"]["rewards"]]
    assert {reward.kind for reward in rewards} == set(get_args(RewardKind))
