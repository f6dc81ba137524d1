"""How long a run is: its schedule, a run made longer, its last weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import Fit

from minigpt.data.datamodule import PackedDataset
from minigpt.errors import ConfigError
from minigpt.model.packed_lm import PackedLM
from minigpt.model.pretrained import load_model

SCHEDULE = {"name": "cosine", "warmup": 0, "floor": 0.1}
EPOCHS: dict[str, Any] = {
    "trainer__max_steps": -1,
    "trainer__max_epochs": 3,
    "model__init_args__schedule": SCHEDULE,
    "data__init_args__tokens_per_batch": 64,
}


def lines(cli: Any) -> list[list[int]]:
    """The rows of each micro-batch of three epochs."""
    data = cli.datamodule
    sets = (PackedDataset(data.order, data.train_subsets, epoch, 0, 0, 1) for epoch in range(3))
    return [[line for _, line in batch.sources] for one in sets for batch in one]


@pytest.mark.parametrize("name", ["limit_train_batches", "overfit_batches"])
@pytest.mark.parametrize(("accumulate", "steps"), [(1, 15), (2, 9)])
def test_short_epochs_end_at_the_floor(
    name: str, accumulate: int, steps: int, fit: Fit, tmp_path: Path
) -> None:
    changes = {**EPOCHS, f"trainer__{name}": 5, "trainer__accumulate_grad_batches": accumulate}
    cli = fit("sft", **changes)
    assert cli.trainer.global_step == steps
    rates = tiny_runs.metrics(tmp_path / "run", "lr")
    assert len(rates) == steps
    assert rates[-1] < 0.002  # of 0.01; the next would be the floor of 0.001
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)
    assert cli.datamodule.position == (3, 0)
    batches = lines(cli)
    assert len(batches) == 15
    assert (batches[:5] == batches[5:10]) == (name == "overfit_batches")


def test_epochs_given_after_steps_replace_them(fit: Fit) -> None:
    more = ("--trainer.max_epochs", "1")
    cli = fit("sft", "run", *more, trainer__max_steps=100, data__init_args__tokens_per_batch=64)
    assert cli.trainer.global_step == cli.datamodule.optimizer_steps(1, 1) < 100
    assert cli.datamodule.position == (1, 0)


def validated(run_dir: Path) -> list[int]:
    """The steps after which the run validated, but for the one before the first."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["step"] + 1 for row in lines if "val/loss" in row][1:]


def test_validation_every_some_steps(fit: Fit, tmp_path: Path) -> None:
    changes = {"trainer__accumulate_grad_batches": 2, "data__init_args__tokens_per_batch": 64}
    fit("sft", "run", "--validate.every", "2", trainer__max_steps=5, **changes)
    assert validated(tmp_path / "run") == [2, 4, 5]


