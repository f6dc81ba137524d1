"""The command line: its verbs and their help, interrupts, the choice of hardware."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_refused

import minigpt as package
from minigpt.cli.verbs import COMMANDS, TRAINER_VERBS

Minigpt = Callable[..., Any]


# Verbs


@pytest.mark.parametrize("args", [(), ("-h",), ("--help",)])
def test_help_lists_the_verbs(minigpt: Minigpt, args: tuple[str, ...]) -> None:
    outcome = minigpt(*args)
    assert (outcome.status, outcome.err) == (0, "")
    for verb, what in (TRAINER_VERBS | COMMANDS).items():
        assert re.search(rf"^  {verb} +{what}$", outcome.out, re.MULTILINE)


def test_version(minigpt: Minigpt) -> None:
    assert minigpt("--version") == (0, f"{package.__version__}\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_leaves_ends_the_verb_without_a_traceback(unbuffered: str) -> None:
    out, left = os.pipe()
    os.close(out)
    command = [sys.executable, "-m", "minigpt", "data", "fetch"]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=left, stderr=subprocess.PIPE, text=True, env=env)
    os.close(left)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_of_another_kind_is_a_defect(
    minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.cli.data.main", lambda _: os.write(sink, b"x"))
    out, sink = os.pipe()
    os.close(out)
    with pytest.raises(BrokenPipeError):
        minigpt("data")
    os.close(sink)


def test_unknown_verb(minigpt: Minigpt) -> None:
    assert_refused(minigpt("fitt", "--config", "x"), "fitt", "fit, validate", "minigpt --help")


VERBS = [*((verb,) for verb in TRAINER_VERBS), ("tokenizer",), ("tokenizer", "train")]
OTHERS = [(verb,) for verb in COMMANDS if verb != "tokenizer"]
PARTS = {"data": ("check", "stats", "show", "fetch"), "export": ("hf", "gguf")}
OTHERS += [(verb, part) for verb, parts in PARTS.items() for part in parts]


@pytest.mark.parametrize("verb", [*VERBS, *OTHERS], ids=" ".join)
def test_each_verb_explains_itself(minigpt: Minigpt, verb: tuple[str, ...]) -> None:
    outcome = minigpt(*verb, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(f"usage: minigpt {' '.join(verb)} ")
    examples = outcome.out.partition("\nexamples:\n")[2].replace("\\\n", "")
    examples = examples.partition("\n\n")[0].splitlines()
    assert any(line.startswith(f"  minigpt {verb[0]} ") for line in examples)
    assert all(re.match("  .*minigpt ", line) for line in examples)


def test_usage_of_fit_is_one_line(minigpt: Minigpt) -> None:
    usage, _, details = minigpt("fit", "--help").out.partition("\n\n")
    assert usage == "usage: minigpt fit --config FILE [--config OVERLAY] [options]"
    assert "minigpt fit --model.help SFTModule" in details


# Interrupts


def test_ctrl_c_ends_with_130(
    fit: Minigpt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("minigpt.stages.sft.SFTModule.compute_loss", interrupt)
    try:
        outcome = fit("sft")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert outcome.status == 130
    assert outcome.err.endswith("minigpt: interrupted\n")
    assert not (tmp_path / "run" / "hf").exists()


def test_ctrl_c_before_training(minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minigpt.cli.trainer.run", interrupt)
    assert minigpt("fit").status == 130


# Hardware


@pytest.mark.parametrize(
    ("asked", "fast", "chosen", "line"),
    [
        ("16-mixed", True, "bf16-mixed", "fp16 does not train on a CPU: bf16 is used."),
        ("16-mixed", False, "32-true", "fp32 is used"),
        (None, True, "bf16-mixed", "Precision: bf16-mixed (chosen by hardware)."),
        (None, False, "32-true", "Precision: 32-true (chosen by hardware)."),
        (16, True, "bf16-mixed", "fp16 does not train on a CPU: bf16 is used."),
        ("bf16", True, "bf16-mixed", ""),
        ("64-true", True, "64-true", ""),
        ("bf16-mixed", False, "bf16-mixed", ""),
    ],
)
def test_precision_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: str | int | None,
    fast: bool,
    chosen: str,
    line: str,
) -> None:
    from minigpt.cli import settings

    monkeypatch.setattr(settings, "fast_bf16", lambda _: fast)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    caplog.set_level("INFO")
    assert settings.choose_precision(asked, "auto") == chosen
    assert len(caplog.messages) == bool(line)
    assert line in "".join(caplog.messages)


@pytest.mark.parametrize(("ranks", "first"), [({}, True), ({"RANK": "1"}, False)])
def test_first_process(monkeypatch: pytest.MonkeyPatch, ranks: dict[str, str], first: bool) -> None:
    from minigpt.cli import settings

    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert settings.is_first_process() is first


def test_processes_of_a_launcher_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.cli import settings

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "6")

    class Options:
        accelerator, devices, num_nodes = "auto", "auto", 1

    settings.join_launcher(Options)
    assert (Options.devices, Options.num_nodes) == (2, 3)
