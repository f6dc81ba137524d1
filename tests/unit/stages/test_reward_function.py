"""Functions as rewards: what TRL passes, what they may return, and how they fail."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerState

from minigpt.data.formats import Message
from minigpt.errors import ConfigError, DataError, TrainingError
from minigpt.stages.reward_function import FunctionReward
from minigpt.stages.reward_rules import AnswerToScore, Scores

STATE = TrainerState(global_step=3, max_steps=10)
QUESTION = (Message("system", "Be short."), Message("user", "2+2?"))
CHATS = [
    AnswerToScore(
        QUESTION, [2], "4", [9, 1], True, {"prompt": "2+2?", "answer": 4}, ("a.jsonl", 1)
    ),
    AnswerToScore(
        QUESTION, [2], "5", [8, 1], True, {"prompt": "2+2?", "answer": 4}, ("a.jsonl", 1)
    ),
    AnswerToScore(QUESTION[1:], [2], "no", [7, 7, 7], False, {"level": "hard"}, ("b.jsonl", 7)),
]
TEXTS = [AnswerToScore("Once", [2], " upon", [3], True, {"answer": 1}, ("c.jsonl", 2))]

FUNCTIONS = """
import dataclasses

@dataclasses.dataclass
class Call:
    arguments: dict

calls = []

def recorded(prompts, completions, **kwargs):
    calls.append(Call(dict(prompts=prompts, completions=completions, **kwargs)))
    return [0.5] * len(prompts)

async def asynchronous(completions, **kwargs):
    return [len(completion[0]["content"]) for completion in completions]

def logging(completions, log_extra, log_metric, **kwargs):
    log_extra("seen", [str(completion) for completion in completions])
    log_metric("quality", 1)
    log_metric("quality", 2)
    return [0.0] * len(completions)

def raising(completions, **kwargs):
    return [1 / len(ids) if ids != [7, 7, 7] else ids[9] for ids in kwargs["completion_ids"]]

def exiting(completions, **kwargs):
    raise SystemExit(3)

def consuming(completions, parts, **kwargs):
    return [float(sum(part.pop() for _ in range(len(part)))) for part in parts]

def few(prompts, completions):
    return [0.0] * len(completions)

def all_of(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer):
    return [0.0] * len(completions)

def needs(completions, answer, threshold=0.5, *, level, **kwargs):
    return [0.0] * len(completions)

returned = None

def returning(**kwargs):
    return returned

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "functions_of_a_test.py"
    path.write_text(FUNCTIONS, encoding="utf-8")
    return path


def test_functions_get_what_trl_passes(file: Path) -> None:
    reward = FunctionReward(f"{file}:recorded")
    assert reward.name == "recorded"
    assert reward.score(CHATS, STATE) == Scores([0.5, 0.5, 0.5])
    assert reward.score(TEXTS, STATE) == Scores([0.5])
    chats, texts = (call.arguments for call in reward.function.__globals__["calls"])
    question = {"role": "user", "content": "2+2?"}
    system = {"role": "system", "content": "Be short."}
    assert chats["prompts"] == [[system, question], [system, question], [question]]
    assert chats["completions"] == [[{"role": "assistant", "content": t}] for t in ("4", "5", "no")]
    assert chats["completion_ids"] == [[9, 1], [8, 1], [7, 7, 7]]
    assert (chats["answer"], chats["level"]) == ([4, 4, None], [None, None, "hard"])
    assert (chats["trainer_state"].global_step, chats["trainer_state"].max_steps) == (3, 10)
    assert "prompt" not in chats
    assert (texts["prompts"], texts["completions"]) == (["Once"], [" upon"])


def test_asynchronous_functions_and_what_they_log(file: Path) -> None:
    assert FunctionReward(f"{file}:asynchronous").score(CHATS, STATE).values == [1, 1, 2]
    scores = FunctionReward(f"{file}:logging").score(TEXTS, STATE)
    assert scores == Scores([0.0], {"quality": 1.5})


@pytest.mark.skipif(not find_spec("trl"), reason="the extra `bench` is not installed")
def test_a_function_of_trl_runs_unmodified() -> None:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    rewards = Path(spec.submodule_search_locations[0], "rewards", "format_rewards.py")
    reward = FunctionReward(f"{rewards}:think_format_reward")
    thought = AnswerToScore(
        QUESTION, [2], "<think>Two.</think>4", [1], True, {"answer": 4}, ("a", 1)
    )
    assert reward.score([*CHATS, thought], STATE).values == [0, 0, 0, 1]


