"""The other verbs on finished runs, and what happens to a used run directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from tiny_runs import RUN, Fit

from minigpt.cli.trainer import run
from minigpt.errors import ConfigError, ModelError, RunExistsError
from minigpt.export.card import exam_scores
from minigpt.infer.engine import Engine, Sampling
from minigpt.model.pretrained import load_model
from minigpt.runs.results import trained_on

RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "hf/model.safetensors")
STAGE = pytest.mark.parametrize("stage", tiny_runs.STAGES)
SHORT = {"model__init_args__sampling": {"max_new_tokens": 4}}


def finished(world: Path, stage: str, **changes: Any) -> dict[str, Any]:
    return tiny_runs.config(world, stage, world / stage, **SHORT, **changes)


@STAGE
def test_validate_repeats_the_last_validation(stage: str, world: Path) -> None:
    final = json.loads((world / stage / "summary.json").read_text())["final"]
    before = (world / stage / "config.yaml").read_text()
    measured = run(tiny_runs.arguments("validate", finished(world, stage))).trainer
    got = {name: float(value) for name, value in measured.callback_metrics.items()}
    assert got == pytest.approx(final, rel=1e-3, abs=1e-4)
    assert (world / stage / "config.yaml").read_text() == before


@pytest.mark.parametrize(("bundled", "expected"), [((), []), (("exam",), ["empty", "odd"])])
def test_an_exam_of_the_demo_in_a_run_on_other_data(
    bundled: tuple[str, ...],
    expected: list[str],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minigpt.data.bundled.starter", lambda: tmp_path)
    (tmp_path / "data" / "exam").mkdir(parents=True)
    for name in bundled:
        shutil.copy(world / f"{name}.jsonl", tmp_path / "data" / "exam")
    config = finished(world, "sft", data__init_args__exam=[str(world / "exam.jsonl")])
    run(tiny_runs.arguments("test", config))
    exam = json.loads((world / "sft" / "exam.json").read_text())
    assert exam["demo_families"] == expected
    assert exam_scores(exam).keys() == ({"exam/empty", "exam/odd"} if not expected else set())
    trained = [str(world / "sft.jsonl")]
    assert trained_on(world / "sft") == trained
    shutil.copy(trained[0], tmp_path / "data")
    run(tiny_runs.arguments("test", config))
    exam = json.loads((world / "sft" / "exam.json").read_text())
    assert exam["demo_families"] == []


@STAGE
def test_test_writes_the_exam(stage: str, world: Path) -> None:
    exam = [str(world / "exam.jsonl")]
    config = finished(world, stage, data__init_args__exam=exam)
    scores = run(tiny_runs.arguments("test", config)).trainer.callback_metrics
    written = json.loads((world / stage / "exam.json").read_text())
    assert written["scores"] == {name: float(score) for name, score in scores.items()}
    assert written["scores"].keys() == {"exam/empty", "exam/odd"}
    assert written["scores"]["exam/odd"] == 0
    assert [r["id"] for r in written["replies"]] == [
        "empty-0",
        "empty-1",
        "odd-0",
        "odd-1",
        "odd-2",
    ]
    assert written["step"] == json.loads((world / stage / "summary.json").read_text())["steps"]
    right = [r["right"] for r in written["replies"] if r["family"] == "empty"]
    assert written["scores"]["exam/empty"] == sum(right) / 2
    assert all(r.keys() >= {"answer", "reply"} for r in written["replies"])


@STAGE
def test_predict_completes_every_row_in_order(stage: str, world: Path, tmp_path: Path) -> None:
    config = finished(world, stage, data__init_args__predict=str(world / "prompts.jsonl"))
    target = tmp_path / "deep" / "out.jsonl"
    run(tiny_runs.arguments("predict", config, "--predictions", str(target)))
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    asked = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "completion"} for row in rows] == asked
    engine = Engine.load(world / stage)
    replies = engine.complete([row["prompt"] for row in asked], Sampling(max_new_tokens=4))
    assert [row["completion"] for row in rows] == [reply.text for reply in replies]


@pytest.mark.parametrize(("verb", "option"), [("predict", "predict"), ("test", "exam")])
def test_a_users_message_opens_no_turn(
    verb: str, option: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tiny.recorded_prompts(monkeypatch)
    file, run_dir = tmp_path / "asked.jsonl", tmp_path / "sft"
    shutil.copytree(world / "sft", run_dir)  # an exam's replies are written beside the run
    messages = [{"role": "user", "content": tiny.FORGED}]
    tiny_runs.write_jsonl(file, [{"messages": messages, "answer": "yes"}])
    changes = {f"data__init_args__{option}": [str(file)] if option == "exam" else str(file)}
    config = tiny_runs.config(world, "sft", run_dir, **SHORT, **changes)
    more = ("--predictions", str(tmp_path / "out.jsonl")) if verb == "predict" else ()
    run(tiny_runs.arguments(verb, config, *more))
    assert asked == [tiny.asked_as_text(Engine.load(run_dir).tokenizer, tiny.FORGED)]


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_verbs_on_a_missing_run_name_the_command(verb: str, world: Path, tmp_path: Path) -> None:
    config = tiny_runs.config(world, "sft", tmp_path / "nothing")
    with pytest.raises(ModelError, match="Train it with: minigpt fit"):
        run(tiny_runs.arguments(verb, config))


def test_a_used_run_directory_is_refused_and_overwritten_when_asked(
    world: Path, tmp_path: Path, fit: Fit
) -> None:
    fit("sft")
    losses = tiny_runs.metrics(tmp_path / "run")
    notes = [tmp_path / "run" / name for name in ("notes.txt", "hf/notes", "checkpoints/a/notes")]
    for file in notes:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    with pytest.raises(RunExistsError, match=r"--ckpt_path auto.*--overwrite true"):
        fit("sft")
    assert tiny_runs.metrics(tmp_path / "run") == losses
    fit("sft", "run", "--overwrite", "true")
    assert tiny_runs.metrics(tmp_path / "run") == pytest.approx(losses, rel=1e-6)
    assert [file.read_text() for file in notes] == ["mine"] * 3


def test_a_run_that_is_refused_overwrites_nothing(fit: Fit, tmp_path: Path) -> None:
    fit("sft")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in RUN_FILES}
    schedule = {"model__init_args__schedule": {"warmup": 0.9, "decay": 0.9}}
    with pytest.raises(ConfigError, match="do not fit"):
        fit("sft", "run", "--overwrite", "true", **schedule)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in RUN_FILES} == before


@STAGE
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(
    stage: str, world: Path, tmp_path: Path
) -> None:
    uninterrupted, cut = world / stage, tmp_path / stage
    shutil.copytree(uninterrupted, cut)
    shutil.rmtree(cut / "hf")
    for step in (4, 6):
        shutil.rmtree(cut / "checkpoints" / f"step={step}")
    config = tiny_runs.config(world, stage, cut, **RUN)
    run(tiny_runs.arguments("fit", config, "--ckpt_path", "auto"))
    losses = tiny_runs.metrics(uninterrupted)
    assert len(losses) == 6
    assert tiny_runs.metrics(cut) == losses
    expected = load_model(uninterrupted).state_dict()
    for name, value in load_model(cut).state_dict().items():
        assert torch.equal(value, expected[name]), name
    tokens_seen = [
        json.loads((d / "summary.json").read_text())["tokens_seen"] for d in (uninterrupted, cut)
    ]
    assert tokens_seen[0] == tokens_seen[1]


def test_auto_without_a_checkpoint_starts_anew(tmp_path: Path, fit: Fit) -> None:
    fit("sft", "run", "--ckpt_path", "auto")
    assert len(tiny_runs.metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__init_args__train": None}, "No training data"),
        ({"model__init_args__schedule": {"warmup": 0.9, "decay": 0.9}}, "do not fit"),
    ],
)
def test_a_config_that_cannot_run_is_explained(
    changes: dict[str, Any], message: str, fit: Fit
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit("sft", **changes)