def test_validation_at_the_end_of_each_epoch(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = EPOCHS | {"trainer__limit_train_batches": 1, "trainer__val_check_interval": 3}
    with caplog.at_level("INFO"):
        fit("sft", "run", "--validate.every", "epoch", **changes)
    assert validated(tmp_path / "run") == [1, 2, 3]
    assert "tokens, at the end of each epoch" in caplog.text
    assert "Validation takes longer than training" in caplog.text


def test_validation_by_steps_and_by_batches_exclude_each_other(fit: Fit) -> None:
    with pytest.raises(ConfigError, match=r"validate.every is 2 and trainer.val_check_interval 3"):
        fit("sft", trainer__val_check_interval=3, validate__every=2)


@pytest.mark.parametrize(
    ("tokens", "accumulate", "level"),
    [(128, 2, None), (135, 2, "INFO"), (150, 2, "WARNING"), (185, 3, "INFO"), (1, 1, "WARNING")],
)
def test_tokens_of_a_step_decide_the_accumulation(
    tokens: int, accumulate: int, level: str | None, fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"data__init_args__tokens_per_batch": 64, "data__init_args__tokens_per_step": tokens}
    with caplog.at_level("INFO"):
        cli = fit("sft", trainer__max_steps=2, **changes)
    assert cli.trainer.accumulate_grad_batches == accumulate
    assert cli.datamodule.position == (0, 2 * accumulate)
    rounded = f"{accumulate * 64:,} instead of {tokens:,}, as {accumulate} micro-batches"
    levels = [line.levelname for line in caplog.records if rounded in line.getMessage()]
    assert levels == ([] if level is None else [level])


def test_tokens_of_a_step_are_shared_by_the_processes(fit: Fit) -> None:
    cli = fit("sft", data__init_args__tokens_per_step=2048, trainer__max_steps=2)
    assert [cli.datamodule.accumulation(processes) for processes in (1, 2, 8)] == [8, 4, 1]


def test_tokens_of_a_step_and_accumulated_batches_exclude_each_other(fit: Fit) -> None:
    changes = {"data__init_args__tokens_per_step": 512, "trainer__accumulate_grad_batches": 2}
    with pytest.raises(ConfigError, match=r"leave out trainer.accumulate_grad_batches, which is 2"):
        fit("sft", **changes)


@pytest.mark.parametrize("name", ["limit_train_batches", "limit_val_batches", "overfit_batches"])
def test_a_share_of_the_batches_is_refused(name: str, fit: Fit) -> None:
    with pytest.raises(ConfigError, match=f"trainer.{name} must be a whole number of batches"):
        fit("sft", **{f"trainer__{name}": 0.5})


def test_a_share_of_an_epoch_between_validations_is_refused(fit: Fit) -> None:
    with pytest.raises(ConfigError, match="val_check_interval must be a whole number of batches"):
        fit("sft", trainer__val_check_interval=0.5, trainer__check_val_every_n_epoch=1)


def test_a_validation_at_the_end_of_each_epoch(fit: Fit, tmp_path: Path) -> None:
    changes = {"trainer__check_val_every_n_epoch": 1, "trainer__limit_train_batches": 2}
    fit("sft", trainer__max_steps=-1, trainer__max_epochs=3, **changes)
    assert len(tiny_runs.metrics(tmp_path / "run", "val/loss")) == 1 + 3  # and before the first


def test_a_short_epoch_goes_on_where_it_was(fit: Fit, tmp_path: Path) -> None:
    changes = {**EPOCHS, "trainer__limit_train_batches": 5, "checkpoint": {"every": 1, "keep": 99}}
    fit("sft", "whole", **changes)
    middle = tmp_path / "whole" / "checkpoints" / "step=7"
    fit("sft", "resumed", "--ckpt_path", str(middle), **changes)
    uninterrupted, resumed = (tiny_runs.metrics(tmp_path / name) for name in ("whole", "resumed"))
    assert resumed == uninterrupted[7:]


def test_a_run_made_longer_goes_on_at_the_rate_of_the_longer_run(fit: Fit, tmp_path: Path) -> None:
    changes = {"model__init_args__schedule": {"name": "wsd", "warmup": 2, "decay": 0.5}}
    fit("sft", "long", trainer__max_steps=12, **changes)
    fit("sft", "run", trainer__max_steps=6, **changes)
    fit("sft", "run", "--ckpt_path", "auto", trainer__max_steps=12, **changes)
    long, rates = (tiny_runs.metrics(tmp_path / name, "lr") for name in ("long", "run"))
    assert rates[6:] == long[6:]
    assert rates[6] == pytest.approx(0.01)
    assert rates[5] < 0.009


@pytest.mark.parametrize("interval", [4, 6])
def test_the_last_weights_are_measured(
    interval: int, fit: Fit, tmp_path: Path, world: Path
) -> None:
    run_dir = tmp_path / "run"
    cli = fit("sft", trainer__max_steps=6, trainer__val_check_interval=interval)
    assert_measured(cli, run_dir, 3 if interval == 4 else 2)
    cli = fit("sft", "run", "--ckpt_path", "auto", trainer__max_steps=6)  # has nothing left to do
    assert_measured(cli, run_dir, 3 if interval == 4 else 2)
    cli = fit(
        *("sft", "run", "--ckpt_path", "auto"),
        trainer__max_steps=9,
        trainer__val_check_interval=interval,
    )
    assert_measured(cli, run_dir, {4: 5, 6: 3}[interval])


def assert_measured(cli: Any, run_dir: Path, validations: int) -> None:
    """See that the summary tells the held-out loss of the exported weights."""
    lm, data = PackedLM(load_model(run_dir)), cli.datamodule
    held_out = list(PackedDataset(data.val_order, data.val_subsets, 0, 0, 0, 1))
    with torch.no_grad():
        total = sum(lm(batch).item() for batch in held_out)
    loss = total / sum(len(batch.labels) for batch in held_out)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["final"]["val/loss"] == pytest.approx(loss, rel=1e-5)
    logged = tiny_runs.metrics(run_dir, "val/loss")
    assert logged[-1] == summary["final"]["val/loss"]
    assert len(logged) == validations


def test_a_run_without_held_out_rows_ends(fit: Fit, tmp_path: Path) -> None:
    fit("sft", data__init_args__val=None, data__init_args__val_share=0.0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"] == {}


def test_lora_and_sft_with_an_adapter_are_one_stage(fit: Fit, tmp_path: Path) -> None:
    adapter = {"model__init_args__lora": {"r": 4, "dropout": 0.0}}
    fit("lora", "whole", trainer__max_steps=6, **adapter)
    fit("lora", "run", trainer__max_steps=3, **adapter)
    (tmp_path / "run" / "hf").rename(tmp_path / "first")
    named_sft = {"model__class_path": "SFTModule", **adapter}
    fit("lora", "run", "--ckpt_path", "auto", trainer__max_steps=6, **named_sft)
    losses = [tiny_runs.metrics(tmp_path / name) for name in ("run", "whole")]
    assert len(losses[0]) == 6
    assert losses[0][:3] == losses[1][:3]
    with pytest.raises(ConfigError, match="method was"):
        fit("lora", "run", "--ckpt_path", "auto", trainer__max_steps=8, model__init_args__lora={})


def test_a_run_says_what_it_will_do(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"trainer__limit_train_batches": 6, "trainer__limit_val_batches": 2}
    tokens = {"data__init_args__tokens_per_batch": 64, "data__init_args__tokens_per_step": 128}
    with caplog.at_level("INFO"):
        cli = fit("sft", "run", "--validate.every", "1", **changes, **tokens)
    data = cli.datamodule
    assert (data.epoch_tokens(), data.held_out_tokens()) == (6 * 64, 2 * 64)
    for line in (
        "Hardware: cpu, 1 process, 32-true",
        "Length: 3 steps of up to 128 tokens (64 a micro-batch x 2 accumulated x 1 process), "
        "384 tokens in all, 1 epoch, ",
        "Rates: adamw 0.01, wsd",
        "Validation: 128 tokens, every 1 steps (2 micro-batches of a process)",
        "Checkpoints: at the end alone",
    ):
        assert line in caplog.text


@pytest.mark.parametrize(("before", "validations"), [(-1, 3), (0, 2)])
def test_the_plan_counts_the_first_and_the_last_validation(
    before: int, validations: int, fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    """Three steps are validated before the first, after the second and after the last."""
    changes = {"trainer__limit_train_batches": 3, "trainer__num_sanity_val_steps": before}
    changes |= {"trainer__max_steps": 3, "trainer__val_check_interval": 2}
    cli = fit("sft", data__init_args__tokens_per_batch=64, **changes)
    read = validations * cli.datamodule.held_out_tokens()
    assert f"it reads {read:,} tokens in all" in caplog.text


def test_epochs_of_the_plan_are_those_of_the_run(
    fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    """Micro-batches are not full of tokens, so that a budget times steps says too much."""
    with caplog.at_level("INFO"):
        cli = fit("sft", "run", "--trainer.max_epochs", "2")
    assert f"{2 * cli.datamodule.epoch_tokens():,} tokens in all, 2 epochs, " in caplog.text


def test_tokens_of_an_epoch_follow_the_weights_of_the_files(fit: Fit, world: Path) -> None:
    plain = fit("sft", "plain")
    weighted = fit("sft", "weighted", data__init_args__train={str(world / "sft.jsonl"): 2.0})
    assert weighted.datamodule.epoch_tokens() == 2 * plain.datamodule.epoch_tokens()
