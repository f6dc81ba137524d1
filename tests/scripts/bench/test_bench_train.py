"""The benchmark of training: the report holds what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import baseline
import measure
import pytest
import tiny_runs
import train
import yaml

from minigpt.__main__ import main
from minigpt.errors import ConfigError, MiniGPTError

Bench = Callable[..., Any]
configs: list[Any] = []  # of the arms that ran


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the arms in this process, one after the other; return their order."""
    order: list[str] = []
    configs.clear()

    def spawn(arguments: list[str], title: str) -> float:
        order.append(title)
        if arguments[0] == "-m":
            configs.append(json.loads(Path(arguments[-1]).read_text()))
            assert main(arguments[2:]) == 0
        else:
            configs.append(json.loads(Path(arguments[1]).read_text()))
            result = baseline.train(baseline.LoopConfig(**configs[-1]))
            Path(arguments[2]).write_text(json.dumps(result))
        return 0.0

    monkeypatch.setattr(measure, "spawn", spawn)
    monkeypatch.setattr(train, "find_spec", lambda name: None)  # whether TRL is here or not
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
    stage: str, trained: Path, tmp_path: Path, here: list[str], size: Path, bench: Bench
) -> None:
    data = trained / f"{'sft' if stage == 'lora' else stage}.jsonl"
    start = ["--size", size, "--tokenizer", trained / "tokenizer"]
    if stage == "lora":
        start = ["--model", trained / "sft"]
    options = [*start, "--max_length", 64]
    options += ["--batch_size", 4, "--steps", 2, "--repeats", 2, "--json", tmp_path / "out.json"]
    done = bench("train", "--stage", stage, "--data", data, *options)
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out.json").read_text())
    names = ("useful_tokens_per_s", "ratio", "gemm_peak_fraction", "peak_rss_mb", "first_step_s")
    names = (*names, "warm_up_s")
    for name in (*names, "baseline_useful_tokens_per_s", "baseline_peak_rss_mb"):
        assert report[name] > 0
        assert name in done.out
    arms = ["minigpt fit", "minigpt fit"] if stage == "dpo" else ["minigpt fit"]
    assert here == [*2 * [*arms, "baseline.py"], "minigpt fit"]
    runs = report["runs"]
    assert [*runs.pop("start")[0].values()] == [report["first_step_s"]]
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


def work_of(trained: Path, size: Path, directory: Path, **changes: Any) -> train.Workload:
    args = {
        "stage": "pretrain",
        "data": str(trained / "pretrain.jsonl"),
        "rows": 20,
        "max_length": 64,
        "batch_size": None,
        "size": str(size),
        "model": None,
        "precision": "fp32",
        "tokenizer": str(trained / "tokenizer"),
        "optimizer": "adamw",
        "steps": 2,
    }
    return train.prepare(Namespace(**{**args, "seconds": 1, **changes}), directory)


def test_a_tokenizer_is_trained_unless_given(trained: Path, size: Path, tmp_path: Path) -> None:
    work = work_of(trained, size, tmp_path, tokenizer=None, vocabulary=290)
    assert work.vocabulary == 290


