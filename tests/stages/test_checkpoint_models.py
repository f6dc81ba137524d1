"""Checkpoints are models: verbs take them, the best stays, and a run says which it exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import Fit

from minigpt.__main__ import main
from minigpt.cli.options import run_name
from minigpt.cli.serve import paths_by_name
from minigpt.cli.trainer import run
from minigpt.errors import ConfigError, ModelError
from minigpt.export.card import stages
from minigpt.infer.engine import Engine, Sampling
from minigpt.model.pretrained import find_model, load_model, tokenizer_source
from minigpt.model.restore import load_plain, newest_first
from minigpt.runs.checkpoints import STATE, CheckpointOptions

# A rate at which the held-out loss falls at first, and rises later.
RISING: dict[str, Any] = {
    "trainer__max_steps": 6,
    "trainer__val_check_interval": 1,
    "model__init_args__optimizer": {"lr": 0.3},
    "model__init_args__schedule": {"warmup": 3, "decay": 0},
    "checkpoint": {"every": 4, "keep": 1, "best": "val/loss"},
}


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_plain(checkpoint / STATE)["state_dict"]
    return {name.removeprefix("lm.hf."): weight for name, weight in weights.items()}


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_each_checkpoint_is_the_model_that_its_state_holds(stage: str, world: Path) -> None:
    for checkpoint in newest_first(world / stage):
        saved = saved_weights(checkpoint)
        location = find_model(checkpoint)
        if stage == "lora":
            loaded = load_file(Path(location) / "adapter_model.safetensors")
            names = {name.replace(".default.", "."): weight for name, weight in saved.items()}
            assert loaded.keys() == {f"base_model.model.{name}" for name in names}
            assert all(torch.equal(loaded[f"base_model.model.{n}"], w) for n, w in names.items())
        else:
            loaded = load_model(checkpoint).state_dict()
            assert all(torch.equal(loaded[name], weight) for name, weight in saved.items())


def test_a_checkpoint_brings_tokenizer_template_and_ends(world: Path) -> None:
    checkpoint = world / "sft" / "checkpoints" / "step=4"
    at_step, at_end = Engine.load(checkpoint), Engine.load(world / "sft")
    assert tokenizer_source(checkpoint) == checkpoint / "hf"
    assert at_step.tokenizer.chat_template == at_end.tokenizer.chat_template is not None
    assert at_step.tokenizer.get_vocab() == at_end.tokenizer.get_vocab()
    assert at_step.ends == at_end.ends


@pytest.mark.parametrize("stage", ["sft", "lora"])
def test_verbs_take_checkpoints(stage: str, world: Path, tmp_path: Path) -> None:
    last = str(world / stage / "checkpoints" / "last")
    generate = ["generate", "--model", last, "--prompt", "the cat", "--max_new_tokens", "2"]
    assert main(generate) == 0
    texts = str(world / "pretrain_val.jsonl")
    scores = tmp_path / "scores.json"
    evaluate = ["evaluate", "--model", last, str(world / stage), "--text", texts]
    assert main([*evaluate, "--json", str(scores)]) == 0
    first, second = json.loads(scores.read_text())["models"].values()
    assert first == second  # the last checkpoint is the run's model
    step = str(world / stage / "checkpoints" / "step=4")
    assert main(["export", "hf", "--model", step, "--output_dir", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {stage}-step4" in card
    assert "checkpoint, step 4" in card


def test_a_chat_with_a_checkpoint(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(EOFError))
    assert main(["chat", "--model", str(world / "sft" / "checkpoints" / "last")]) == 0


def test_a_run_starts_from_a_checkpoint(fit: Fit, world: Path, tmp_path: Path) -> None:
    start = world / "pretrain" / "checkpoints" / "step=2"
    fit("lora", model__init_args__init_from=str(start), trainer__max_steps=2)
    adapter = json.loads((tmp_path / "run" / "hf" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(start.resolve() / "hf")
    assert Engine.load(tmp_path / "run").complete(["the"], Sampling(max_new_tokens=2))
    first, second = stages(tmp_path / "run")
    assert first[0] == "pretrain"
    assert first[2] == 2
    assert first[6] == "checkpoint, step 2"
    assert second[6:] == ["last, step 2", "max_steps"]


def test_names_of_models_that_are_checkpoints(world: Path) -> None:
    checkpoint = world / "sft" / "checkpoints" / "step=4"
    assert run_name(checkpoint) == run_name(checkpoint / "hf") == "sft-step4"
    assert paths_by_name([str(checkpoint), f"{checkpoint.parent}/last", f"x={checkpoint}"]) == {
        "sft-step4": str(checkpoint),
        "sft-last": f"{checkpoint.parent}/last",
        "x": str(checkpoint),
    }
    assert paths_by_name(["gone/checkpoints/step=7"]) == {"gone-step7": "gone/checkpoints/step=7"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("step=3", "There is no checkpoint .* with a model: step=6, step=4"),
        ("step=2", "holds no model .* With a model: step=6, step=4"),
        ("best", "has no best checkpoint: .*checkpoint.best names a metric"),
    ],
)
def test_checkpoints_that_are_no_model(
    name: str, message: str, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "sft" / "checkpoints", tmp_path / "sft" / "checkpoints")
    shutil.rmtree(tmp_path / "sft" / "checkpoints" / "step=2" / "hf")
    with pytest.raises(ModelError, match=message):
        find_model(tmp_path / "sft" / "checkpoints" / name)
    with pytest.raises(ModelError, match=r"has not ended.*sft/checkpoints/last"):
        find_model(tmp_path / "sft")


def test_weights_that_are_cut_off_are_refused(world: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "sft" / "checkpoints" / "step=4"
    shutil.copytree(world / "sft" / "checkpoints" / "step=4", checkpoint)
    weights = checkpoint / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(ModelError, match="step=4/hf cannot be loaded"):
        load_model(checkpoint)


def test_a_damaged_note_of_the_best(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "sft" / "checkpoints", tmp_path / "sft" / "checkpoints")
    (tmp_path / "sft" / "checkpoints" / "best.json").write_text("{")
    with pytest.raises(ModelError, match=r"best.json is damaged.* Name a checkpoint by its step"):
        find_model(tmp_path / "sft" / "checkpoints" / "best")


def losses(run_dir: Path) -> dict[int, float]:
    """The held-out loss of each step after which the run validated."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    rows = [(row["step"] + 1, row["val/loss"]) for row in lines if "val/loss" in row]
    return dict(rows[1:])  # the first is that before the first step


