"""Options that a checkpoint is compared by."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import assert_read_or_refused, odd, paths
from hypothesis import strategies as st
from tiny_runs import assert_refused

from minigpt.errors import ConfigError
from minigpt.files import MANIFEST, write_manifest
from minigpt.runs.resume import ExactResume


def test_an_option_that_is_newer_than_the_checkpoint_may_be_left_out() -> None:
    compared = ExactResume(False, {}, None)
    compared._compare({"beta": "0.1"}, {"beta": "0.1", "gamma": "None"})
    assert compared.changed == []
    with pytest.raises(ConfigError, match=r"belongs to: gamma was None, is 1\.0\. Put it back"):
        compared._compare({"beta": "0.1"}, {"beta": "0.1", "gamma": "1.0"})


# What a checkpoint with a right manifest holds

ODD_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda state: [state],
    "no optimizer": lambda state: {k: v for k, v in state.items() if k != "optimizer_states"},
    "optimizer": lambda state: state | {"optimizer_states": "x"},
    "loops": lambda state: state | {"loops": {"fit_loop": 5}},
    "a counter": lambda state: _with_counter(state, None),
    "weights": lambda state: state | {"state_dict": {"a": 5}},
    "run": lambda state: state | {"run": 5},
    "chance": lambda state: state | {"boundary": state["boundary"] | {"chance": [[5]]}},
    "moments": lambda state: _with_moment(state, torch.zeros(1)),
    "moment": lambda state: _with_moment(state, "x"),
    "no moment": lambda state: _without_moment(state),
}


def _with_moment(state: dict[str, Any], value: object) -> dict[str, Any]:
    state["optimizer_states"][0]["state"][0]["exp_avg"] = value
    return state


def _with_counter(state: dict[str, Any], value: object) -> dict[str, Any]:
    state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = value
    return state


def _without_moment(state: dict[str, Any]) -> dict[str, Any]:
    del state["optimizer_states"][0]["state"][0]["exp_avg_sq"]
    return state


def save(state: object, checkpoint: Path) -> None:
    checkpoint.mkdir(exist_ok=True)  # a run that took an earlier one may have removed it
    shutil.rmtree(checkpoint / "hf", ignore_errors=True)
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    torch.save(state, checkpoint / "state.pt")
    write_manifest(checkpoint)


@pytest.fixture
def saved(fit: Callable[..., Any], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a run can go on from, and what it holds."""
    assert fit("sft", trainer__max_steps=2).status == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step=2"
    state: dict[str, Any] = torch.load(checkpoint / "state.pt", weights_only=True)
    return checkpoint, state


def test_a_checkpoint_that_holds_something_else_is_refused(
    saved: tuple[Path, dict[str, Any]], fit: Callable[..., Any]
) -> None:
    checkpoint, state = saved
    for change in ODD_STATES.values():
        save(change(copy.deepcopy(state)), checkpoint)
        outcome = fit("sft", "--ckpt_path", checkpoint, trainer__max_steps=3)
        assert_refused(outcome, f"The checkpoint {checkpoint}")


@st.composite
def changed(draw: st.DrawFn, state: dict[str, Any]) -> dict[str, Any]:
    """Replace or remove a value of a checkpoint."""
    made = copy.deepcopy(state)
    path = draw(st.sampled_from([path for path in paths(made) if path]))
    parent: Any = made
    for key in path[:-1]:
        parent = parent[key]
    if draw(st.integers(0, 3)) == 0:
        del parent[path[-1]]
    else:
        parent[path[-1]] = draw(odd)
    return made


# One of many states asks for the compiler, which warns about itself.
MANY = pytest.param(300, marks=[pytest.mark.large, pytest.mark.filterwarnings("ignore")])


@pytest.mark.parametrize("count", [8, MANY])
def test_a_damaged_state_is_taken_or_refused(
    saved: tuple[Path, dict[str, Any]], fit: Callable[..., Any], count: int
) -> None:
    checkpoint, state = saved

    def read(state: dict[str, Any]) -> None:
        save(state, checkpoint)
        outcome = fit("sft", "--ckpt_path", checkpoint, trainer__max_steps=3)
        if outcome.status != 0:
            assert_refused(outcome)

    assert_read_or_refused(count, changed(state), read)
