"""A run that is killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Start, at, rows  # type: ignore[import-not-found]

from minigpt.files import write_manifest
from minigpt.runs.checkpoints import STATE, newest_checkpoint

LORA = {"r": 4, "dropout": 0.2}
PRECOMPUTED = {"model__init_args__reference": "precomputed"}
# Each stage with dropout on: in GPT-2 itself, or in the adapter.
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"model__init_args__architecture__dropout": 0.2},
    "pretrain-muon": {
        "model__init_args__architecture__dropout": 0.2,
        "model__init_args__optimizer": {"name": "muon", "lr": 0.01},
        "trainer__precision": "bf16-mixed",
    },
    "sft": {"model__init_args__init_from": "gpt2"},
    "dpo": {"model__init_args__init_from": "gpt2"},
    "lora": {"model__init_args__lora": LORA},
    "dpo-lora": {"model__init_args__lora": LORA},
}
ONE_MOMENT: dict[str, dict[str, Any]] = {
    "kto": {"model__init_args__init_from": "gpt2", "model__init_args__desirable_weight": 2.0},
    "dpo-precomputed": {"model__init_args__init_from": "gpt2", **PRECOMPUTED},
    "dpo-lora-precomputed": {"model__init_args__lora": LORA, **PRECOMPUTED},
    "lora-compiled": {
        "model__init_args__lora": LORA,
        "model__init_args__compile_layers": True,
        "trainer__precision": "bf16-mixed",
    },
}


def options(world: Path, stage: str, workers: int) -> dict[str, Any]:
    changes = {**(STAGES | ONE_MOMENT)[stage], "data__init_args__num_workers": workers}
    if "model__init_args__init_from" in changes:
        changes["model__init_args__init_from"] = str(world / "gpt2")
    return changes


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return where two checkpoints differ, to the last bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return [d for k in one for d in differences(one[k], other[k], f"{path}/{k}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), path
        pairs = zip(one, other, strict=True)
        return [d for i, pair in enumerate(pairs) for d in differences(*pair, f"{path}/{i}")]
    return [] if one == other or path.endswith("/seconds") else [path]


def state(run_dir: Path, name: str = "step=8") -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run_dir / "checkpoints" / name / STATE, weights_only=True)
    return loaded


def ending(run_dir: Path) -> dict[str, Any]:
    """Return the last checkpoint without Lightning's count of batches within an epoch."""
    return {k: v for k, v in state(run_dir).items() if k != "loops"}


def weights(run_dir: Path) -> bytes:
    return next((run_dir / "hf").glob("*.safetensors")).read_bytes()


MOMENTS = {
    "in the middle of an accumulation": at("train_batch_start", 8),
    "between two steps": at("train_batch_start", 12),
    "while validating": at("validation_batch_start", after=4),
    "after the last step": at("train_end"),
}
ALL = [
    *((stage, 0, moment) for stage in STAGES for moment in MOMENTS),
    *((stage, 2, "in the middle of an accumulation") for stage in STAGES),
    *((stage, 0, "in the middle of an accumulation") for stage in ONE_MOMENT),
]
QUICK = {("pretrain", 2, "in the middle of an accumulation"), ("dpo", 0, "while validating")}
# Of the others, `make faults` has one moment for each stage, and `make faults-large` all.
CHOSEN = {(s, 0, list(MOMENTS)[i % len(MOMENTS)]) for i, s in enumerate(STAGES)}
CHOSEN |= {case for case in ALL if case[0] in ONE_MOMENT}


def marks(case: tuple[str, int, str]) -> list[pytest.MarkDecorator]:
    """Return the set of tests that a case runs in."""
    return [] if case in QUICK else [pytest.mark.faults if case in CHOSEN else pytest.mark.large]


@pytest.fixture(scope="module")
def uninterrupted_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the runs that nothing interrupts, each of which serves several moments."""
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.mark.parametrize(
    ("stage", "workers", "moment"),
    [pytest.param(*case, marks=marks(case)) for case in ALL],
)
def test_a_killed_run_ends_where_the_whole_one_does(
    stage: str,
    workers: int,
    moment: str,
    world: Path,
    start: Start,
    uninterrupted_runs: Path,
    tmp_path: Path,
) -> None:
    kind, changes = stage.partition("-")[0], options(world, stage, workers)
    uninterrupted = uninterrupted_runs / f"{stage}-{workers}"
    if not (uninterrupted / "summary.json").exists():  # another moment's test may have made it
        reference = start(kind, str(uninterrupted), **changes)
        assert reference.wait() == 0, reference.output
    killed = start(kind, "run", trainer__callbacks=MOMENTS[moment], **changes)
    assert killed.wait() == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "run") is not None
    resumed = start(kind, "run", "--ckpt_path", "auto", **changes)
    assert resumed.wait() == 0, resumed.output
    assert differences(ending(uninterrupted), ending(tmp_path / "run")) == []
    assert rows(tmp_path / "run") == rows(uninterrupted)
    assert weights(tmp_path / "run") == weights(uninterrupted)
    one, other = (
        json.loads((d / "summary.json").read_text()) for d in (uninterrupted, tmp_path / "run")
    )
    for name in ("steps", "tokens_seen", "before", "final"):
        assert one[name] == other[name], name


@pytest.mark.faults
@pytest.mark.parametrize(
    ("lora", "function", "number", "saved"),
    [
        (None, "score", 2, 0),
        (LORA, "save", 1, 1),
        pytest.param(None, "save", 0, 0, marks=pytest.mark.large),
        pytest.param(LORA, "score", 12, 1, marks=pytest.mark.large),
    ],
)
def test_a_reference_that_was_cut_off_is_not_used(
    lora: Any, function: str, number: int, saved: int, start: Start, tmp_path: Path
) -> None:
    """The kill comes while the first or the second file's pairs are scored, or that is written."""
    changes: dict[str, Any] = {**PRECOMPUTED, "model__init_args__lora": lora}
    uninterrupted, run = (tmp_path / "cache-whole", tmp_path / "cache-run")
    assert (
        start("dpo", "whole", **changes, data__init_args__cache_dir=str(uninterrupted)).wait() == 0
    )
    changes["data__init_args__cache_dir"] = str(run)
    options = {"function": function, "number": number}
    dies = [{"class_path": "moments.InReference", "init_args": options}]
    killed = start("dpo", "run", trainer__callbacks=dies, **changes)
    assert killed.wait() == -signal.SIGKILL, killed.output
    assert len(references(run)) == saved
    again = start("dpo", "run", "--ckpt_path", "auto", **changes)
    assert again.wait() == 0, again.output
    assert references(run) == references(uninterrupted)
    assert differences(ending(tmp_path / "whole"), ending(tmp_path / "run")) == []
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


