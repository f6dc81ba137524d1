"""The scripts with the original tool's flags: their defaults, their chain, what they say."""

from __future__ import annotations

import io
import json
import logging
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
COMMON = {
    "val_file": None,
    "save_steps": 500,
    "logging_steps": 10,
    "fp16": False,
    "max_length": 512,
    "data_limit": None,
    "tokenizer_path": None,
    "resume": False,
    "overwrite": False,
}


def stage(model: str | None, out: str, data: str, *sizes: float, **more: Any) -> dict[str, Any]:
    names = ("batch_size", "gradient_accumulation_steps", "num_epochs", "learning_rate")
    paths = {
        "model_path": model and str(ROOT / "outputs" / model),
        "output_dir": str(ROOT / "outputs" / out),
        "data_file": str(ROOT / "data" / data),
    }
    return {**COMMON, **paths, **dict(zip(names, sizes, strict=True)), **more}


DEFAULTS = {
    "pretrain": stage(
        None,
        "pretrain",
        "pretrain.jsonl",
        2,
        16,
        5,
        5e-4,
        tokenizer_path=str(ROOT / "mini_tokenizer"),
        weight_decay=0.01,
        warmup_ratio=0.1,
        save_total_limit=2,
    ),
    "train_sft": stage("pretrain", "sft", "mini/sft.jsonl", 4, 8, 3, 1e-5),
    "train_dpo": stage("sft", "dpo", "dpo.jsonl", 2, 16, 3, 5e-6, max_prompt_length=256, beta=0.1),
    "train_grpo": stage(
        "dpo",
        "grpo",
        "grpo.jsonl",
        4,
        4,
        1,
        1e-5,
        num_generations=8,
        max_completion_length=64,
        beta=0.0,
        temperature=1.0,
        reward=None,
        reward_model=None,
    ),
    "train_reward": stage(
        "sft", "reward", "dpo.jsonl", 2, 16, 1, 1e-5, max_prompt_length=256, centering=0.01
    ),
    "train_kto": stage(
        "sft",
        "kto",
        "kto.jsonl",
        2,
        16,
        3,
        5e-6,
        max_prompt_length=256,
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    ),
    "train_lora": stage(
        "sft",
        "lora",
        "lora_medical.jsonl",
        4,
        8,
        3,
        1e-4,
        lora_r=8,
        lora_alpha=32,
        lora_dropout=0.1,
    ),
    "train_tokenizer": {
        "data_file": str(ROOT / "data" / "pretrain.jsonl"),
        "output_dir": str(ROOT / "mini_tokenizer"),
        "vocab_size": 6400,
    },
    "test_model": {
        "model_path": str(ROOT / "outputs" / "sft"),
        "tokenizer_path": None,
        "lora_path": None,
        "merge_lora": False,
        "max_length": 100,
        "temperature": 0.7,
        "top_p": 0.95,
        "top_k": 50,
        "prompt": None,
        "interactive": False,
    },
}
TRAINING = ("pretrain", "train_sft", "train_dpo", "train_kto", "train_grpo", "train_reward")
TRAINING += ("train_lora",)


class Outcome(NamedTuple):
    """What a user sees of a script."""

    status: int
    out: str
    err: str


Script = Callable[..., Outcome]


def run_script(name: str, *args: object) -> int:
    """Run a script in this process, as `python NAME.py ARGS` would."""
    saved = sys.argv, sys.path[:], logging.getLogger().handlers[:]
    sys.argv = [f"{name}.py", *map(str, args)]
    sys.path.insert(0, str(SCRIPTS))
    logging.getLogger().handlers[:] = []
    try:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv, sys.path[:], logging.getLogger().handlers[:] = saved
    raise AssertionError("a script ends with its exit status")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> Script:
    def run(name: str, *args: object) -> Outcome:
        capsys.readouterr()
        return Outcome(run_script(name, *args), *capsys.readouterr())

    return run


# Flags


@pytest.mark.parametrize("name", DEFAULTS)
def test_flags_and_defaults(monkeypatch: pytest.MonkeyPatch, script: Script, name: str) -> None:
    parsed: list[Namespace] = []

    def stop(_: object, args: object = None) -> Namespace:
        parsed.append(parse(_, args))
        raise SystemExit(0)

    from argparse import ArgumentParser

    parse = ArgumentParser.parse_args
    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    switches = [f"--{flag}" for flag, value in DEFAULTS[name].items() if value is False]
    for args, changed in (([], False), (switches, True)):
        assert script(name, *args).status == 0
        expected = DEFAULTS[name].items()
        assert vars(parsed.pop()) == {k: changed if v is False else v for k, v in expected}


