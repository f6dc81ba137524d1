"""The table of skills: each family alone, from one model, with several seeds."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("rl_skills")
    from minigpt.cli import trainer

    started: list[list[str]] = []

    def run(arguments: list[str]) -> None:
        started.append(arguments)
        options = dict(a.split("=", 1) for a in arguments if "=" in a)
        run_dir = Path(options["--run_dir"])
        run_dir.mkdir()
        rows = Path(options["--data.init_args.train"]).read_text().splitlines()
        assert {json.loads(line)["family"] for line in rows} == {"sort_digits"}
        values = {"val/accuracy": 0.2, "val/pass_at_1": 0.1, "val/pass_at_8": 0.4, "val/cut_off": 0}
        summary = {"before": values, "final": {**values, "val/accuracy": 0.9, "val/pass_at_8": 1.0}}
        times = {"tokens_seen": 900, "useful_tokens_per_s": 9.0}
        (run_dir / "summary.json").write_text(json.dumps(summary | times))

    def general(model: Any) -> tuple[float, float]:
        return (0.98, 0.95) if str(model) == "outputs/dpo" else (0.96, 0.94)

    monkeypatch.setattr(trainer, "run", run)
    monkeypatch.setattr(script, "exam_and_style", general)
    options = ["--families", "sort_digits", "--seeds", "0,1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rl_skills.py", *options, "--trainer.max_steps", "9"])
    script.main()
    script.main()  # which finds the runs
    assert len(started) == 2
    assert all(arguments[-2:] == ["--trainer.max_steps", "9"] for arguments in started)
    (line,) = {x for x in capsys.readouterr().out.splitlines() if x.startswith("sort_digits, 1")}
    numbers = [float(word) for word in line.replace("→", " ").split()[2:]]
    assert numbers == [20.0, 90.0, 40.0, 100.0, 0.0, 0.0, 98.0, 96.0, 95.0, 94.0, 100.0]
