"""`minigpt report`, on the runs of tiny stages and on what may be wrong with a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import damage
import pytest
import tiny_runs
import yaml
from hypothesis import strategies as st

from minigpt.errors import ConfigError
from minigpt.export.card import stages
from minigpt.report.build import write_report
from minigpt.report.runs import RUN_FILES, read_run

Minigpt = Callable[..., Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pretraining runs and one of SFT with an exam."""
    from minigpt.__main__ import main

    root = tiny_runs.write_data(tmp_path_factory.mktemp("runs"))
    for name, stage in (("pretrain", "pretrain"), ("again", "pretrain"), ("sft", "sft")):
        changes = dict(tiny_runs.RUN)
        if stage == "sft":
            changes["data__init_args__exam"] = [str(root / "exam.jsonl")]
        config = tiny_runs.config(root, stage, root / name, **changes)
        assert main(tiny_runs.arguments("fit", config)) == 0
    assert main(["test", "--config", str(root / "sft/config.yaml")]) == 0
    return root


def test_a_run_is_read_whole(runs: Path) -> None:
    run = read_run(runs / "sft")
    assert (run.name, run.stage, run.gaps) == ("sft", "SFT", [])
    assert [step for step, _ in run.series("val/loss")] == [0, 2, 5]
    assert len(run.series("train/loss")) == 6
    assert {(step, prompt) for step, prompt, _ in run.samples} == {
        (0, "the cat"),
        (3, "the cat"),
        (6, "the cat"),
    }


def test_exams_of_the_demo_are_left_out_in_a_run_on_other_data(tmp_path: Path) -> None:
    replies = [{"family": family, "right": True} for family in ("skills", "law")]
    exam = {"scores": {}, "replies": replies, "demo_families": ["skills"]}
    (tmp_path / "exam.json").write_text(json.dumps(exam))
    write_report([tmp_path], tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text()
    assert "| law | 100.0%" in text
    assert "| skills" not in text
    assert "skills is an exam of the demo, and the run has other data." in text


def test_an_exam_of_other_weights_is_left_out(tmp_path: Path) -> None:
    exam = {"step": 3, "replies": [{"family": "law", "right": True}]}
    (tmp_path / "exam.json").write_text(json.dumps(exam))
    (tmp_path / "summary.json").write_text(json.dumps({"exported": {"step": 6}}))
    write_report([tmp_path], tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text()
    assert "| law" not in text
    assert "exam.json is of step 3, the model of step 6" in text


def test_the_report_of_several_runs(runs: Path, minigpt: Minigpt, tmp_path: Path) -> None:
    output = tmp_path / "out/report.html"
    run_dirs = (runs / "pretrain", runs / "again", runs / "sft")
    outcome = minigpt("report", *run_dirs, "--output", output)
    assert (outcome.status, outcome.err) == (0, "")
    page, text = output.read_text(), output.with_suffix(".md").read_text()
    summary = json.loads((runs / "sft/summary.json").read_text())
    for part in ("<h2>Pretraining: pretrain, again</h2>", "<h2>SFT: sft</h2>", "pretrain train"):
        assert part in page
    for title in ("Loss", "Bits per byte", "Learning rate", "Gradient norm", "Throughput"):
        assert page.count(f"<figcaption>{title}") == 2
    assert f"{summary['tokens_seen']:,}" in text
    assert "| sft | train |" in text
    assert f"| 48 | 48 | {summary['data']['train'][0]['tokens']:,} |" in text
    assert summary["machine"]["torch"] in text
    assert "| empty | 0.0% (0.0–65.8) |" in text
    assert "| odd | 0.0% (0.0–56.1) |" in text
    assert "reply at step 6" in text
    assert "<details><summary>sft: over time</summary>\n\n| step | prompt | reply |" in text
    assert text.count("| 0 | the cat |") == 3
    lengths = dict(summary["data"]["train"][0]["lengths"])
    assert sum(lengths.values()) == summary["data"]["train"][0]["samples"]
    cut = summary["data"]["train"][0]["cut"]
    assert f"| {cut} | {cut / 48:.1%} |" in text
    assert f"sft train: samples by tokens ({cut / 48:.1%} of rows were longer)" in page
    assert all(f"<span>{label}</span>" in page for label in lengths)
    assert "max_length: 64" in page
    assert outcome.out.startswith("## Runs")
    assert outcome.out.endswith(f"written to {output} and report.md\n")


def test_scores_are_shown_with_the_runs(runs: Path, minigpt: Minigpt, tmp_path: Path) -> None:
    scores = {"right": {"value": 0.5, "n": 8, "low": 0.2, "high": 0.8, "chance": 0.25}}
    other = {"right": {"value": 0.25, "n": 8, "low": 0.1, "high": 0.5}, "bits": {"value": 1.5}}
    files = tmp_path / "a.json", tmp_path / "b.json"
    for file, model, test in zip(files, ("a|b", "c"), (scores, other), strict=True):
        file.write_text(json.dumps({"models": {model: {"exam <x>": test}}}))
    output = tmp_path / "report.html"
    assert minigpt("report", runs / "sft", "--output", output, "--results", *files).status == 0
    page, text = output.read_text(), output.with_suffix(".md").read_text()
    assert "<h2>exam &lt;x&gt;</h2>" in page
    assert "<figcaption>exam &lt;x&gt;: right</figcaption>" in page
    assert "|  | a\\|b | c | chance | items |" in text
    assert "| right | 50.0% (20.0–80.0) | 25.0% (10.0–50.0) | 25.0% | 8 |" in text
    assert "| bits | – | 1.5 |" in text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"models": {"a": 1}}',
        '{"models": {"a": {"b": {"c": 1}}}}',
        '{"models": {"a": {"b": {"c": {"value": "x"}}}}}',
        '{"models": {"a": {"b": {"c": {}}}}}',
    ],
)
def test_files_without_scores(runs: Path, minigpt: Minigpt, tmp_path: Path, content: str) -> None:
    (tmp_path / "s.json").write_text(content)
    output = tmp_path / "report.html"
    outcome = minigpt("report", runs / "sft", "--output", output, "--results", tmp_path / "s.json")
    assert outcome.status == 2
    assert "s.json holds no scores" in outcome.err
    assert "minigpt evaluate --json" in outcome.err
    assert not output.exists()


