"""The pipeline's own pieces, with stages that do nothing."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minigpt.errors import TrainingError
from minigpt.files import write_manifest

ROOT = Path(__file__).resolve().parents[2]
RECORDS: dict[str, dict[str, Any]] = {
    "tokenizer": {"chars_per_token": 2.5},
    "pretrain": {"val_bpb": 1.5, "val_bpb_untrained": 6.5, "useful_tokens_per_s": 900.0},
    "sft": {
        "exam_before": 0.01,
        "exam_after": 0.9,
        "families": {"asked_new_wording": 0.99, "never_asked": 0.81, "skills": 0.9},
    },
    "dpo": {
        "reward_accuracy": 0.97,
        "preferred_style_before": 0.5,
        "preferred_style_after": 0.95,
        "right_advice_before": 0.4,
        "right_advice_after": 0.9,
        "exam_after": 0.89,
    },
    "reward": {"accuracy": 0.98, "accuracy_by_length": 0.7, "accuracy_by_words": 0.9},
    "grpo": {
        "skills_before": 0.2,
        "skills_after": 0.93,
        "families_before": {"reverse_digits": 0.25, "sort_digits": 0.15},
        "families_after": {"reverse_digits": 0.96, "sort_digits": 0.9},
        "exam_after": 0.87,
        "preferred_style_after": 0.94,
    },
    "lora": {
        "domain_before": 0.05,
        "domain_after": 0.92,
        "exam_after": 0.88,
        "merged_equals_adapter": True,
        "adapter_off_equals_base": True,
    },
}


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, in a repository of its own."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module("pipeline")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.fixture
def run(pipeline: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run it with stub stages; return its status and the stages that ran."""

    def start(
        *args: str, failing: str = "", error: type[BaseException] = TrainingError
    ) -> tuple[int, list[str]]:
        ran: list[str] = []

        def stub(name: str) -> Callable[[str], dict[str, Any]]:
            def stage(configs: str) -> dict[str, Any]:
                if name == failing:
                    raise error("it broke")
                ran.append(name)
                (pipeline.OUT / name).mkdir(parents=True, exist_ok=True)
                (pipeline.OUT / name / "made").write_text(configs)
                return dict(RECORDS[name])

            return stage

        monkeypatch.setattr(pipeline, "STAGES", {name: stub(name) for name in RECORDS})
        monkeypatch.setattr(sys, "argv", ["pipeline.py", *args])
        return pipeline.main(), ran

    return start


