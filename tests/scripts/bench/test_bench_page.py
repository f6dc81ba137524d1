"""`make bench`: what it measures, and the page that it writes; the time to a loss."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import all as bench_all
import baseline
import measure
import pytest
import time_to_loss
import tiny_runs
import yaml
from baseline import LoopConfig

from minigpt.__main__ import main
from minigpt.data import tokenizer as tokenizers

ROOT = Path(__file__).resolve().parents[3]
ARM = {
    "useful_tokens_per_s": 1234.5,
    "pairs_per_s": 2.5,
    "peak_rss_mb": 2000,
}
TRAINED: dict[str, Any] = {
    "max_length": 512,
    "size": "26m",
    "precision": "32-true",
    "ratio": 1.5,
    "ratio_live": 1.25,
    "gemm_peak_fraction": 0.756,
    "gemm_peak_gflops": 148.2,
    "gemm_precision": "fp32",
    "first_step_s": 7.77,
    "date": "2026-01-01",
    "system": "Linux",
    "processor": "AVX2",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
    **ARM,
    **{f"baseline_{name}": value / 2 for name, value in ARM.items()},
    **{f"live_{name}": value * 2 for name, value in ARM.items()},
}
DATA = {
    "mb_per_s": 1.5,
    "library_mb_per_s": 1.75,
    "ratio": 0.857,
    "peak_rss_mb_at_10_mb": 300,
    "peak_rss_mb_at_100_mb": 310,
}
GRPO = {
    "data": "lora_medical.jsonl",
    "prompts": 8,
    "generations": 4,
    "completion": 64,
    "prompt_length": 512,
    "minigpt_samples_per_s": 9.75,
    "minigpt_rollout_s": 2.71,
    "minigpt_update_s": 3.92,
    "shared_targets_per_s": 432.1,
    "ratio_shared": 3.5,
}
GRPO_TRL = {
    "ratio": 3.25,
    "memory_share": 0.555,
    "trl_samples_per_s": 3.0,
    "trl_rollout_s": 5.21,
    "trl_update_s": 9.24,
}
START = {"help_s": 0.04, "fit_help_s": 5.25, "imports_s": 4.0}


calls: list[list[str]] = []  # of `bench`
Page = Callable[..., str]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Page:
    """Write the page of fixed results with the given flags, and return it."""
    calls.clear()

    def bench(name: str, *arguments: object) -> None:
        words = [name, *map(str, arguments)]
        calls.append(words)
        data = Path(words[words.index("--data") + 1])
        assert data.is_file()
        result = {"data": DATA, "grpo": GRPO}.get(name, {**TRAINED, "data": data.name})
        Path(words[words.index("--json") + 1]).write_text(json.dumps(result))

    def write(*args: str) -> str:
        paths = ["--output_dir", str(tmp_path / "out"), "--page", str(tmp_path / "page.md")]
        monkeypatch.setattr(sys, "argv", ["all.py", *paths, *args])
        bench_all.main()
        return (tmp_path / "page.md").read_text()

    monkeypatch.setattr(bench_all, "bench", bench)
    monkeypatch.setattr(bench_all, "time_starts", lambda repeats: START)
    monkeypatch.chdir(ROOT)
    return write


def test_the_page(page: Page) -> None:
    text = page()
    sft = "| sft | sft.jsonl, 512 | tokens/s | 1,234 | 617 | 1.50× | 2,000 of 1,000 | 76% |"
    assert sft in text
    assert "| dpo | dpo.jsonl, 512 | pairs/s | 2.5 | 1.25 | 1.50× | 2,000 of 1,000 | 76% |" in text
    live = "| dpo, live reference | the same | pairs/s | 5 | 1.25 | 1.25× | 4,000 of 1,000 | |"
    assert live in text
    assert "148 GFLOP/s in fp32" in text
    assert "TRL" not in text
    assert "1.50 MB/s, which is 86% of what the tokenizer library" in text
    assert "lora_medical.jsonl and 4 answers of 64 tokens to each: 9.75 samples/s." in text
    assert "432 target tokens/s, 3.50× as many as with the prompt before each" in text
    assert "300 MB for 10 MB of JSONL, 310 MB for 100 MB of JSONL" in text
    assert "`minigpt --help`: 0.04 s. `minigpt fit --help`: 5.25 s; importing" in text
    assert "7.8 s" in text
    assert "2026-01-01 with `make bench`: Linux; AVX2; 2 threads; 32-true; model 26m; torch" in text


def test_the_page_has_the_peer_where_it_was_measured(page: Page, tmp_path: Path) -> None:
    page()
    file = tmp_path / "out" / "sft.json"
    result = json.loads(file.read_text()) | {"ratio_trl": 4.25}
    file.write_text(json.dumps(result))
    grpo = tmp_path / "out" / "grpo.json"
    grpo.write_text(json.dumps({**GRPO, **GRPO_TRL}))
    text = page()
    assert "Against TRL on the same rows: sft 4.25×." in text
    assert "9.75 samples/s, 3.25× TRL's 3 (rollout 2.7 of 5.2 s, update 3.9 of 9.2 s)" in text
    assert "with 56% of its memory" in text


@pytest.mark.parametrize(("reached", "verb"), [("True", "reached"), ("False", "did not reach")])
def test_the_page_has_the_time_to_a_loss_where_it_was_measured(
    reached: str, verb: str, page: Page, tmp_path: Path
) -> None:
    measured = {"baseline_lr": 1e-3, "baseline_loss": 4.5, "baseline_s": 600.4}
    measured |= {"loss": 4.25, "seconds": 74.6, "times_sooner": 8.05}
    setting = {"reached": reached, "data": "poems.jsonl", "optimizer": "adamw"}
    assert "Time to a loss" not in page()
    file = tmp_path / "out" / "time_to_loss.json"
    file.write_text(json.dumps({**TRAINED, **measured, **setting}))
    text = page()
    assert "(0.001) came to a held-out loss of 4.500 nats per token on poems.jsonl in 600 s" in text
    assert f"`minigpt fit` with adamw {verb} it" in text
    assert "4.250 in 75 s, 8.1 times less (26m, 32-true, 2026-01-01)" in text


def test_what_is_there_is_measured_anew_only_by_force(page: Page, tmp_path: Path) -> None:
    page("--repeats", "2", "--seconds", "4", "--sizes", "3")
    first = list(calls)
    stages = [words[words.index("--stage") + 1] for words in first[:4]]
    assert stages == ["pretrain", "sft", "dpo", "lora"]
    assert all("--repeats 2" in " ".join(words) for words in first)
    assert "--max-length 768 --size 26m --seconds 4" in " ".join(first[1])
    assert "lora_medical.jsonl" in " ".join(first[3])
    assert first[4][0] == "data"
    assert "--sizes 3 --repeats 2" in " ".join(first[4])
    assert first[5][0] == "grpo"
    assert "lora_medical.jsonl --size 26m --seconds 4 --repeats 2" in " ".join(first[5])
    page()
    assert calls == first
    page("--force")
    assert len(calls) == 2 * len(first)


def test_data_of_ones_own(page: Page, tmp_path: Path) -> None:
    for stage in ("pretrain", "sft", "dpo", "lora"):
        (tmp_path / f"{stage}.jsonl").write_text("{}\n")
    options = ("--data_dir", str(tmp_path), "--size", "64m", "--tokenizer", "tok")
    text = page(*options)
    assert "with `make bench DATA=DIR`" in text
    assert "| lora | lora.jsonl, 512 |" in text
    assert all("--tokenizer tok" in " ".join(words) for words in calls)
    assert "--size 64m" in " ".join(calls[0])


def test_starts_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(bench_all.subprocess, "run", lambda args, **_: commands.append(args[1:]))
    times = bench_all.time_starts(2)
    assert times.keys() == START.keys()
    assert commands[:3] == commands[3:]
    assert commands[0] == ["-m", "minigpt", "--help"]


def test_make_bench_passes_its_variables_on() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    command = ["make", "-n", "bench", "DATA=my data", "FORCE=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'scripts/bench/all.py --data_dir "my data" --force' in done.stdout


@pytest.mark.parametrize("trained", [False, True], ids=["its tokenizer", "a tokenizer of its own"])
def test_time_to_loss(
    trained: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bench: Any
) -> None:
    tiny_runs.write_data(tmp_path)
    tokenizer = str(tmp_path / "tokenizer")
    tokens = 290 if trained else len(tokenizers.load(tokenizer))
    size = {"model": {"init_args": {"architecture": tiny_runs.ARCHITECTURE}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(size))
    configs: list[dict[str, Any]] = []

    def spawn(arguments: list[str], title: str) -> float:
        configs.append(json.loads(Path(arguments[-1]).read_text()))
        assert main(arguments[2:]) == 0
        return 0.0

    def plain(loop: LoopConfig, directory: Path) -> Any:
        assert (loop.seconds, loop.decay) == (2.0, True)
        assert len(tokenizers.load(loop.model)) == tokens
        result = baseline.train(LoopConfig(**{**vars(loop), "steps": 3}))
        return result | {"seconds": 2.0, "held_out": result["held_out"] + 1000 * loop.lr}

    monkeypatch.setattr(measure, "spawn", spawn)
    monkeypatch.setattr(time_to_loss, "run_baseline", plain)
    files = [
        "--data",
        str(tmp_path / "pretrain.jsonl"),
        "--val",
        str(tmp_path / "pretrain_val.jsonl"),
    ]
    work = ["--vocabulary", "290"] if trained else ["--tokenizer", tokenizer]
    work += ["--size", str(tmp_path / "tiny.yaml")]
    work += ["--seconds", "2", "--share", "4", "--baseline_lrs", "1e-2", "1e-3", "--decay", "0.25"]
    work += ["--tokens_per_batch", "128", "--max_length", "64", "--rows", "40", "--lr", "2e-2"]
    work += ["--optimizer", "muon"]
    work += ["--batch_size", "2", "--adamw_lr", "3e-3", "--precision", "fp32"]
    outcome = bench("time_to_loss", *files, *work, "--json", tmp_path / "out.json")
    assert outcome.status == 0, outcome.err
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["baseline_lr"] == 1e-3
    assert report["baseline_loss"] == report["runs"]["baseline"]["0.001"]["held_out"]
    assert report["loss"] < 6
    assert report["data"] == "pretrain.jsonl"
    assert report["reached"] == str(report["loss"] <= report["baseline_loss"])
    assert report["times_sooner"] == pytest.approx(2.0 / report["seconds"])
    short, long = configs
    assert (short["trainer"]["max_steps"], short["data"]["init_args"]["val"]) == (10, None)
    assert not any(config["model"]["init_args"]["compile_layers"] for config in configs)
    steps = report["runs"]["minigpt"]["steps"]
    assert long["trainer"]["max_steps"] == steps
    optimizer = {"name": "muon", "lr": 0.02, "adamw_lr": 0.003}
    assert long["model"]["init_args"]["optimizer"] == optimizer
    assert "times_sooner" in outcome.out