@pytest.mark.parametrize("name", DEFAULTS)
def test_help_names_every_default(
    monkeypatch: pytest.MonkeyPatch, script: Script, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # no line is folded
    outcome = script(name, "--help")
    assert outcome.status == 0
    entries = [" ".join(entry.split()) for entry in outcome.out.split("\n  --")]
    helps = {entry.split()[0]: entry for entry in entries}
    for flag, value in DEFAULTS[name].items():
        assert value in (None, False) or helps[flag].endswith(f" (default: {value})")


EVERY_FLAG = {
    "model_path": "model", "output_dir": "out", "data_file": "rows.jsonl", "val_file": "v.jsonl",
    "batch_size": 3, "gradient_accumulation_steps": 5, "num_epochs": 7, "learning_rate": 0.25,
    "save_steps": 11, "logging_steps": 13, "max_length": 64, "data_limit": 17,
    "tokenizer_path": "tok", "lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.5, "beta": 0.75,
    "num_generations": 6, "max_completion_length": 9, "temperature": 0.625, "reward": "numeric",
    "reward_model": "judge",
    "max_prompt_length": 19, "centering": 0.625, "weight_decay": 0.125, "warmup_ratio": 0.375,
    "save_total_limit": 9, "desirable_weight": 0.875, "undesirable_weight": 1.25,
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINING)
def test_each_flag_arrives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    from minigpt.cli import trainer as cli

    clis: list[cli.MiniGPTCLI] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.MiniGPTCLI, "_run_subcommand", lambda self, _: clis.append(self))
    flags = [f"--{k}={v}" for k, v in EVERY_FLAG.items() if k in DEFAULTS[name]]
    assert run_script(name, *flags, "--fp16", "--overwrite") == 0
    config = clis[0].config["fit"]
    model, data = config.model.init_args, config.data.init_args
    rows = 2 if name in ("train_dpo", "train_kto", "train_reward") else 1
    assert (str(clis[0].run_dir), config.overwrite) == ("out", True)
    assert (model.init_from, model.tokenizer) == ("model", "tok")
    assert (model.optimizer.name, model.optimizer.lr) == ("adamw", 0.25)
    assert model.schedule.name == "cosine"
    assert (data.train, data.val, data.data_limit) == ("rows.jsonl", "v.jsonl", 17)
    sizes = (64, 3) if name == "train_grpo" else (64, 3 * 64 * rows)
    size = data.get("prompts_per_batch") or data.tokens_per_batch
    assert (data.max_length, size) == sizes
    assert (config.trainer.max_epochs, config.trainer.accumulate_grad_batches) == (7, 5)
    assert (config.trainer.log_every_n_steps, config.checkpoint.every) == (13, 11)
    assert config.trainer.precision != "16-mixed" or torch.cuda.is_available()
    if name == "pretrain":
        assert (model.optimizer.weight_decay, model.schedule.warmup) == (0.125, 0.375)
        assert config.checkpoint.keep == 9
    if name == "train_kto":
        assert (model.desirable_weight, model.undesirable_weight) == (0.875, 1.25)
    if name in ("train_dpo", "train_kto"):
        assert (model.beta, data.max_prompt_length) == (0.75, 19)
    if name == "train_grpo":
        assert (model.beta, model.temperature) == (0.75, 0.625)
        assert [reward.kind for reward in model.rewards] == ["numeric", "reward_model"]
        assert model.rewards[1].model == "judge"
        assert (data.num_generations, data.max_completion_length) == (6, 9)
    if name == "train_reward":
        assert (model.centering, data.max_prompt_length) == (0.625, 19)
    if name == "train_lora":
        assert (model.lora.r, model.lora.alpha, model.lora.dropout) == (2, 6, 0.5)


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ([], ["exact"]),
        (["--reward_model=judge"], ["reward_model"]),
        (["--reward", "numeric", "length"], ["numeric", "length"]),
        (["--reward", "a.py:score", "--reward_model=judge"], ["function", "reward_model"]),
    ],
)
def test_rewards_of_the_script(
    flags: list[str], kinds: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from minigpt.cli import trainer as cli

    clis: list[cli.MiniGPTCLI] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.MiniGPTCLI, "_run_subcommand", lambda self, _: clis.append(self))
    assert (
        run_script("train_grpo", "--model_path=model", f"--output_dir={tmp_path}/run", *flags) == 0
    )
    rewards = clis[0].config["fit"].model.init_args.rewards
    assert [reward.kind for reward in rewards] == kinds


