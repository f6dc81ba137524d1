"""What the tests of the benchmarks share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_runs

from minigpt.__main__ import main

sys.path.append(str(Path(__file__).resolve().parents[3] / "scripts" / "bench"))


class Outcome(NamedTuple):
    """What a user sees of a command."""

    status: int
    out: str
    err: str


Bench = Callable[..., Outcome]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run a benchmark in this process: `bench("train", "--stage", "sft")`."""
    from measure import run

    def start(name: str, *args: object) -> Outcome:
        capsys.readouterr()
        status = run(importlib.import_module(name).main, [str(arg) for arg in args])
        return Outcome(status, *capsys.readouterr())

    return start


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer and finished runs of two stages: `pretrain` and `sft`."""
    root = tiny_runs.write_data(tmp_path_factory.mktemp("trained"))
    for stage in ("pretrain", "sft"):
        config = tiny_runs.config(root, stage, root / stage)
        assert main(tiny_runs.arguments("fit", config)) == 0
    return root
