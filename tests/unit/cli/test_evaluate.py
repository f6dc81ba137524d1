"""The command line of `minigpt evaluate`, on tiny trained models."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_runs import write_jsonl

from minigpt.evaluate import harness
from minigpt.infer.engine import Engine, Sampling

Minigpt = Callable[..., Any]
Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[3]
CHOICES = [
    {"family": f, "prompt": "the cat", "choices": [" sits", " runs", " sings"], "answer": i % 3}
    for i, f in enumerate("aabb")
]
USER = {"role": "user", "content": "a"}
PAIRS = [{"good": "the cat sits", "bad": "cat the sits"}, {"good": "a dog", "bad": "dog a"}]
TASK = """task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_bytes}]
"""


def needs_harness(test: Callable[..., None]) -> Any:
    missing = importlib.util.find_spec("lm_eval") is None
    skip = pytest.mark.skipif(missing, reason="lm-evaluation-harness is not installed")
    return pytest.mark.filterwarnings("ignore")(skip(test))  # of the harness and its imports


@pytest.fixture
def files(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of every kind, in the current directory."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "choices.jsonl", CHOICES)
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "task.yaml").write_text(TASK)
    for name in ("pretrain_val", "dpo_val", "exam", "prompts"):
        (tmp_path / f"{name}.jsonl").write_bytes((trained / f"{name}.jsonl").read_bytes())
    return tmp_path


def values(path: Path, model: Path | str) -> dict[str, dict[str, float]]:
    tests = json.loads(path.read_text())["models"][str(model)]
    return {t: {name: one["value"] for name, one in scores.items()} for t, scores in tests.items()}


def test_folders_and_patterns(minigpt: Minigpt, trained: Path, files: Path) -> None:
    (files / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (files / "texts" / name).write_text("the cat sat on the mat")
    for given in ("texts", "texts/*.txt"):
        text = ("--text", given, "--json", "scores.json")
        assert minigpt("evaluate", "--model", trained / "sft", *text).status == 0
        assert set(values(files / "scores.json", trained / "sft")) == {
            "text texts/a.txt",
            "text texts/b.txt",
        }


def test_two_models_on_everything(minigpt: Minigpt, trained: Path, files: Path) -> None:
    models = (trained / "pretrain", trained / "sft")
    outcome = minigpt(
        *("evaluate", "--model", *models, "--text", "pretrain_val.jsonl", "--max_length", "64"),
        *("--choices", "choices.jsonl", "--pairs", "pairs.jsonl", "--exam", "exam.jsonl"),
        *("--prompts", "prompts.jsonl", "--max_new_tokens", "6", "--temperature", "0.5"),
        *("--seed", "3", "--json", "out/scores.json", "--html", "out/scores.html"),
    )
    assert (outcome.status, outcome.err) == (0, "")
    first, second = (values(files / "out/scores.json", model) for model in models)
    assert first["text pretrain_val.jsonl"] != second["text pretrain_val.jsonl"]
    assert first["exam exam.jsonl"].keys() == {"right", "empty", "odd"}
    assert first["prompts prompts.jsonl"]["length"] <= 6
    lines = outcome.out.splitlines()
    assert lines[0].split() == [*map(str, models), "chance", "items"]
    (choices,) = [line for line in lines if line.startswith("  accuracy (sum)")]
    assert choices.endswith("33.3%   4")
    page = (files / "out/scores.html").read_text()
    assert page.count("<figure>") == 4  # what holds shares: choices, pairs, exam, generation
    assert "<td>accuracy (sum)</td>" in page


def test_an_error_loses_no_finished_result(minigpt: Minigpt, trained: Path, files: Path) -> None:
    write_jsonl(files / "long.jsonl", [{**CHOICES[0], "prompt": "the cat " * 100}])
    model = trained / "sft"
    config = json.loads((model / "hf/config.json").read_text())
    shutil.copytree(model / "hf", longer := files / "longer")
    config["max_position_embeddings"] = 1024
    (longer / "config.json").write_text(json.dumps(config))
    outcome = minigpt(
        *("evaluate", "--model", longer, model, "--choices", "choices.jsonl", "long.jsonl"),
        *("--pairs", "pairs.jsonl", "--json", "s.json", "--html", "s.html"),
    )
    assert outcome.status == 2
    assert "more than the 128 that the model reads" in outcome.err
    first, second = (values(files / "s.json", one) for one in (longer, model))
    assert list(first) == ["choices choices.jsonl", "choices long.jsonl", "pairs pairs.jsonl"]
    assert list(second) == ["choices choices.jsonl"]
    (accuracy,) = [line for line in outcome.out.splitlines() if "sum" in line and "–  " in line]
    assert accuracy.endswith("33.3%   1")
    assert "<h2>pairs pairs.jsonl</h2>" in (files / "s.html").read_text()


def test_bits_per_byte_are_those_of_training(
    minigpt: Minigpt, trained: Path, files: Path, fit: Minigpt
) -> None:
    assert fit("pretrain", trainer__val_check_interval=3).status == 0
    options = ("--text", "pretrain_val.jsonl", "--max_length", "64", "--json", "s.json")
    assert minigpt("evaluate", "--model", "run", *options).status == 0
    final = json.loads((files / "run/summary.json").read_text())["final"]
    scores = values(files / "s.json", "run")["text pretrain_val.jsonl"]
    assert scores["bits_per_byte"] == pytest.approx(final["val/bits_per_byte"], rel=1e-5)
    assert scores["loss"] == pytest.approx(final["val/loss"], rel=1e-5)


def test_preferences_are_those_of_training(
    minigpt: Minigpt, trained: Path, files: Path, fit: Minigpt
) -> None:
    changes = {"trainer__val_check_interval": 3, "model__init_args__beta": 0.2}
    assert fit("dpo", **changes).status == 0
    options = ("--preferences", "dpo_val.jsonl", "--max_length", "64", "--json", "s.json")
    outcome = minigpt(
        "evaluate", "--model", "run", "--reference", trained / "sft", *options, "--beta", "0.2"
    )
    assert (outcome.status, outcome.err) == (0, "")
    scores = values(files / "s.json", "run")["preferences dpo_val.jsonl"]
    final = json.loads((files / "run/summary.json").read_text())["final"]
    assert scores["accuracy"] == pytest.approx(final["val/rewards/accuracy"])
    assert scores["margin"] == pytest.approx(final["val/rewards/margin"], rel=1e-4)
    assert scores["KL per token"] > 0


def test_the_seed_and_the_temperature_reach_the_replies(
    minigpt: Minigpt, trained: Path, files: Path
) -> None:
    def health(*options: object) -> dict[str, float]:
        common = ("--prompts", "prompts.jsonl", "--max_new_tokens", "20", "--json", "s.json")
        assert minigpt("evaluate", "--model", trained / "sft", *common, *options).status == 0
        return values(files / "s.json", trained / "sft")["prompts prompts.jsonl"]

    assert health() == health("--seed", "5")
    assert health("--temperature", "3") != health("--temperature", "3", "--seed", "5")


@needs_harness
def test_the_harness_gives_the_same_numbers(
    minigpt: Minigpt, trained: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(files / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    task = ROOT / "data/eval/choices.yaml"
    options = ("--choices", ROOT / "data/eval/choices.jsonl", "--lm-eval", task, "--json", "s.json")
    outcome = minigpt("evaluate", "--model", trained / "sft", *options)
    assert outcome.status == 0, outcome.err
    ours, theirs = values(files / "s.json", trained / "sft").values()
    name = "lantern_valley_choices"
    assert theirs[f"{name}: acc"] == pytest.approx(ours["accuracy (sum)"], abs=1e-3)
    assert theirs[f"{name}: acc_bytes"] == pytest.approx(ours["accuracy"], abs=1e-3)


@pytest.mark.large
@needs_harness
def test_all_kinds_of_requests_of_the_harness(
    minigpt: Minigpt, trained: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(files / "cache"))
    head = TASK.partition("output_type")[0]
    (files / "words.yaml").write_text(
        head.replace("tiny", "words") + "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{prompt}}"\nmetric_list: [{metric: byte_perplexity}]\n'
    )
    (files / "said.yaml").write_text(
        head.replace("tiny", "said") + 'output_type: generate_until\ndoc_to_text: "{{prompt}}"\n'
        'doc_to_target: "no"\ngeneration_kwargs: {until: [" "], max_gen_toks: 4}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    options = ("--lm_eval", "words.yaml", "said.yaml", "--json", "s.json")
    outcome = minigpt("evaluate", "--model", trained / "sft", *options)
    assert outcome.status == 0, outcome.err
    scores = values(files / "s.json", trained / "sft")
    assert scores["lm_eval said.yaml"] == {"said: exact_match": 0.0}
    engine = Engine.load(trained / "sft")
    (logp,) = harness.score(engine, [(engine.encode(""), engine.encode("the cat"))])[0]
    expected = 2.718281828 ** (-logp / len("the cat"))
    assert scores["lm_eval words.yaml"]["words: byte_perplexity"] == pytest.approx(
        expected, rel=1e-4
    )


@needs_harness
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("- 1", "cannot run the task: ValueError"),
        (TASK.replace("choices.jsonl", "none.jsonl"), "cannot run the task: FileNotFoundError"),
        (TASK.replace("doc_to_target: answer", 'doc_to_target: "{{1/0}}"'), "ZeroDivisionError"),
    ],
)
def test_tasks_that_cannot_run(
    minigpt: Minigpt, trained: Path, files: Path, task: str, message: str
) -> None:
    (files / "task.yaml").write_text(task)
    outcome = minigpt("evaluate", "--model", trained / "sft", "--lm-eval", "task.yaml")
    assert outcome.status == 2
    assert "minigpt: task.yaml: lm-evaluation-harness" in outcome.err
    assert message in outcome.err


def test_a_task_says_where_its_replies_end() -> None:
    options = harness._sampling({"until": ["\n", "", " "], "max_gen_toks": 4})
    assert options == Sampling(4, stop=("\n", " "))
    assert harness._sampling({"until": "c"}).stop == ("c",)
    assert harness._sampling({"until": None}) == Sampling(harness.MAX_NEW)


def test_a_reference_is_loaded_once(
    minigpt: Minigpt, trained: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = Engine.load
    monkeypatch.setattr(Engine, "load", lambda path: loaded.append(str(path)) or load(path))
    models, reference = [str(trained / "sft"), str(trained / "lora")], trained / "sft" / "hf"
    preferences = ("--preferences", "dpo_val.jsonl", "--reference", reference)
    outcome = minigpt("evaluate", "--model", *models, *preferences)
    assert outcome.status == 0, outcome.err
    assert sorted(loaded) == sorted([*models, str(reference)])


def test_it_stays_offline(
    minigpt: Minigpt, trained: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    minigpt("evaluate", "--model", trained / "sft", "--lm-eval", "none.yaml")
    assert os.environ["HF_DATASETS_OFFLINE"] == "1"
    monkeypatch.delenv("HF_DATASETS_OFFLINE")


def test_without_the_harness(
    minigpt: Minigpt, trained: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    outcome = minigpt("evaluate", "--model", trained / "sft", "--lm-eval", "task.yaml")
    assert outcome.status == 2
    assert "pip install 'minigpt[lm-eval]'" in outcome.err


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        ("choices", CHOICES[0], {"choices": ["b", "c"], "answer": 0}, "2: not a prompt row"),
        ("pairs", PAIRS[0], {"good": "a"}, "2:bad: must be a string"),
        ("exam", {"messages": [USER], "answer": "b"}, {"messages": []}, "2:messages"),
        ("text", {"text": "a"}, {"txt": "a"}, "2: not a text row"),
        (
            "preferences",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "a", "chosen": "b"},
            "2: not a preference row",
        ),
        ("prompts", {"prompt": "a"}, {"prompt": 3}, "2:prompt: must be"),
    ],
)
def test_a_bad_row_is_named_before_a_model_is_loaded(
    minigpt: Minigpt, files: Path, kind: str, good: Row, bad: Row, message: str
) -> None:
    write_jsonl(files / "bad.jsonl", [good, bad])
    outcome = minigpt("evaluate", "--model", "./none", f"--{kind}", "bad.jsonl")
    assert outcome.status == 2
    assert outcome.err.startswith(f"minigpt: bad.jsonl:{message}")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "There is nothing to measure"),
        (("--text", "none.jsonl"), "none.jsonl: cannot be read: No such file"),
        (("--text", "none.txt"), "none.txt: cannot be read"),
        (("--text", "empty.txt"), "empty.txt:1:text: is empty"),
        (("--text", "pretrain_val.jsonl", "--reference", "x"), "--reference is what"),
        (("--choices", "chat.jsonl"), "no chat template: give 'prompt'"),
        (("--choices", "long.jsonl"), "more than the 128 that the model reads"),
        (("--json", "empty.txt/x.json", "--pairs", "pairs.jsonl"), "write to empty.txt/x.json"),
    ],
)
def test_bad_input(
    minigpt: Minigpt, trained: Path, files: Path, args: tuple[str, ...], message: str
) -> None:
    (files / "empty.txt").touch()
    chat = {"messages": [{"role": "user", "content": "a"}], "choices": ["b", "c"], "answer": 0}
    write_jsonl(files / "chat.jsonl", [chat])
    write_jsonl(files / "long.jsonl", [{**CHOICES[0], "prompt": "the cat " * 100}])
    model = trained / "pretrain"
    if "template" in message:
        model = files / "plain"
        Engine.load(trained / "pretrain").model.save_pretrained(model)
        tiny.tokenizer(model, template=False)
    outcome = minigpt("evaluate", "--model", model, *args)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_the_same_model_twice(minigpt: Minigpt, trained: Path, files: Path) -> None:
    model = trained / "sft"
    outcome = minigpt("evaluate", "--model", model, model, "--pairs", "pairs.jsonl")
    assert outcome.status == 2
    assert "twice" in outcome.err