# The chain


SHORT = "--data_limit 40 --max_length 128 --num_epochs 1 --fp16"
RUNS = ("pretrain_test", "sft_test", "dpo_test", "lora_test")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The quick start's chain from scripts/ with relative paths, and the stages' stderr."""
    out = tmp_path_factory.mktemp("chain")
    near = Path(os.path.relpath(out, SCRIPTS))
    tokenizer, (pretrain, sft, dpo, lora) = near / "tokenizer", (near / run for run in RUNS)
    calls = {
        "train_tokenizer": f"--data_file ../data/pretrain.jsonl --output_dir {tokenizer}",
        "pretrain": f"--output_dir {pretrain} --data_file ../data/pretrain.jsonl {SHORT} "
        f"--batch_size 2 --tokenizer_path {tokenizer}",
        "train_sft": f"--model_path {pretrain} --output_dir {sft} {SHORT} "
        "--data_file ../data/mini/sft.jsonl --batch_size 4",
        "train_dpo": f"--model_path {sft} --output_dir {dpo} {SHORT} "
        "--data_file ../data/dpo.jsonl --batch_size 2 --beta 0.1",
        "train_lora": f"--model_path {sft} --output_dir {lora} {SHORT} "
        "--data_file ../data/lora_medical.jsonl --batch_size 4 --lora_r 8 --lora_alpha 32",
    }
    output = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SCRIPTS)
        for name, args in calls.items():
            stderr = io.StringIO()
            patch.setattr(sys, "stderr", stderr)
            assert run_script(name, *args.split()) == 0
            output[name] = stderr.getvalue()
    return out, output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


def test_each_stage_reads_what_the_one_before_wrote(chain: tuple[Path, dict[str, str]]) -> None:
    out, _ = chain
    summaries = [json.loads((out / run / "summary.json").read_text()) for run in RUNS]
    stages = ["PretrainModule", "SFTModule", "DPOModule", "LoRAModule"]
    assert [summary["stage"] for summary in summaries] == stages
    pretrain, sft, dpo, _ = (out / run for run in RUNS)
    for before, after in ((pretrain, sft), (sft, dpo)):
        old, new = weights(before), weights(after)
        assert old.keys() == new.keys()
        # A step or two at rates of 1e-5: near the start, which random weights are not.
        assert 0 < max(float((old[name] - new[name]).abs().max()) for name in old) < 1e-3
    adapter = json.loads((out / "lora_test" / "hf" / "adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]) == (out / "sft_test" / "hf").resolve()
    for run in RUNS:
        files = (out / run / "hf" / "tokenizer.json", out / "tokenizer" / "tokenizer.json")
        saved, original = (json.loads(file.read_text())["model"] for file in files)
        assert saved == original


def test_fp16_on_a_cpu_is_named_in_one_line(chain: tuple[Path, dict[str, str]]) -> None:
    if torch.cuda.is_available():
        pytest.skip("fp16 is what a GPU trains in")
    for name in chain[1].keys() & set(TRAINING):
        lines = [line for line in chain[1][name].splitlines() if "fp16" in line]
        assert len(lines) == 1
        assert "bf16" in lines[0]


def ask(script: Script, chain: tuple[Path, dict[str, str]], *args: object) -> list[str]:
    out, _ = chain
    greedy = ("--max_length", 8, "--temperature", 0)
    outcome = script("test_model", "--model_path", out / "sft_test", *greedy, *args)
    assert (outcome.status, outcome.err) == (0, "")
    return outcome.out.splitlines()


def test_built_in_prompts(script: Script, chain: tuple[Path, dict[str, str]]) -> None:
    prompts = [line for line in ask(script, chain) if line.startswith("> ")]
    assert len(prompts) >= 5
    assert "> Hello!" in prompts


@pytest.mark.parametrize("form", [(), ("--merge_lora",)], ids=["beside", "merged"])
def test_adapter(script: Script, chain: tuple[Path, dict[str, str]], form: tuple[str, ...]) -> None:
    lora = ("--lora_path", chain[0] / "lora_test", "--tokenizer_path", chain[0] / "tokenizer")
    lines = ask(script, chain, "--prompt", "Hello!", *lora, *form)
    assert lines[0] == "> Hello!"
    assert lines == ask(script, chain, "--prompt", "Hello!", "--merge_lora", *lora)


def test_dialogue(
    script: Script, monkeypatch: pytest.MonkeyPatch, chain: tuple[Path, dict[str, str]]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\nAnd you?\n\nnever read\n"))
    output = "\n".join(ask(script, chain, "--interactive"))
    assert output.count("> ") == 3
    assert "never read" not in output
    first = ask(script, chain, "--prompt", "Hello!")
    assert output.startswith("> " + "\n".join(first[1:]).rstrip())


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (("--model_path", "./none"), "no trained model in ./none"),
        (("--lora_path", "./none"), "./none"),
        (("--temperature", "-1"), "temperature"),
        (("--prompt", "\udcff"), "lone surrogate"),
    ],
)
def test_bad_input_of_test_model(
    script: Script, chain: tuple[Path, dict[str, str]], args: tuple[str, ...], fragment: str
) -> None:
    outcome = script("test_model", "--model_path", chain[0] / "sft_test", *args)
    assert outcome.status == 2
    assert outcome.err.startswith("test_model: ")
    assert fragment in outcome.err
    assert outcome.err.count("\n") == 1


# Run directories, paths and launchers, on a smaller model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a pretrained model of 25 thousand parameters."""
    from minigpt.__main__ import main

    root = tiny_runs.write_data(tmp_path_factory.mktemp("small"))
    config = tiny_runs.config(root, "pretrain", root / "pretrain")
    assert main(tiny_runs.arguments("fit", config)) == 0
    return root


