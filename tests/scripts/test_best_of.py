"""What reward models of several seeds choose among drawn replies."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Drawn(NamedTuple):
    text: str
    ids: list[int]
    ended_by: int | None = 1


def test_the_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("best_of")
    from minigpt.cli import trainer
    from minigpt.evaluate import exam, reward_model
    from minigpt.infer.engine import Engine

    items = exam.load_items(ROOT / "data/exam/style.jsonl", "exam")[:2]
    right, wrong = items[0].answer, "no such words"
    first = [Drawn(wrong, [5]), Drawn(right, [5, 6]), Drawn(right, [5, 6, 7], None)]
    second = [Drawn(wrong, [5]), Drawn(wrong, [5, 6]), Drawn(wrong, [5, 6, 7])]
    started: list[list[str]] = []

    def run(arguments: list[str]) -> None:
        started.append(arguments)
        run_dir = Path(dict(a.split("=", 1) for a in arguments if "=" in a)["--run_dir"])
        run_dir.mkdir()
        (run_dir / "summary.json").touch()

    def scores_of(run_dir: Path, *_: Any) -> list[list[float]]:
        return [[0.0, 1.0, 0.5] if run_dir.name == "seed-3" else [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]

    monkeypatch.setattr(trainer, "run", run)
    monkeypatch.setattr(Engine, "load", lambda _: None)
    monkeypatch.setattr(exam, "load_items", lambda *_: items)
    monkeypatch.setattr(reward_model, "draw", lambda *_: [first, second])
    monkeypatch.setattr(script, "scores_of", scores_of)
    options = ["--seeds", "3,4", "--count", "3", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["best_of.py", *options, "--trainer.max_steps", "9"])
    script.main()
    script.main()  # which finds the runs
    assert [arguments[-2:] for arguments in started] == [["--trainer.max_steps", "9"]] * 2
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.rsplit(maxsplit=1) for line in lines] == [
        ["all that are drawn", "16.7"],
        ["the shortest of 3", "0.0"],
        ["the best of 3, seed 3", "50.0"],
        ["the best of 3, seed 4", "0.0"],
    ]
