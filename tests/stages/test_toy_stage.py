"""The stage that docs/architecture.md adds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tiny_runs import Fit, metrics

from minigpt.cli.trainer import run
from minigpt.data.batch import PackedBatch
from minigpt.errors import ConfigError
from minigpt.stages.base import LossSums
from minigpt.stages.sft import SFTModule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


def block(language: str) -> str:
    section = PAGE.read_text(encoding="utf-8").partition("## Adding a stage")[2]
    match = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert match is not None
    return match[1]


def test_the_toy_stage_of_the_page_trains(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy.py").write_text(block("python"))
    config = yaml.safe_load(block("yaml"))
    config["model"]["init_args"]["init_from"] = str(world / "pretrain")
    config["data"]["init_args"] |= {
        "train": str(world / "sft.jsonl"),
        "val": str(world / "sft_val.jsonl"),
        "max_length": 64,
        "tokens_per_batch": 256,
        "cache_dir": str(tmp_path / "cache"),
    }
    config["trainer"] |= {"max_steps": 6, "val_check_interval": 3, "log_every_n_steps": 1}
    config["run_dir"] = str(tmp_path / "toy")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.syspath_prepend(tmp_path)
    run(["fit", f"--config={tmp_path / 'toy.yaml'}"])
    held_out = metrics(tmp_path / "toy", "val/loss")
    assert held_out[-1] < held_out[0]
    assert (tmp_path / "toy" / "hf" / "model.safetensors").is_file()
    assert metrics(tmp_path / "toy", "train/targets_per_sample")[0] > 1


@pytest.mark.parametrize("name", ["count", "norm"])
def test_a_metric_named_like_a_sum_of_every_stage_is_refused(
    name: str, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute_loss(module: SFTModule, batch: PackedBatch) -> LossSums:
        return LossSums(module.model(batch), len(batch.labels), {name: 1.0})

    monkeypatch.setattr(SFTModule, "compute_loss", compute_loss)
    with pytest.raises(ConfigError, match=f"has a metric named {name}, which is"):
        fit("sft")
