"""`minigpt bench`: what is measured is what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import yaml

from minigpt.__main__ import main
from minigpt.bench import baseline, measure, train
from minigpt.errors import MiniGPTError

Minigpt = Callable[..., Any]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the arms in this process, one after the other; return their order."""
    order: list[str] = []

    def spawn(args: list[str], what: str) -> float:
        order.append(args[0])
        if args[0] == "minigpt":
            assert main(args[1:]) == 0
        else:
            done = baseline.train(baseline.Job(**json.loads(Path(args[1]).read_text())))
            Path(args[2]).write_text(json.dumps(done))
        return 0.0

    monkeypatch.setattr(train, "spawn", spawn)
    monkeypatch.setattr(measure, "MATMUL", 64)
    return order


@pytest.fixture
def size(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    tiny = {"model": {"init_args": {"architecture": tiny_runs.ARCHITECTURE}}}
    file.write_text(yaml.safe_dump(tiny))
    return file


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_stages(
    stage: str, trained: Path, tmp_path: Path, here: list[str], size: Path, minigpt: Minigpt
) -> None:
    data = trained / f"{'sft' if stage == 'lora' else stage}.jsonl"
    options = ["--size", size, "--tokenizer", trained / "tokenizer", "--max_length", 64]
    options += ["--batch_size", 4, "--steps", 2, "--repeats", 2, "--json", tmp_path / "out.json"]
    done = minigpt("bench", "train", "--stage", stage, "--data", data, *options)
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out.json").read_text())
    names = ("useful_tokens_per_s", "ratio", "gemm_peak_fraction", "peak_rss_mb", "first_step_s")
    for name in (*names, "baseline_useful_tokens_per_s", "baseline_peak_rss_mb"):
        assert report[name] > 0
        assert name in done.out
    arms = ["minigpt", "minigpt"] if stage == "dpo" else ["minigpt"]
    assert here == 2 * [*arms, "minigpt.bench.baseline"]
    runs = report["runs"]
    assert [len(arm) for arm in runs.values()] == [2] * len(runs)
    unit = "useful_tokens_per_s"
    middle = {name: sum(run.get(unit, 0) for run in arm) / 2 for name, arm in runs.items()}
    assert report["ratio"] == pytest.approx(middle["minigpt"] / middle["baseline"])
    if stage == "dpo":
        assert report["ratio_live"] == pytest.approx(middle["live"] / middle["baseline"])
        assert report["live_peak_rss_mb"] > 0
        pair = report["useful_tokens_per_s"] / report["pairs_per_s"]
        assert report["live_useful_tokens_per_s"] / report["live_pairs_per_s"] == pytest.approx(
            pair
        )
        assert 10 < pair < 150
    assert (report["precision"], report["gemm_precision"]) in (
        ("32-true", "fp32"),
        ("bf16-mixed", "bf16"),
    )
    assert report["versions"]["torch"]


def test_the_share_of_the_peak_is_that_of_the_formula(trained: Path, size: Path) -> None:
    from argparse import Namespace

    chosen = Namespace(
        stage="pretrain", data=str(trained / "pretrain.jsonl"), rows=20, max_length=64,
        batch_size=None, size=str(size), tokenizer=str(trained / "tokenizer"), precision="32-true",
    )  # fmt: skip
    work = train.prepare(chosen, trained.parent / "work")
    assert work.tokens_per_batch == 8 * 64
    lengths = work.store.samples["first"].astype(float)
    a = tiny_runs.ARCHITECTURE
    width = a["heads"] * a["head_dim"]
    per_layer = a["hidden_size"] * (2 * width + 2 * a["kv_heads"] * a["head_dim"] + 3 * a["ffn"])
    head = a["hidden_size"] * 320
    matrices = a["layers"] * per_layer + head
    assert work.matrices == matrices
    arm = {"useful_tokens_per_s": 10.0, "first_step_s": 1.0, "peak_rss_mb": 1}
    report = train.figures(
        work, {"minigpt": [arm], "baseline": [arm], "matmul": [{"flops": 4e6}, {"flops": 5e6}]}
    )
    squares = (lengths**2).sum() / lengths.sum()
    flops = 10 * (6 * matrices + 6 * a["layers"] * width * squares)
    assert report["gemm_peak_fraction"] == pytest.approx(flops / 5e6)


def test_named_sizes_and_those_of_a_file(size: Path, minigpt: Minigpt, trained: Path) -> None:
    assert train.architecture("26m")["hidden_size"] == 512
    assert train.architecture(str(size)) == tiny_runs.ARCHITECTURE
    options = ("--data", trained / "sft.jsonl", "--tokenizer", trained / "tokenizer")
    wrong = minigpt("bench", "train", "--stage", "sft", "--size", "27m", *options)
    assert wrong.status == 2
    assert "--size 27m" in wrong.err


def test_a_step_of_ours_has_as_many_tokens_as_theirs() -> None:
    assert train.budget("pretrain", 8, 512, 100.0) == 4096
    assert train.budget("sft", 16, 768, 151.7) == 2427
    assert train.budget("dpo", 4, 1024, 100.0) == 2048  # no less than one pair may take


def test_data(trained: Path, tmp_path: Path, minigpt: Minigpt) -> None:
    """In processes of their own, as users run it."""
    out = tmp_path / "out.json"
    options = ("--sizes", 1, 2, "--repeats", 1, "--max-length", 64, "--json", out)
    tokenizer = ("--tokenizer", trained / "tokenizer")
    file = trained / "pretrain.jsonl"
    done = minigpt("bench", "data", "--data", file, *tokenizer, *options)
    assert done.status == 0, done.err
    report = json.loads(out.read_text())
    (ours,), (theirs,) = report["runs"]["minigpt"], report["runs"]["library"]
    assert ours["tokens"] > theirs["tokens"] > 0  # ours end each text
    assert ours["batches"] * 8 * 64 >= ours["tokens"]
    assert report["ratio"] == pytest.approx(ours["mb_per_s"] / theirs["mb_per_s"])
    assert 0.5 < report["memory_growth"] < 1.5
    assert report["peak_rss_mb_at_2_mb"] > 50


def test_rows_of_another_kind_are_refused(trained: Path, minigpt: Minigpt) -> None:
    tokenizer = ("--tokenizer", trained / "tokenizer")
    wrong = minigpt("bench", "data", "--data", trained / "sft.jsonl", *tokenizer, "--sizes", 1)
    assert wrong.status == 2
    assert "sft.jsonl:1: not a text row" in wrong.err


def test_help_and_unknown_benchmarks(minigpt: Minigpt) -> None:
    for args in ((), ("--help",)):
        assert "minigpt bench train" in minigpt("bench", *args).out
    assert minigpt("bench", "train", "--help").status == 0
    wrong = minigpt("bench", "speed")
    assert (wrong.status, "Known: train, data" in wrong.err) == (2, True)


def test_an_arm_that_fails_says_why() -> None:
    with pytest.raises(MiniGPTError, match=r"The arm ended with status 2: .*Unknown verb: nothing"):
        measure.spawn(["minigpt", "nothing"], "The arm")


def test_the_peak_of_memory_is_a_process_own() -> None:
    """Not the one of the process that started it, which Linux hands down otherwise."""
    held = bytearray(200_000_000)
    code = "from minigpt.machine import peak_memory; print(peak_memory()['peak_rss_mb'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < int(done.stdout) < 100 < len(held) / 1e6


def test_matmul_peak_and_makers_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MATMUL", 128)
    assert measure.matmul_peak("32-true", "cpu") > 1e8
    assert measure.dense_peak("cpu") is None
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert measure.dense_peak("cuda") == 989e12
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 PCIe")
    assert measure.dense_peak("cuda") == 756e12
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "another")
    assert measure.dense_peak("cuda") is None