def test_report(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == (0, list(RECORDS))
    report = json.loads((tmp_path / "outputs/pipeline/report.json").read_text())
    assert report["stages"] == RECORDS
    assert report["seconds"].keys() == {*RECORDS, "total"}
    assert all(isinstance(value, float) for value in report["seconds"].values())
    assert report["machine"].keys() >= {"processor", "threads", "python", "torch", "system"}
    text = (tmp_path / "outputs/pipeline/report.md").read_text(encoding="utf-8")
    assert text.removeprefix("# MiniGPT report\n\n") in capsys.readouterr().out
    page = (tmp_path / "outputs/pipeline/report.html").read_text(encoding="utf-8")
    assert "<h2>Pipeline</h2>" in page
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    table = [tuple(row[1:-1]) for row in rows if len(row) == 6]
    assert table == [
        ("stage", "exam", "before", "after"),
        ("---", "---", "---", "---"),
        ("pretrain", "bits per byte, held out", "6.500", "1.500"),
        ("SFT", "general exam", "1.0%", "90.0%"),
        ("", "asked new wording", "", "99.0%"),
        ("", "never asked", "", "81.0%"),
        ("", "skills", "", "90.0%"),
        ("DPO", "reward accuracy, held out", "", "97.0%"),
        ("", "preferred style", "50.0%", "95.0%"),
        ("", "with the right tip", "40.0%", "90.0%"),
        ("", "general exam", "90.0%", "89.0%"),
        ("reward model", "accuracy, held-out pairs", "", "98.0%"),
        ("", "by length alone", "", "70.0%"),
        ("", "by words alone", "", "90.0%"),
        ("GRPO", "rewarded skills", "20.0%", "93.0%"),
        ("", "reverse digits", "25.0%", "96.0%"),
        ("", "sort digits", "15.0%", "90.0%"),
        ("", "general exam", "89.0%", "87.0%"),
        ("", "preferred style", "95.0%", "94.0%"),
        ("LoRA", "domain exam", "5.0%", "92.0%"),
        ("", "general exam", "90.0%", "88.0%"),
    ]


def test_intervals_come_from_the_number_of_items(run: Any, tmp_path: Path) -> None:
    (tmp_path / "data/exam").mkdir(parents=True)
    (tmp_path / "data/exam/never_asked.jsonl").write_text("{}\n" * 100)
    run()
    report = json.loads((tmp_path / "outputs/pipeline/report.json").read_text())
    assert report["items"] == {"never_asked": 100}
    text = (tmp_path / "outputs/pipeline/report.md").read_text(encoding="utf-8")
    assert "|   never asked |  | 81.0% (72.2–87.5) |" in text
    assert "<figcaption>general exam" in (tmp_path / "outputs/pipeline/report.html").read_text()


def test_the_seconds_are_those_of_the_run_that_made_each_stage(run: Any, tmp_path: Path) -> None:
    run()
    record = tmp_path / "outputs/pipeline/pretrain.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "seconds": 100.0}))
    assert run() == (0, [])
    seconds = json.loads((tmp_path / "outputs/pipeline/report.json").read_text())["seconds"]
    assert seconds["pretrain"] == 100.0
    assert seconds["total"] == pytest.approx(sum(seconds[name] for name in RECORDS), abs=0.1)


@pytest.mark.parametrize("failing", RECORDS)
def test_it_goes_on_after_the_last_finished_stage(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    names = list(RECORDS)
    index = names.index(failing)
    assert run(failing=failing) == (2, names[:index])
    assert capsys.readouterr().err.endswith("pipeline: it broke\n")
    assert not (tmp_path / "outputs/pipeline/report.json").exists()
    assert run() == (0, names[index:])
    output = capsys.readouterr().out
    assert [name for name in names if f"[{name}] done before" in output] == names[:index]


@pytest.mark.parametrize("lost", RECORDS)
def test_what_follows_a_stage_that_is_made_anew_is_made_anew(
    run: Any, tmp_path: Path, lost: str
) -> None:
    run()
    (tmp_path / f"outputs/pipeline/{lost}.json").unlink()
    for name in RECORDS:
        (tmp_path / f"outputs/{name}/checkpoints").mkdir()
    names = list(RECORDS)
    assert run() == (0, names[names.index(lost) :])
    remaining = {path.parent.name for path in tmp_path.glob("outputs/*/checkpoints")}
    assert remaining == set(names[: names.index(lost) + 1])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_ctrl_c(run: Any, capsys: pytest.CaptureFixture[str], stop: type[BaseException]) -> None:
    assert run(failing="sft", error=stop) == (130, ["tokenizer", "pretrain"])
    assert "interrupted" in capsys.readouterr().err
    assert run()[1] == ["sft", "dpo", "reward", "grpo", "lora"]


def test_force_starts_over(run: Any, tmp_path: Path) -> None:
    run()
    (tmp_path / "outputs/mine").mkdir()
    (tmp_path / "outputs/sft/old").touch()
    assert run("--force") == (0, list(RECORDS))
    assert not (tmp_path / "outputs/sft/old").exists()
    assert (tmp_path / "outputs/mine").is_dir()


def test_other_configs(run: Any, tmp_path: Path) -> None:
    run("--configs", "mine")
    assert {(tmp_path / "outputs" / name / "made").read_text() for name in RECORDS} == {"mine"}


def test_the_real_stages_are_those_of_the_report(pipeline: ModuleType) -> None:
    assert list(pipeline.STAGES) == list(RECORDS)


@pytest.mark.parametrize(
    ("files", "options"),
    [([], ["--overwrite", "true"]), (["checkpoints/step=5/state.pt"], ["--ckpt_path", "auto"])],
)
def test_a_stage_that_was_cut_off_is_resumed(
    pipeline: ModuleType, monkeypatch: pytest.MonkeyPatch, files: list[str], options: list[str]
) -> None:
    from minigpt.cli import trainer as cli

    calls: list[list[str]] = []
    monkeypatch.setattr(cli, "run", calls.append)
    for file in [*files, "summary.json"]:
        path = pipeline.OUT / "sft" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        if file != "summary.json":
            write_manifest(path.parent)
    assert pipeline.fit("sft", "configs") == {}
    config = ["--config", "configs/sft.yaml", "--run_dir", "outputs/sft"]
    assert calls == [["fit", *config, *options]]