def test_one_run_is_reported_in_its_directory(runs: Path, minigpt: Minigpt, tmp_path: Path) -> None:
    shutil.copytree(runs / "pretrain", tmp_path / "run")
    assert minigpt("report", tmp_path / "run").status == 0
    assert (tmp_path / "run/report.html").is_file()
    assert (tmp_path / "run/report.md").is_file()


def test_a_file_beside_the_page_that_is_no_report_stays(
    runs: Path, minigpt: Minigpt, tmp_path: Path
) -> None:
    (notes := tmp_path / "notes.md").write_text("# Notes\n")
    arguments = ("report", runs / "sft", "--output", tmp_path / "notes.html")
    tiny_runs.assert_refused(minigpt(*arguments), f"{notes} is no report")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]
    assert notes.read_text() == "# Notes\n"
    notes.unlink()
    assert minigpt(*arguments).status == 0
    assert minigpt(*arguments).status == 0  # the report's own is replaced


def test_a_checkpoint_stands_for_its_run(runs: Path, minigpt: Minigpt) -> None:
    outcome = minigpt("report", str(runs / "sft" / "checkpoints" / "last"))
    assert outcome.status == 0
    assert f"written to {runs / 'sft' / 'report.html'}" in outcome.out


def test_an_introduction_stands_before_the_runs(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    beginning = write_report([runs / "sft"], output, introduce=lambda d: d.heading("First"))
    assert beginning == "## First\n"
    page = output.read_text()
    assert page.index("<h2>First</h2>") < page.index("<h2>SFT: sft</h2>")


def test_runs_of_the_same_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "pretrain", tmp_path / "pretrain")
    text = write_report([runs / "pretrain", tmp_path / "pretrain"], tmp_path / "r.html")
    assert f"| {runs / 'pretrain'} |" in text
    assert f"| {tmp_path / 'pretrain'} |" in text


