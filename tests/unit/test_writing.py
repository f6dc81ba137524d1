"""Every writer says what the system refuses, keeps what was there, and loses nothing computed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from patience import limit
from tiny_runs import assert_refused

from minigpt import files
from minigpt.__main__ import PRINTING
from minigpt.data import datamodule
from minigpt.files import STAGING
from minigpt.infer.engine import Engine

Minigpt = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def predict(trained: Path, prompts: Path, out: Path) -> list[str]:
    sampling = {"max_new_tokens": 2}
    config = tiny_runs.config(
        trained,
        "sft",
        trained / "sft",
        data__init_args__predict=str(prompts),
        model__init_args__sampling=sampling,
    )
    return tiny_runs.arguments("predict", config, "--predictions", str(out))


def examine(trained: Path, out: Path) -> list[str]:
    shutil.copytree(trained / "sft", out.parent, ignore=lambda *_: [out.name], dirs_exist_ok=True)
    exam = {"data__init_args__exam": [str(trained / "exam.jsonl")]}
    return tiny_runs.arguments("test", tiny_runs.config(trained, "sft", out.parent, **exam))


def checked(trained: Path, *more: object) -> list[object]:
    return ["data", "check", trained / "sft.jsonl", "--kind", "chat", *more]


def evaluated(trained: Path, *more: object) -> list[object]:
    return ["evaluate", "--model", trained / "sft", "--text", trained / "pretrain.jsonl", *more]


WRITERS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "check.json": lambda trained, out: checked(trained, "--json", out),
    "fixed.jsonl": lambda trained, out: checked(trained, "--fix", out),
    "stats.json": lambda t, out: ["data", "stats", t / "sft.jsonl", "--json", out],
    "stats.html": lambda t, out: ["data", "stats", t / "sft.jsonl", "--html", out],
    "show.html": lambda t, out: [
        *("data", "show", t / "sft.jsonl", "--tokenizer", t / "tokenizer", "--html", out)
    ],
    "tokenizer": lambda t, out: [
        *("tokenizer", "train", "--data_file", t / "pretrain.jsonl", "--output_dir", out)
    ],
    "evaluate.json": lambda trained, out: evaluated(trained, "--json", out),
    "evaluate.html": lambda trained, out: evaluated(trained, "--html", out),
    "report.html": lambda trained, out: ["report", trained / "sft", "--output", out],
    "hf": lambda t, out: ["export", "hf", "--model", t / "sft", "--output_dir", out],
    "model.gguf": lambda t, out: [
        *("export", "gguf", "--model", t / "sft", "--output", out, "--overwrite")
    ],
    "data": lambda _, out: ["init", out.parent],
    "converted.jsonl": lambda t, out: [*("data", "convert", t / "sft.jsonl", out)],
    "adapter": lambda t, out: [
        *("export", "hf", "--model", t / "lora", "--keep_adapter", "--output_dir", out)
    ],
    "ollama": lambda t, out: ["export", "gguf", "--model", t / "sft", "--output_dir", out],
    "exam.json": examine,
    "predicted.jsonl": lambda trained, out: predict(trained, trained / "prompts.jsonl", out),
}
NO_SOURCE = ("report.html", "model.gguf", "exam.json")  # which read no file that OUT could be
NEW = (
    "fixed.jsonl",
    "tokenizer",
    "hf",
    "data",
    "converted.jsonl",
    "adapter",
    "ollama",
)  # which must not be there yet
PRINTED = {"check.json": "48 rows checked", "stats.json": "48", "evaluate.json": "bits_per_byte"}
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


@pytest.mark.parametrize("name", WRITERS)
def test_each_writer_says_why_it_cannot_write_and_keeps_what_was_there(
    name: str, minigpt: Minigpt, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = REFUSED[list(WRITERS).index(name) % len(REFUSED)]
    out = tmp_path / name
    if name not in NEW:
        out.write_text("earlier")

    def refuse(_: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "sync", refuse)
    outcome = minigpt(*WRITERS[name](trained, out))
    assert_refused(outcome, str(out), os.strerror(number))
    assert PRINTED.get(name, "") in outcome.out
    assert (out.read_text() if out.exists() else None) == (None if name in NEW else "earlier")
    assert not list(tmp_path.rglob(f"{STAGING}*"))


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in (*NEW, *NO_SOURCE)])
def test_no_writer_replaces_a_file_that_it_reads(
    name: str, minigpt: Minigpt, trained: Path, tmp_path: Path
) -> None:
    arguments = WRITERS[name](trained, tmp_path / "out")
    source = trained / ("prompts.jsonl" if name.startswith("pred") else "sft.jsonl")
    source = trained / "pretrain.jsonl" if name.startswith("eval") else source
    before = source.read_bytes()
    (tmp_path / "out").hardlink_to(source)
    assert_refused(minigpt(*arguments), str(tmp_path / "out"), "which is read")
    assert source.read_bytes() == before


# Predictions


def predictions(tmp_path: Path) -> list[Any]:
    (part,) = tmp_path.glob("out.jsonl.*.part")
    return [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]


def test_predict_writes_as_it_goes(
    minigpt: Minigpt, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out := tmp_path / "out.jsonl").write_text("earlier")
    monkeypatch.setattr(datamodule, "ITEMS_AT_A_TIME", 2)
    complete = Engine.complete
    calls = []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*args, **options)

    monkeypatch.setattr(Engine, "complete", interrupted)
    outcome = minigpt(*predict(trained, trained / "prompts.jsonl", out))
    assert outcome.status == 130
    assert "What was completed is in" in outcome.err
    assert [row["mark"] for row in predictions(tmp_path)] == [0, 1, 2, 3]
    assert all("completion" in row for row in predictions(tmp_path))
    assert out.read_text() == "earlier"


def test_what_predict_completed_outlives_a_file_that_cannot_be_written(
    minigpt: Minigpt, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl").mkdir()
    outcome = minigpt(*predict(trained, trained / "prompts.jsonl", tmp_path / "out.jsonl"))
    assert_refused(outcome, "out.jsonl: Is a directory")
    assert len(predictions(tmp_path)) == 7


def test_predict_outlives_a_row_that_utf8_cannot_hold(
    minigpt: Minigpt, trained: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "the cat"}, {"prompt": "a dog", "note": "\ud800"}, {"prompt": "春眠"}]
    tiny_runs.write_jsonl(prompts, rows)
    assert minigpt(*predict(trained, prompts, out)).status == 0
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in row.items() if k != "completion"} for row in written] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_predict_is_refused_before_it_computes_where_it_cannot_write(
    minigpt: Minigpt, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "complete", lambda *_: pytest.fail("computed"))
    (tmp_path / "file").touch()
    outcome = minigpt(*predict(trained, trained / "prompts.jsonl", tmp_path / "file" / "out.jsonl"))
    assert_refused(outcome, "Cannot write to", "file/out.jsonl")


# Standard streams


def shell(line: str, **variables: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in variables.items()}}
    line = line.replace("minigpt", f"{sys.executable} -m minigpt")
    return subprocess.run(
        ["sh", "-c", line], env=env, capture_output=True, text=True, timeout=limit(120)
    )


@pytest.mark.parametrize("verb", sorted(PRINTING))
def test_a_closed_output_is_refused_before_anything_is_computed(verb: str) -> None:
    done = shell(f"minigpt {verb} --model none >&-")
    assert done.returncode == 2
    assert done.stderr == (
        f"minigpt: standard output is closed, and minigpt {verb} prints to it. Give it a file.\n"
    )


@pytest.mark.parametrize(
    "line",
    [
        "minigpt generate --model $SFT --file $PROMPTS --max_new_tokens 2 > /dev/full",
        "minigpt generate --model $SFT --prompt a --max_new_tokens 2 > /dev/full",
        "minigpt data check $PROMPTS --kind chat > /dev/full",
        "minigpt report $SFT --output $PROMPTS.html > /dev/full",
        "minigpt --help > /dev/full",
        "minigpt completion bash > /dev/full",
    ],
)
def test_a_full_disk_under_the_output_is_said(line: str, trained: Path) -> None:
    done = shell(line, SFT=trained / "sft", PROMPTS=trained / "prompts.jsonl")
    assert done.returncode == 2
    assert "minigpt: Cannot write to standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_other_closed_streams_do_no_harm() -> None:
    done = shell("minigpt generate --model none <&-")
    assert (done.returncode, done.stderr[:29]) == (2, "minigpt: The prompt is empty.")
    done = shell("minigpt generate --model none --file none.jsonl 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