def test_a_function_that_raises_is_named_with_its_row(file: Path) -> None:
    with pytest.raises(TrainingError) as error:
        FunctionReward(f"{file}:raising").score(CHATS, STATE)
    words = f"The reward function {file}:raising raised at b.jsonl:7: IndexError: list index"
    assert str(error.value).startswith(words)
    assert isinstance(error.value.__cause__, IndexError)


def test_a_function_that_exits_is_named_too(file: Path) -> None:
    with pytest.raises(TrainingError, match=r"exiting raised at a\.jsonl:1: SystemExit: 3"):
        FunctionReward(f"{file}:exiting").score(CHATS, STATE)
    file.write_text("raise SystemExit('no such checker')", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be imported: SystemExit: no such checker"):
        FunctionReward(f"{file}:exiting")


def test_rows_stay_what_they_are(file: Path) -> None:
    row = {"parts": [1, 2]}
    answers = [AnswerToScore("Once", [2], "", [3], True, row, ("c.jsonl", 2)) for _ in range(2)]
    assert FunctionReward(f"{file}:consuming").score(answers, STATE) == Scores([3.0, 3.0])
    assert row == {"parts": [1, 2]}


def test_a_function_must_take_what_it_is_given(file: Path) -> None:
    FunctionReward(f"{file}:all_of").check_fields({"prompt": "p", "answer": "a"})
    for name, fields in (("few", {"prompt": "p"}), ("all_of", {"answer": "a", "level": 3})):
        with pytest.raises(ConfigError, match=r"unexpected keyword argument.*take \*\*kwargs"):
            FunctionReward(f"{file}:{name}").check_fields(fields)


def returning(file: Path, value: object) -> Scores:
    reward = FunctionReward(f"{file}:returning")
    reward.function.__globals__["returned"] = value
    return reward.score(CHATS, STATE)


@pytest.mark.parametrize(
    "value",
    [
        [True, None, math.nan],
        torch.tensor([1.0, math.nan, math.nan]),
        np.array([1, np.nan, np.nan]),
        (np.float32(1), None, torch.tensor(math.nan)),
    ],
)
def test_none_and_nan_are_no_zeros(file: Path, value: Any) -> None:
    first, *others = returning(file, value).values
    assert first == 1
    assert [math.isnan(other) for other in others] == [True, True]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1.0], "gave 1 values for 3 answers.* The rows: a.jsonl:1, b.jsonl:7"),
        (None, "gave a value of type NoneType for 3 answers"),
        (0.5, "gave a value of type float"),
        ([0, "1", 0], "returned '1' for an answer to a.jsonl:1, but a reward is a finite number"),
        ([0, 0, math.inf], "returned inf for an answer to b.jsonl:7"),
        ([0, 0, 10**400], "for an answer to b.jsonl:7"),
        ([torch.ones(2), 0, 0], r"returned tensor\(\[1., 1.\]\)"),
    ],
)
def test_what_is_no_reward_stops_the_run(file: Path, value: object, words: str) -> None:
    with pytest.raises(TrainingError, match=f"^The reward function .*:returning .*{words}"):
        returning(file, value)


def test_fields_that_a_function_needs(file: Path) -> None:
    reward = FunctionReward(f"{file}:needs")
    reward.check_fields({"answer": 1, "level": 2})
    with pytest.raises(DataError, match=r"^level: the row has no field 'level', which .*:needs"):
        reward.check_fields({"answer": 1})
    with pytest.raises(DataError, match=r"^completions: .* gets something else under this name"):
        reward.check_fields({"answer": 1, "level": 2, "completions": []})
    FunctionReward("math:hypot").check_fields({})


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("functions", "is given as package.module:name or file.py:name, not 'functions'"),
        (":name", "not ':name'"),
        ("no_such_package:name", "cannot be imported: ModuleNotFoundError: No module named"),
        ("missing.py:name", "missing.py:name cannot be imported: FileNotFoundError: No such file"),
        (
            "{file}:absent",
            "cannot be imported: AttributeError: module .* has no attribute 'absent'",
        ),
        ("{file}:number", "is no function, but a value of type int"),
    ],
)
def test_functions_that_cannot_be_imported(file: Path, path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FunctionReward(path.format(file=file))