GARBAGE = [
    b"",
    b"\xff\xfe\x00broken",
    b"[1, 2]",
    b'"text"',
    b"{",
    b'{"stage": 5, "data": 3, "machine": "x", "before": [1], "final": {"val/loss": "y"}}',
    b'{"data": {"train": [4], "val": {}}, "machine": {"torch": [1]}, "replies": [3, {}]}',
    b'{"model": "x", "data": {"init_args": {"train": ["a", "b"], "val": 7}}}',
    b'{"step": "x"}\n{"step": 1, "train/loss": NaN, "lr": 1}\n[3]\n',
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", GARBAGE)
def test_whatever_a_run_holds_there_is_a_report(runs: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(runs / "sft", tmp_path / "sft")
    (event,) = (tmp_path / "sft").glob("events.out.tfevents.*")
    for name in ("config.yaml", "summary.json", "metrics.jsonl", "exam.json", event.name):
        copy = tmp_path / name / "sft"
        shutil.copytree(runs / "sft", copy)
        (copy / name).write_bytes(content)
        write_report([copy], tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert page.endswith("</html>\n")
        assert "<h2>Runs</h2>" in page
        assert "<td>sft</td>" in page


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl"])
def test_gaps_are_told(runs: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(runs / "sft", tmp_path / "sft")
    (tmp_path / "sft" / name).write_bytes(b"\xff")
    write_report([tmp_path / "sft"], tmp_path / "report.html")
    assert f"sft: {name} is damaged" in (tmp_path / "report.md").read_text()
    (tmp_path / "sft" / name).unlink()
    write_report([tmp_path / "sft"], tmp_path / "report.html")
    assert f"sft: {name} is missing." in (tmp_path / "report.html").read_text()


def test_a_cut_off_line_of_metrics_is_told(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "sft", tmp_path / "sft")
    with (tmp_path / "sft/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')
    run = read_run(tmp_path / "sft")
    assert run.gaps == ["metrics.jsonl: 1 damaged lines were left out"]
    assert len(run.series("train/loss")) == 6


def test_markup_in_a_run_is_text(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "sft", tmp_path / "<em>|x")
    write_report([tmp_path / "<em>|x"], tmp_path / "report.html")
    assert "<em>" not in (tmp_path / "report.html").read_text()
    assert "| <em>\\|x |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("none",), "There is no run in none"),
        ((".",), "minigpt fit"),
        (("sft", "--output", "x.txt"), "must end in .html"),
        (("sft", "--output", "file/x.html"), "Cannot write to file/x.html"),
        ((), "the following arguments are required: runs"),
    ],
)
def test_bad_input(
    runs: Path,
    minigpt: Minigpt,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft").symlink_to(runs / "sft")
    (tmp_path / "file").touch()
    outcome = minigpt("report", *args)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@damage.counts
def test_damaged_runs_are_reported_or_refused(runs: Path, tmp_path: Path, count: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "sft", run, ignore=shutil.ignore_patterns("checkpoints", "hf"))
    scores = {"models": {"a": {"exam": {"skills": {"value": 0.5, "n": 4, "low": 0.1, "high": 1}}}}}
    (run / "scores.json").write_text(json.dumps(scores))
    undamaged = {name: (run / name).read_bytes() for name in (*RUN_FILES, "scores.json")}
    lines = undamaged["metrics.jsonl"].splitlines()
    config = yaml.safe_load(undamaged["config.yaml"])
    damaged = [
        damage.damaged_json(json.loads(undamaged[name])).map(lambda new, name=name: (name, new))
        for name in ("summary.json", "exam.json", "scores.json")
    ]
    damaged += [
        damage.damaged_json(config).map(lambda new: ("config.yaml", new)),
        damage.damaged_json(json.loads(lines[0])).map(lambda new: ("metrics.jsonl", new)),
    ]
    damaged += [
        damage.damaged_bytes(content).map(lambda new, name=name: (name, new))
        for name, content in undamaged.items()
    ]

    def read(example: tuple[str, bytes]) -> None:
        name, content = example
        (run / name).write_bytes(content)
        try:
            write_report([run], tmp_path / "report.html", [run / "scores.json"])
            with suppress(ConfigError):
                stages(run)
        finally:
            (run / name).write_bytes(undamaged[name])

    damage.assert_read_or_refused(count, st.one_of(damaged), read)


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_pipe_in_a_run_is_a_gap(runs: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "sft", run, ignore=shutil.ignore_patterns("checkpoints", "hf"))
    (run / name).unlink()
    os.mkfifo(run / name)
    assert f"{name} is damaged: {name} is no regular file" in read_run(run).gaps
