"""What `minigpt.lightning_internals` relies on is still there after an upgrade of Lightning."""

from __future__ import annotations

import inspect

import lightning
import pytest
from lightning.fabric.strategies.launchers import subprocess_script as fabric_launcher
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import subprocess_script as launcher

PRIVATE = {
    "LightningCLI._parse_ckpt_path": lambda: LightningCLI._parse_ckpt_path,
    "LightningCLI._run_subcommand": lambda: LightningCLI._run_subcommand,
    "_FitLoop.skip": lambda: _FitLoop.skip,
    "_FitLoop._data_fetcher": lambda: Trainer(logger=False).fit_loop.__dict__["_data_fetcher"],
    "_TrainingEpochLoop._should_check_val_fx": lambda: _TrainingEpochLoop._should_check_val_fx,
    "_TrainingEpochLoop._batches_that_stepped": (
        lambda: Trainer(logger=False).fit_loop.epoch_loop.__dict__["_batches_that_stepped"]
    ),
    "_Loop._restarting": lambda: Trainer(logger=False).fit_loop.__dict__["_restarting"],
    "_Loop.reset_restart_stage": lambda: _FitLoop.reset_restart_stage,
    "_CheckpointConnector._restore_modules_and_callbacks": (
        lambda: Trainer(logger=False)._checkpoint_connector._restore_modules_and_callbacks
    ),
    "_launch_process_observer": lambda: launcher._launch_process_observer,
    "_ChildProcessObserver._terminate_all": (
        lambda: fabric_launcher._ChildProcessObserver._terminate_all
    ),
    "TensorBoardLogger._kwargs": lambda: TensorBoardLogger("").__dict__["_kwargs"],
    "ModelParallelStrategy._data_parallel_size": (
        lambda: ModelParallelStrategy().__dict__["_data_parallel_size"]
    ),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_lightning_still_has_its_private_part(name: str) -> None:
    try:
        PRIVATE[name]()
        is_there = True
    except (AttributeError, KeyError):
        is_there = False
    assert is_there, (
        f"lightning {lightning.__version__} has no {name} any more: mend its user in "
        "minigpt/lightning_internals.py, or delete it where Lightning now does the same."
    )


def test_private_functions_take_the_same_arguments() -> None:
    expected = {
        LightningCLI._run_subcommand: ["self", "subcommand"],
        LightningCLI._parse_ckpt_path: ["self"],
        _TrainingEpochLoop._should_check_val_fx: ["self", "data_fetcher"],
        fabric_launcher._ChildProcessObserver.__init__: [
            "self",
            "main_pid",
            "child_processes",
            "sleep_period",
        ],
    }
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters) == names, function.__qualname__