REWARD = """
import os
import signal
from pathlib import Path

calls = 0


def low(completion_ids, **_):
    global calls
    calls += 1
    order = Path(__file__).with_name("kill")
    if calls == 7 and order.exists():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(i < 290 for i in ids) / len(ids) for ids in completion_ids]
"""


@pytest.mark.faults
def test_a_run_that_is_killed_in_a_rollout_goes_on_exactly(
    world: Path, start: Start, tmp_path: Path
) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    changes: dict[str, Any] = {
        "model__init_args__rewards": [{"kind": "function", "function": f"{reward}:low"}],
        "model__init_args__init_from": str(world / "gpt2"),  # with dropout
        "data__init_args__passes": 2,  # the checkpoint of step 3 is in the middle of them
        "data__init_args__replay": {str(world / "sft.jsonl"): 0.3},
    }
    assert start("grpo", "whole", **changes).wait() == 0
    reward.with_name("kill").touch()
    killed = start("grpo", "run", **changes)
    assert killed.wait() == -signal.SIGKILL, killed.output
    assert newest_checkpoint(tmp_path / "run") is not None
    resumed = start("grpo", "run", "--ckpt_path", "auto", **changes)
    assert resumed.wait() == 0, resumed.output
    assert differences(ending(tmp_path / "whole"), ending(tmp_path / "run")) == []
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def references(cache: Path) -> dict[str, bytes]:
    """Return the finished files of log-probs, by the name of their store."""
    return {file.parent.name: file.read_bytes() for file in cache.glob("*/reference-*.npz")}


@pytest.mark.parametrize("left_out", ["chance", "position"])
def test_without_its_state_a_run_does_not_go_on_exactly(
    left_out: str, world: Path, start: Start, tmp_path: Path
) -> None:
    """The negative control: what the checkpoint holds is needed, and the comparison sees it."""
    changes = options(world, "sft", 0)
    assert start("sft", "whole", **changes).wait() == 0
    killed = start("sft", "run", trainer__callbacks=at("train_batch_start", 8), **changes)
    killed.wait()
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    saved = state(tmp_path / "run", checkpoint.name)
    if left_out == "chance":
        saved["boundary"]["chance"] = []
    else:
        saved["SFTDataModule"]["position"] = [0, 0]
    torch.save(saved, checkpoint / STATE)
    write_manifest(checkpoint)
    assert start("sft", "run", "--ckpt_path", "auto", **changes).wait() == 0
    differing = differences(state(tmp_path / "whole"), state(tmp_path / "run"))
    assert any(path.startswith("/state_dict") for path in differing)
    assert rows(tmp_path / "run") != rows(tmp_path / "whole")


@pytest.mark.faults
def test_a_run_goes_on_with_its_threads(start: Start, tmp_path: Path) -> None:
    """With others its sums may differ; its own are told of, and found in the next checkpoint."""
    killed = start("sft", "run", trainer__callbacks=at("train_batch_start", 8))
    assert killed.wait() == -signal.SIGKILL
    more = [{"class_path": "moments.Threads", "init_args": {"number": 2}}]
    resumed = start("sft", "run", "--ckpt_path", "auto", trainer__callbacks=more)
    assert resumed.wait() == 0, resumed.output
    assert "Threads: 1, as before." in resumed.output
    assert start("sft", "other", trainer__callbacks=more).wait() == 0
    noted = [state(tmp_path / name)["machine"]["threads"] for name in ("run", "other")]
    assert noted == [1, 2]


def test_a_validation_after_the_first_step_is_logged_once(start: Start, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "trainer__accumulate_grad_batches": 1,
        "trainer__val_check_interval": 1,
        "trainer__max_steps": 2,
        "checkpoint": {"every": 1, "keep": 9},
    }
    assert start("pretrain", "whole", **changes).wait() == 0
    killed = start("pretrain", "run", trainer__callbacks=at("train_batch_start", 1), **changes)
    assert killed.wait() == -signal.SIGKILL
    assert start("pretrain", "run", "--ckpt_path", "auto", **changes).wait() == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
