"""Real processes that tests kill, and a small world that they train in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from runs import OPTIONS, Running, Start, Starter  # type: ignore[import-not-found]

from minigpt.cli.trainer import run


@pytest.fixture(scope="session")
def starters() -> Iterator[list[Starter]]:
    """All that were made: a second one when the first has died."""
    all_starters: list[Starter] = []
    yield all_starters
    for starter in all_starters:
        starter.close()


@pytest.fixture
def starter(starters: list[Starter]) -> Iterator[Starter]:
    """The process that forks runs; what a test leaves running is killed, and fails it."""
    if not starters or not starters[-1].lives():
        starters.append(Starter())
    yield starters[-1]
    left = starters[-1].end_runs()
    assert not left, f"left running: {', '.join(left)}"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer, finished runs `pretrain` and `sft`, and `gpt2`, a model with dropout."""
    torch.set_num_threads(1)
    root = tiny_runs.write_data(tmp_path_factory.mktemp("world"))
    for stage in ("pretrain", "sft"):
        run(tiny_runs.arguments("fit", tiny_runs.config(root, stage, root / stage)))
    model, tokenizer = (
        tiny.model("gpt2", resid_pdrop=0.2),
        tiny_runs.tokenizers.load(root / "sft" / "hf"),
    )
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(str(root / "gpt2"))
    tokenizer.save_pretrained(str(root / "gpt2"))
    return root


@pytest.fixture
def start(starter: Starter, world: Path, tmp_path: Path) -> Start:
    """Start a stage: `start("sft", "name of the run", "--more", ..., dotted__path=value)`."""

    def begin(stage: str, name: str = "run", *more: str, **changes: Any) -> Running:
        of_process = ("env", "limits", "plain_user", "nohup")
        process = {key: changes.pop(key) for key in of_process if key in changes}
        config = tiny_runs.config(world, stage, tmp_path / name, **{**OPTIONS, **changes})
        args = tiny_runs.arguments("fit", config, *more)
        return starter.start(args, tmp_path / f"{name}.log", **process)

    return begin
