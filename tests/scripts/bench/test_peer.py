"""TRL as a third arm does the same work, and counts it in the same way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_runs
import train
from test_baseline import loop, store_of
from train import figures

CODE = """
import json, sys
from peer import LoopConfig, train
configs = json.load(open(sys.argv[1]))
json.dump([train(LoopConfig(**config)) for config in configs], open(sys.argv[2], "w"))
"""


@pytest.mark.skipif(not find_spec("trl"), reason="the extra `bench` is not installed")
def test_trl_trains_each_stage_on_the_same_tokens(trained: Path, tmp_path: Path) -> None:
    """A batch holds all samples, so that each step takes all tokens."""
    stores = {stage: store_of(trained, stage) for stage in tiny_runs.STAGES}
    tokens = {
        stage: sum(int(store.samples[:][name].sum()) for name in ("prompt", "answers"))
        for stage, store in stores.items()
    }
    blocks = -(-tokens["pretrain"] // 16)
    sizes = {stage: len(store) for stage, store in stores.items()} | {"pretrain": blocks}
    configs = [
        loop(trained, stage, batch_size=size, max_length=16 if stage == "pretrain" else 64, steps=3)
        for stage, size in sizes.items()
    ]
    file, result = tmp_path / "configs.json", tmp_path / "results.json"
    file.write_text(json.dumps([asdict(config) for config in configs]))
    command = [sys.executable, "-c", CODE, str(file), str(result)]
    scripts = str(Path(train.__file__).parent)
    path = os.pathsep.join([scripts, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = dict(zip(sizes, json.loads(result.read_text()), strict=True))
    for stage, total in tokens.items():
        assert results[stage]["steps"] == 3
        assert results[stage]["tokens"] == 3 * total, stage
        assert results[stage]["seconds"] > 0
        assert results[stage]["peak_rss_mb"] > 100


def test_its_figures_stand_beside_the_others() -> None:
    args = Namespace(stage="sft")
    work = Namespace(args=args, matrices=1, attention=1, precision="32-true", device="cpu")
    arm = {"useful_tokens_per_s": 10.0, "first_step_s": 1.0, "peak_rss_mb": 1}
    arms = {name: [arm] for name in ("minigpt", "baseline", "start")}
    slow = [arm | {"useful_tokens_per_s": 4.0}]
    report = figures(work, {**arms, "trl": slow, "matmul": [{"flops": 1.0}]})  # type: ignore[arg-type]
    assert (report["ratio"], report["ratio_trl"]) == (1.0, 2.5)
    assert report["trl_useful_tokens_per_s"] == 4.0
    assert train.ARMS["TRL"] == "trl_"
