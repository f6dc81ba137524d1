"""Numbers are guarded: nothing that is not finite gets into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import Start, rows, status  # type: ignore[import-not-found]

from minigpt.runs.checkpoints import newest_checkpoint


def poison(file: Path, number: int, value: str, rank: int = 0) -> list[dict[str, Any]]:
    init_args = {"number": number, "value": value, "rank": rank, "file": str(file)}
    return [{"class_path": "moments.Poison", "init_args": init_args}]


def named(file: Path) -> str:
    """Return how an error names the rows that were noted when the poison was given."""
    rows = file.read_text().splitlines()
    assert len(rows) > 1
    return ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")


TWO = {"trainer__strategy": "ddp", "trainer__devices": 2, "trainer__accumulate_grad_batches": 1}
FSDP2 = {"trainer__strategy": {"class_path": "minigpt.model.parallel.FSDP2"}}
ONE = {"trainer__accumulate_grad_batches": 1}


@pytest.mark.parametrize(
    ("number", "value", "rank", "more"),
    [
        (4, "nan", 0, ONE),
        (4, "inf", 0, ONE),
        (4, "1e36", 0, ONE),  # the loss is finite, the gradient's norm is not
        (9, "nan", 0, {}),  # the second micro-batch of two: the first one is not named
        pytest.param(4, "nan", 1, TWO, marks=pytest.mark.faults),
        pytest.param(4, "nan", 1, {**TWO, **FSDP2}, marks=pytest.mark.faults),
    ],
)
def test_no_update_is_made_from_a_loss_that_is_not_finite(
    number: int, value: str, rank: int, more: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "poisoned"
    run = start("sft", "run", trainer__callbacks=poison(file, number, value, rank), **more)
    assert run.wait() == 2, run.output
    last = next(line for line in run.output.splitlines() if line.startswith("minigpt: Step 5: "))
    assert f"no update was made. The rows: {named(file)}. Look at them" in last
    assert "--ckpt_path auto" in last
    assert status(tmp_path / "run")["exit_code"] == 2
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.name == "step=3"
    again = start("sft", "run", "--ckpt_path", "auto", **more)  # without the poison
    assert again.wait() == 0, again.output
    assert start("sft", "whole", **more).wait() == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def spiking(start: Start, action: str, tmp_path: Path) -> tuple[int, str, list[str]]:
    """Let the loss jump in step 25 of 27; return status, output, and the digests of the steps."""
    notes = {"class_path": "moments.Weights", "init_args": {"file": str(tmp_path / "weights")}}
    run = start(
        "sft",
        "run",
        trainer__callbacks=[*poison(tmp_path / "poisoned", 24, "100"), notes],
        trainer__max_steps=27,
        model__init_args__spike={"action": action},
        **ONE,
    )
    ended = run.wait()
    return ended, run.output, (tmp_path / "weights").read_text().splitlines()


def digest(line: str) -> str:
    return line.split()[1]


def test_a_jump_of_the_loss_is_told(start: Start, tmp_path: Path) -> None:
    ended, message, weights = spiking(start, "warn", tmp_path)
    assert ended == 0
    assert "Step 25: the loss jumped to " in message
    assert f"rows: {named(tmp_path / 'poisoned')}." in message
    assert digest(weights[24]) != digest(weights[23])


def test_a_step_that_is_left_out_changes_neither_weights_nor_moments(
    start: Start, tmp_path: Path
) -> None:
    ended, message, weights = spiking(start, "skip", tmp_path)
    assert ended == 0
    assert "left out" in message
    assert digest(weights[24]) == digest(weights[23])
    assert digest(weights[25]) != digest(weights[24])


def test_a_jump_of_the_loss_can_stop_the_run(start: Start, tmp_path: Path) -> None:
    ended, message, weights = spiking(start, "stop", tmp_path)
    assert ended == 2
    assert "minigpt: Step 25: the loss jumped to " in message
    assert len(weights) == 24


def test_by_default_a_jump_is_let_pass(start: Start, tmp_path: Path) -> None:
    ended, message, _ = spiking(start, "off", tmp_path)
    assert ended == 0
    assert "jumped" not in message


def test_the_factor_of_a_jump_must_be_above_1(start: Start) -> None:
    run = start("sft", "run", model__init_args__spike={"action": "warn", "factor": 1.0})
    assert run.wait() == 2
    assert "spike.factor must be above 1, but is 1.0" in run.output