def test_more_than_the_model_reads_is_refused(trained: Path, size: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-length is 129, but qwen3 reads at most 128"):
        work_of(trained, size, tmp_path, max_length=129)


def test_a_gpu_is_asked_for_its_numbers_less_often(
    trained: Path, size: Path, tmp_path: Path
) -> None:
    for device, steps, log_every in (("cpu", 10, 1), ("cuda", 9, 1), ("cuda", 10, 5)):
        work = work_of(trained, size, tmp_path, steps=steps)
        trainer = train.config(replace(work, device=device), "model", tmp_path, 0)["trainer"]
        assert trainer["log_every_n_steps"] == log_every
        assert trainer["min_steps"] // log_every >= 2  # lines, or there is no time between them
        assert trainer["accelerator"] == ("gpu" if device == "cuda" else "cpu")


def test_the_share_of_the_peak_is_that_of_the_formula(trained: Path, size: Path) -> None:
    work = work_of(trained, size, trained.parent / "work")
    assert work.tokens_per_batch == 8 * 64
    lengths = work.store.samples[:]["answers"][:, 0].astype(float)
    a = tiny_runs.ARCHITECTURE
    width = a["heads"] * a["head_dim"]
    per_layer = a["hidden_size"] * (2 * width + 2 * a["kv_heads"] * a["head_dim"] + 3 * a["ffn"])
    head = a["hidden_size"] * 320
    matrices = a["layers"] * per_layer + head
    assert work.matrices == matrices
    arm = {"useful_tokens_per_s": 10.0, "first_step_s": 1.0, "peak_rss_mb": 1}
    report = train.figures(
        work,
        {
            **{name: [arm] for name in ("minigpt", "baseline", "start")},
            "matmul": [{"flops": 4e6}, {"flops": 5e6}],
        },
    )
    squares = (lengths**2).sum() / lengths.sum()
    flops = 10 * (6 * matrices + 6 * a["layers"] * width * squares)
    assert report["gemm_peak_fraction"] == pytest.approx(flops / 5e6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_arms_do_as_they_are_told(
    precision: str, trained: Path, tmp_path: Path, here: list[str], size: Path, bench: Bench
) -> None:
    options = ["--size", size, "--tokenizer", trained / "tokenizer", "--max-length", 48]
    options += ["--batch-size", 3, "--steps", 5, "--repeats", 1, "--rows", 20, "--seconds", 600]
    options += ["--optimizer", "muon", "--precision", precision, "--json", tmp_path / "out.json"]
    done = bench("train", "--stage", "sft", "--data", trained / "sft.jsonl", *options)
    assert done.status == 0, done.err
    ours, theirs, start = configs
    lightnings = {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]
    assert ours["trainer"]["precision"] == theirs["precision"] == lightnings
    assert start["trainer"]["max_steps"] == 1
    one = {"accelerator": "cpu", "devices": 1, "max_steps": 6, "max_time": {"seconds": 600}}
    assert {name: ours["trainer"][name] for name in one} == one
    assert (theirs["device"], theirs["steps"], theirs["seconds"]) == ("cpu", 5, 600)
    assert ours["model"]["init_args"]["optimizer"] == {"name": "muon", "lr": theirs["lr"]}
    assert (ours["data"]["init_args"]["max_length"], theirs["batch_size"]) == (48, 3)
    assert ours["data"]["init_args"]["data_limit"] == 20
    report = json.loads((tmp_path / "out.json").read_text())
    assert 10 < report["samples"] <= 20
    assert report["gemm_precision"] == precision
    assert f"both sides in {lightnings}" in done.out
    assert f"GFLOP/s in {precision};" in done.out


def test_arms_stand_side_by_side() -> None:
    names = ("useful_tokens_per_s", "pairs_per_s", "peak_rss_mb")
    report: dict[str, Any] = {
        **dict(zip(names, (1234.5, 0.5, 15000.0), strict=True)),
        **{f"live_{n}": v for n, v in zip(names, (617.2, 0.25, 16000.0), strict=True)},
        **{f"baseline_{n}": v for n, v in zip(names, (493.8, 0.2, 31000.0), strict=True)},
    }
    report |= {"stage": "dpo", "data": "d.jsonl", "size": "26m", "max_length": 64, "threads": 2}
    report |= {"precision": "32-true", "gemm_precision": "fp32", "gemm_peak_gflops": 148.2}
    report |= {"gemm_peak_fraction": 0.756, "ratio": 2.5, "ratio_live": 1.25}
    *head, _, titles, tokens, pairs, memory, ratio = train.table(report).splitlines()
    assert "148 GFLOP/s in fp32; the step 76% of that" in head[-1]
    assert titles.split("  ")[-1].strip() == "plain loop"
    assert tokens.split()[-3:] == ["1,234", "617", "494"]
    assert pairs.split()[-3:] == ["0.5", "0.25", "0.2"]
    assert memory.split()[-3:] == ["15,000", "16,000", "31,000"]
    assert ratio.split()[-2:] == ["2.50x", "1.25x"]


def test_named_sizes_and_those_of_a_file(size: Path, bench: Bench, trained: Path) -> None:
    assert measure.architecture("26m")["hidden_size"] == 512
    assert measure.architecture(str(size)) == tiny_runs.ARCHITECTURE
    options = ("--data", trained / "sft.jsonl", "--tokenizer", trained / "tokenizer")
    wrong = bench("train", "--stage", "sft", "--size", "27m", *options)
    assert wrong.status == 2
    assert "--size 27m" in wrong.err


def test_a_step_of_ours_has_as_many_tokens_as_theirs() -> None:
    assert train.budget("pretrain", 8, 512, 100.0) == 4096
    assert train.budget("sft", 16, 768, 151.7) == 2427
    assert train.budget("dpo", 4, 1024, 100.0) == 2048  # no less than one pair may take


def test_data(trained: Path, tmp_path: Path, bench: Bench) -> None:
    """In processes of their own, as users run it."""
    out = tmp_path / "out.json"
    options = ("--sizes", 1, 2, "--repeats", 1, "--max-length", 64, "--json", out)
    tokenizer = ("--tokenizer", trained / "tokenizer")
    file = trained / "pretrain.jsonl"
    done = bench("data", "--data", file, *tokenizer, *options)
    assert done.status == 0, done.err
    report = json.loads(out.read_text())
    (ours,), (theirs,) = report["runs"]["minigpt"], report["runs"]["library"]
    assert ours["tokens"] > theirs["tokens"] > 0  # ours end each text
    assert ours["batches"] * 8 * 64 >= ours["tokens"]
    assert report["ratio"] == pytest.approx(ours["mb_per_s"] / theirs["mb_per_s"])
    assert 0.5 < report["memory_growth"] < 1.5
    assert report["peak_rss_mb_at_2_mb"] > 50


def test_rows_of_another_kind_are_refused(trained: Path, bench: Bench) -> None:
    tokenizer = ("--tokenizer", trained / "tokenizer")
    wrong = bench("data", "--data", trained / "sft.jsonl", *tokenizer, "--sizes", 1)
    assert wrong.status == 2
    assert "sft.jsonl:1: not a text row" in wrong.err


@pytest.mark.parametrize("name", ["train", "data", "generate", "time_to_loss", "grpo"])
def test_help_shows_how_a_script_is_called(name: str) -> None:
    script = str(measure.HERE / f"{name}.py")
    process = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert process.returncode == 0
    assert f"python scripts/bench/{name}.py --" in process.stdout


def test_an_arm_that_fails_says_why() -> None:
    with pytest.raises(MiniGPTError, match=r"The arm ended with status 2: .*Unknown verb: nothing"):
        measure.spawn(["-m", "minigpt", "nothing"], "The arm")


def test_the_peak_of_memory_is_a_process_own() -> None:
    """Not the one of the process that started it, which Linux hands down otherwise."""
    memory = bytearray(200_000_000)
    code = "from minigpt.machine import peak_memory; print(peak_memory()['peak_rss_mb'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < int(done.stdout) < 100 < len(memory) / 1e6


def test_a_slow_matmul_is_not_measured_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 100))
    monkeypatch.setattr(measure, "MATMUL", 16)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    assert measure.matmul_peak("bf16-mixed", "cpu") == pytest.approx(2 * 16**3 / 100)
    assert next(clock) == 400  # one product, and no other begun


def test_threads_are_those_given_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert measure.threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert measure.threads() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert measure.threads() == os.cpu_count()


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
