"""The benchmark of GRPO: both measurements do the same work in their arms, and report it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpo
import grpo_update
import measure
import pytest
import tiny_runs
import yaml

from minigpt.__main__ import main

Bench = Callable[..., Any]
OPTIONS = {"prompts": 2, "generations": 3, "completion": 5, "prompt-length": 40, "steps": 2}
TRL_STEPS = {
    "samples_per_s": 2.0,
    "step_s": 3.0,
    "rollout_s": 1.0,
    "update_s": 2.0,
    "answer_tokens": 5.0,
    "peak_rss_mb": 100_000,
}


@pytest.fixture
def options(trained: Path, tmp_path: Path) -> list[object]:
    tiny = {"model": {"init_args": {"architecture": tiny_runs.ARCHITECTURE}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    flags = [item for name, value in OPTIONS.items() for item in (f"--{name}", value)]
    flags += ["--precision", "fp32", "--repeats", 1, "--size", tmp_path / "tiny.yaml"]
    return [*flags, "--data", trained / "sft.jsonl", "--vocabulary", 290]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run our arms in this process, and none of TRL; return the order of all."""
    order: list[str] = []

    def spawn(arguments: list[str], title: str) -> float:
        order.append(" ".join([title, *arguments[3:]]) if arguments[0] != "-m" else title)
        if arguments[0] == "-m":
            assert main(arguments[2:]) == 0
            return 0.0
        work = grpo.read_work(arguments[1])
        trl = title == "grpo_trl.py"
        result = TRL_STEPS if trl else grpo_update.measure(work, arguments[3])
        Path(arguments[2]).write_text(json.dumps(result))
        return 0.0

    monkeypatch.setattr(measure, "spawn", spawn)
    return order


@pytest.mark.parametrize("with_trl", [True, False], ids=["TRL", "no TRL"])
def test_the_report(
    with_trl: bool,
    options: list[object],
    here: list[str],
    tmp_path: Path,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpo, "find_spec", lambda name: with_trl or None)
    done = bench("grpo", *options, "--json", tmp_path / "out.json")
    assert done.status == 0, done.err
    trl = ["grpo_trl.py"] if with_trl else []
    updates = [f"grpo_update.py {what}" for what in ("shared", "repeated", "difference")]
    assert here == ["minigpt fit", *trl, *updates]
    report = json.loads((tmp_path / "out.json").read_text())
    (ours,) = report["runs"]["minigpt"]
    assert ours["steps"] == 2
    assert ours["samples_per_s"] == pytest.approx(6 / ours["step_s"])
    assert ours["rollout_s"] + ours["update_s"] == pytest.approx(ours["step_s"])
    assert 0 < ours["answer_tokens"] <= 5
    assert 0 < report["gradient_difference"] < 1e-5  # computed in two ways
    shared, repeated = (report[f"{arm}_targets_per_s"] for arm in ("shared", "repeated"))
    assert report["ratio_shared"] == pytest.approx(shared / repeated)
    assert "target tokens/s" in done.out
    if with_trl:
        assert report["ratio"] == pytest.approx(ours["samples_per_s"] / 2)
        assert report["memory_share"] == pytest.approx(ours["peak_rss_mb"] / 100_000)
        assert f"{report['ratio']:.2f}x, with" in done.out
    else:
        assert "it needs: pip install 'minigpt[bench]'" in done.err
        assert "ratio" not in report


def test_a_group_has_the_same_targets_with_its_prompt_once_or_repeated() -> None:
    work = grpo.Workload(
        start="", rows="", directory="", precision="32-true", device="cpu", prompts=1,
        generations=3, completion=5, longest_prompt=1, prompt_length=40, steps=1, seconds=1,
    )  # fmt: skip
    shared, repeated = (grpo_update.batch_of(work, 290, what) for what in (False, True))
    assert shared.labels.tolist() == repeated.labels.tolist()
    assert len(shared.labels) == 15
    assert shared.advantages.tolist() == repeated.advantages.tolist()
    assert (shared.n_tokens, repeated.n_tokens) == (40 + 3 * 5, 3 * (40 + 5))


def test_questions_are_what_comes_before_the_last_answer(tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = [{"role": role, "content": content} for role, content in turns]
    tiny_runs.write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}])
    (question,) = grpo.questions_of(str(tmp_path / "chats.jsonl"))
    assert [message.content for message in question] == ["s", "a", "b", "c"]


@pytest.mark.large
@pytest.mark.skipif(not find_spec("trl"), reason="the extra `bench` is not installed")
def test_trl_takes_the_same_samples(options: list[object], tmp_path: Path) -> None:
    arguments = {"prompts": 2, "generations": 3, "completion": 5, "prompt_length": 40, "steps": 2}
    data, size = options[options.index("--data") + 1], options[options.index("--size") + 1]
    work = grpo.prepare(
        Namespace(
            **arguments,
            seconds=1,
            data=str(data),
            size=str(size),
            tokenizer=None,
            vocabulary=290,
            precision="fp32",
        ),
        tmp_path,
    )
    file, result = tmp_path / "work.json", tmp_path / "result.json"
    file.write_text(json.dumps(vars(work)))
    script = str(Path(grpo.__file__).with_name("grpo_trl.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(file), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(result.read_text())
    assert figures["steps"] == 2
    assert figures["samples_per_s"] == pytest.approx(6 / figures["step_s"])
    assert 0 < figures["rollout_s"] < figures["step_s"]
    assert 0 < figures["answer_tokens"] <= 5
