"""Loggers of Lightning beside the run directory's own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import Fit

from minigpt.errors import ConfigError


def csv_logger(directory: Path, name: str = "csv") -> dict[str, Any]:
    options = {"save_dir": str(directory), "name": name, "version": ""}
    return {"class_path": "CSVLogger", "init_args": options}


def column(file: Path, name: str) -> list[float]:
    with file.open() as opened:
        return [float(row[name]) for row in csv.DictReader(opened) if row.get(name)]


def loggers(configured: Any, fit: Fit) -> list[str]:
    cli = fit("sft", trainer__logger=configured, trainer__max_steps=2)
    return [type(logger).__name__ for logger in cli.trainer.loggers]


def test_a_logger_of_the_config_stands_beside_those_of_the_run(fit: Fit, tmp_path: Path) -> None:
    cli = fit("sft", trainer__logger=csv_logger(tmp_path))
    assert any(isinstance(logger, CSVLogger) for logger in cli.trainer.loggers)
    losses = tiny_runs.metrics(tmp_path / "run")
    assert len(losses) == 3
    assert column(tmp_path / "csv/metrics.csv", "train/loss") == pytest.approx(losses)
    assert column(tmp_path / "csv/metrics.csv", "val/loss")
    assert "lr" in (tmp_path / "csv/hparams.yaml").read_text()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_several_loggers(fit: Fit, tmp_path: Path) -> None:
    fit("sft", trainer__logger=[csv_logger(tmp_path, name) for name in ("one", "two")])
    one, two = (column(tmp_path / name / "metrics.csv", "train/loss") for name in ("one", "two"))
    assert one == two != []


@pytest.mark.parametrize(
    ("configured", "expected"),
    [(value, ["RunTensorBoard", "JSONLLogger"]) for value in (None, True)] + [(False, [])],
)
def test_the_loggers_of_the_run(configured: bool | None, expected: list[str], fit: Fit) -> None:
    assert loggers(configured, fit) == expected


def test_a_logger_that_does_not_exist_is_refused(fit: Fit) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.logger"):
        fit("sft", trainer__logger={"class_path": "NoSuchLogger"})


def test_a_logger_whose_package_is_missing_is_refused(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of its options: the parser may have read them before this test.
    def refuse(
        self: CSVLogger,
        save_dir: str,
        name: str = "",
        version: str = "",
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        raise ModuleNotFoundError("No module named 'somewhere'")

    monkeypatch.setattr(CSVLogger, "__init__", refuse)
    with pytest.raises(ConfigError, match="No module named 'somewhere'"):
        fit("sft", trainer__logger=csv_logger(tmp_path))


def test_weights_and_biases_offline(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"save_dir": str(tmp_path / "wandb"), "project": "minigpt", "offline": True}
    fit("sft", trainer__logger={"class_path": "WandbLogger", "init_args": options})
    assert len(tiny_runs.metrics(tmp_path / "run")) == 3
    wandb.teardown()  # ends its process
    assert list((tmp_path / "wandb").rglob("*.wandb"))