def summary_of(run_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def same_weights(first: Path, second: Path) -> bool:
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("exported", ["last", "best"])
def test_the_best_checkpoint_stays(exported: str, fit: Fit, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit("sft", "run", "--checkpoint.export", exported, **RISING)
    measured = losses(run_dir)
    best = min(measured, key=lambda step: measured[step])
    assert best not in (4, 6), "the best must be one that is saved for being it"
    checkpoints = run_dir / "checkpoints"
    assert {path.name for path in newest_first(run_dir)} == {"step=6", f"step={best}"}
    assert find_model(checkpoints / "best") == checkpoints / f"step={best}" / "hf"
    summary = summary_of(run_dir)
    assert (summary["final_step"], summary["final"]["val/loss"]) == (6, measured[6])
    assert (summary["best"]["step"], summary["best"]["metric"]) == (best, "val/loss")
    assert summary["best"]["held_out"]["val/loss"] == measured[best]
    step = best if exported == "best" else 6
    assert same_weights(run_dir / "hf", checkpoints / f"step={step}" / "hf")
    name = "best by val/loss" if exported == "best" else "last"
    assert summary["exported"]["weights"] == name
    assert summary["exported"]["step"] == step
    ((*_, after, weights, ended),) = stages(run_dir)[-1:]
    assert (after, weights, ended) == (
        f"loss {measured[step]:.4g}",
        f"{name}, step {step}",
        "max_steps",
    )


def test_a_run_that_goes_on_keeps_the_same_best(fit: Fit, tmp_path: Path) -> None:
    each_step = {**RISING, "checkpoint": {"every": 1, "keep": "all", "best": "val/loss"}}
    fit("sft", "whole", **each_step)
    expected = json.loads((tmp_path / "whole" / "checkpoints" / "best.json").read_text())
    for step in (1, 3, 5):
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        for path in newest_first(tmp_path / "run"):
            if int(path.name.removeprefix("step=")) > step:
                shutil.rmtree(path)
        fit("sft", "run", "--ckpt_path", "auto", **each_step)
        best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
        assert best == expected
        assert summary_of(tmp_path / "run")["best"] == summary_of(tmp_path / "whole")["best"]
        names = [path.name for path in newest_first(tmp_path / "run")]
        assert names == [f"step={n}" for n in range(6, 0, -1)]
        shutil.rmtree(tmp_path / "run")


def test_a_best_that_is_gone_is_forgotten(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit("sft", "run", **RISING)
    best = find_model(tmp_path / "run" / "checkpoints" / "best")
    shutil.rmtree(Path(best).parent)
    fit("sft", "run", "--ckpt_path", "auto", **RISING | {"trainer__max_steps": 7})
    assert "the best checkpoint by val/loss, is gone" in caplog.text
    assert summary_of(tmp_path / "run")["best"]["step"] in (6, 7)


def test_another_metric_begins_anew_and_the_greatest_may_be_best(fit: Fit, tmp_path: Path) -> None:
    options = {"every": 2, "keep": 3}
    by_loss = {"checkpoint": {**options, "best": "val/loss"}, "trainer__val_check_interval": 2}
    fit("dpo", "run", **by_loss, trainer__max_steps=2)
    chosen = {**options, "best": "val/rewards/chosen", "mode": "max"}
    changes = {"checkpoint": chosen, "trainer__val_check_interval": 2, "trainer__max_steps": 6}
    fit("dpo", "run", "--ckpt_path", "auto", **changes)
    values = tiny_runs.metrics(tmp_path / "run", "val/rewards/chosen")[
        1:
    ]  # step 2 is validated anew
    best = summary_of(tmp_path / "run")["best"]
    assert best["metric"] == "val/rewards/chosen"
    assert best["held_out"]["val/rewards/chosen"] == max(values)


def test_a_model_that_was_not_written_is_written_when_the_run_goes_on(
    fit: Fit, tmp_path: Path
) -> None:
    fit("sft", trainer__max_steps=2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step=2"
    shutil.rmtree(checkpoint / "hf")
    fit("sft", "run", "--ckpt_path", "auto", trainer__max_steps=3)
    weights, saved = load_model(checkpoint).state_dict(), saved_weights(checkpoint)
    assert all(torch.equal(weights[name], weight) for name, weight in saved.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export": "best"}, "checkpoint.export: best needs a metric"),
        ({"mode": "min"}, "checkpoint.mode: min needs a metric"),
        ({"best": "val/rewards/chosen"}, "Set checkpoint.mode to min or max"),
        ({"best": "val/los", "mode": "min"}, "measures no val/los, but .*val/loss"),
        ({"keep": 0}, "checkpoint.keep must be at least 1, but is 0"),
    ],
)
def test_options_that_make_no_best(options: dict[str, Any], message: str, fit: Fit) -> None:
    with pytest.raises(ConfigError, match=message):
        fit("sft", checkpoint=options)


def test_the_best_needs_held_out_data(fit: Fit) -> None:
    nothing = {"data__init_args__val": None, "data__init_args__val_share": 0.0}
    with pytest.raises(ConfigError, match="held-out data, and the run has none"):
        fit("sft", checkpoint={"best": "val/loss"}, **nothing)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("val/loss", -1), ("val/bits_per_byte", -1), ("val/rewards/accuracy", 1)],
)
def test_which_value_of_a_metric_is_best(metric: str, direction: int) -> None:
    assert CheckpointOptions(best=metric).direction == direction
    assert CheckpointOptions(best=metric, mode="max").direction == 1


EARLY = {
    "class_path": "EarlyStopping",
    "init_args": {"monitor": "val/loss", "patience": 0, "min_delta": 1000.0},
}


@pytest.mark.parametrize(
    ("changes", "ended", "steps"),
    [
        ({"trainer__max_steps": 2}, "max_steps", 2),
        ({"trainer__max_epochs": 1, "trainer__limit_train_batches": 2}, "max_epochs", 2),
        ({"trainer__max_time": "00:00:00:00"}, "max_time", 0),
        ({"trainer__callbacks": [EARLY], "validate__every": 1}, "early stopping: Monitored", 2),
    ],
)
def test_a_run_says_why_it_ended_and_measures_its_last_weights(
    changes: dict[str, Any], ended: str, steps: int, fit: Fit, tmp_path: Path
) -> None:
    fit("sft", trainer__max_steps=changes.pop("trainer__max_steps", 9), **changes)
    summary = summary_of(tmp_path / "run")
    assert summary["ended"].startswith(ended)
    assert (summary["steps"], summary["final_step"]) == (steps, steps)
    assert summary["final"]["val/loss"] == tiny_runs.metrics(tmp_path / "run", "val/loss")[-1]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("finished", summary["ended"])


def test_validation_of_a_run_is_that_of_its_last_weights(fit: Fit, tmp_path: Path) -> None:
    fit("sft", trainer__max_steps=3, trainer__val_check_interval=2)
    validated = run(["validate", "--config", str(tmp_path / "run" / "config.yaml")])
    loss = float(validated.trainer.callback_metrics["val/loss"])
    assert loss == pytest.approx(summary_of(tmp_path / "run")["final"]["val/loss"], rel=1e-5)
