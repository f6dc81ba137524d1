"""The sweep: every combination once, the best first, what failed last."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

ROOT = Path(__file__).resolve().parents[2]
LR, NAME = "model.init_args.optimizer.lr", "model.init_args.optimizer.name"


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("sweep")


def test_every_combination_has_a_name(sweep: Any) -> None:
    choices = sweep.grid([f"{NAME}=adamw,muon", f"{LR}=1e-3,1e-2"])
    names = [f"name={name} lr={lr}" for name in ("adamw", "muon") for lr in ("1e-3", "1e-2")]
    assert [sweep.label(choice) for choice in choices] == names


def test_runs_are_made_once_and_listed_best_first(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_runs.config(tiny_runs.write_data(tmp_path), "pretrain", tmp_path / "unused")
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    out = tmp_path / "out"
    again = out / "lr=1e-9"  # as if made before
    again.mkdir(parents=True)
    (again / "summary.json").write_text(json.dumps({"final": {"val/loss": 100.0}}))
    words = ["--config", str(tmp_path / "config.yaml"), "--grid", f"{LR}=1e-9,-1,1e-2"]
    more = [
        "--output_dir",
        str(out),
        "--trainer.max_steps",
        "2",
        "--trainer.val_check_interval",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words, *more])
    sweep.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["val/loss", "lr=1e-2", "lr=1e-9", "lr=-1"]
    assert [line.split()[0] for line in lines[2:]] == ["100.0000", "inf"]
    best = json.loads((out / "lr=1e-2" / "summary.json").read_text())
    assert (best["steps"], f"{best['final']['val/loss']:.4f}") == (2, lines[1].split()[0])

    argv = [*sys.argv, "--metric", "val/nothing"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=r"no val/nothing. It has val/loss"):
        sweep.main()

    monkeypatch.setattr(sys, "argv", argv[:-2])

    def stopped(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 75)

    monkeypatch.setattr(subprocess, "run", stopped)
    with pytest.raises(SystemExit, match="75"):  # of what had failed, and is tried again
        sweep.main()