def sft_flags(small: Path, out: object, *more: object) -> list[str]:
    paths = ("--model_path", small / "pretrain", "--data_file", small / "sft.jsonl")
    sizes = ("--max_length", 64, "--batch_size", 4, "--gradient_accumulation_steps", 2)
    return [str(x) for x in (*paths, "--output_dir", out, *sizes, *more)]


def steps(run: Path) -> list[int]:
    return sorted(int(p.stem.partition("=")[2]) for p in (run / "checkpoints").iterdir())


def test_resume_and_overwrite(
    script: Script, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # absolute paths from another directory, and a relative one
    flags = sft_flags(small, "run", "--save_steps", 2)
    first = script("train_sft", *flags, "--num_epochs", 1)
    assert first.status == 0
    (*_, last) = steps(tmp_path / "run")
    again = script("train_sft", *flags, "--num_epochs", 1)
    assert again.status == 2
    for flag in ("--resume", "--overwrite", "--output_dir"):
        assert flag in again.err.splitlines()[-1]
    resumed = script("train_sft", *flags, "--num_epochs", 2, "--resume")
    assert resumed.status == 0
    assert f"Resuming from run/checkpoints/step={last}" in resumed.err
    assert steps(tmp_path / "run")[-1] == 2 * last
    over = script("train_sft", *flags, "--num_epochs", 1, "--overwrite")
    assert over.status == 0
    assert steps(tmp_path / "run")[-1] == last


def test_rows_are_held_out_where_no_file_lies_beside(
    script: Script, small: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = (small / "sft.jsonl").read_text().splitlines(keepends=True)
    for count, held_out in ((48, True), (30, False)):
        file.write_text("".join(rows[:count]))
        flags = sft_flags(small, tmp_path / f"run{count}", "--data_file", file)
        assert script("train_sft", *flags, "--num_epochs", 1).status == 0
        summary = json.loads((tmp_path / f"run{count}" / "summary.json").read_text())
        assert ("val/loss" in summary["final"]) is held_out


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (("--model_path", "outputs/none"), "minigpt fit --config configs/"),
        (("--data_file", "none.jsonl"), "none.jsonl"),
        (("--batch_size", "0"), "tokens_per_batch"),
        (("--learning_rate", "-1"), "optimizer.lr"),
        (("--num_epochs", "0"), "max_epochs"),
    ],
)
def test_bad_input(
    script: Script, small: Path, tmp_path: Path, flags: tuple[str, ...], fragment: str
) -> None:
    outcome = script("train_sft", *sft_flags(small, tmp_path / "run"), *flags)
    assert outcome.status == 2
    assert fragment in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run" / "hf").exists()


LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"),
    "accelerate": ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_starts_one_process_on_a_cpu(small: Path, tmp_path: Path, launcher: str) -> None:
    if launcher == "accelerate" and find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    script = str(SCRIPTS / "train_sft.py")
    flags = sft_flags(small, tmp_path / "run", "--num_epochs", 1)
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], script, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("Trained ") == 1
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
