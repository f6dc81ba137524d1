from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minigpt.runs.plan import Plan

PLAN = Plan(
    parameters=1_000,
    trainable=1_000,
    vocabulary=320,
    from_random=True,
    device="cpu",
    fast_precision="bf16-mixed",
    precision="bf16-mixed",
    micro_batch_tokens=256,
    accumulate=2,
    processes=1,
    steps=100,
    epoch_tokens=25_600,
    epoch_steps=50,
    rates="adamw 0.001, wsd",
    held_out_tokens=300,
    held_out_source=" of the training data",
    validations=10,
    validated_every="every 10 steps",
    checkpoint_every=50,
    retention="the last 2 are kept",
    exported="last",
)


def test_the_plan_says_what_the_run_does() -> None:
    assert list(PLAN.lines()) == [
        "Model: 1,000 parameters, all of them trained; 320 tokens in the vocabulary",
        "Hardware: cpu, 1 process, bf16-mixed",
        "Length: 100 steps of up to 512 tokens (256 a micro-batch x 2 accumulated x "
        "1 process), 51,200 tokens in all, 2 epochs, 51 tokens a parameter",
        "Rates: adamw 0.001, wsd",
        "Validation: 300 tokens of the training data, every 10 steps",
        "Checkpoints: every 50 steps, the last 2 are kept; hf/ will hold the last",
    ]
    assert list(PLAN.warnings()) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"trainable": 10}, "Model: 1,000 parameters, 10 of them trained; 320 tokens"),
        ({"held_out_tokens": 0}, "Validation: none"),
        ({"checkpoint_every": 100}, "Checkpoints: at the end alone"),
        ({"processes": 4}, "Hardware: cpu, 4 processes, bf16-mixed"),
        (
            {"processes": 4},
            "Length: 100 steps of up to 2,048 tokens (256 a micro-batch x 2 accumulated x "
            "4 processes)",
        ),
        ({"memory": "about 1 GB"}, "Memory: about 1 GB"),
    ],
)
def test_a_line_of_other_plans(changes: dict[str, Any], line: str) -> None:
    assert any(text.startswith(line) for text in replace(PLAN, **changes).lines())


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"precision": "32-true"}, "--trainer.precision null takes it"),
        ({"parameters": 60_000}, "reads 0.85 tokens a parameter"),
        (
            {"epoch_steps": 4},
            "the same data 25 times and will learn it by heart. Lower trainer.max_epochs",
        ),
        ({"held_out_tokens": 16_000}, "Validation takes longer than training"),
        (
            {"checkpoint_every": 100, "parameters": 10**9, "from_random": False},
            "saves no checkpoint before its end",
        ),
        ({"demo_files": ["a.jsonl", "b.jsonl"]}, "an invented world: a.jsonl, b.jsonl. Give"),
        ({"demo_prompts": ["Who?"]}, "the demo's sample prompts (Who?)"),
    ],
)
def test_a_plan_that_is_unlikely_to_be_meant(changes: dict[str, Any], warning: str) -> None:
    (text,) = replace(PLAN, **changes).warnings()
    assert warning in text


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "32-true", "fast_precision": "32-true"},
        {"parameters": 60_000, "from_random": False},
        {"epoch_steps": 5},
        {"checkpoint_every": 100},
    ],
)
def test_what_is_usual_is_not_warned_of(changes: dict[str, Any]) -> None:
    assert list(replace(PLAN, **changes).warnings()) == []
