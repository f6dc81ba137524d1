"""Tiny data and configs, to run whole stages within a second or two."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt.data import tokenizer as tokenizers

WORDS = "the a cat dog sun rain sits runs sings on under near mat log hill and then so red blue"
ARCHITECTURE = {
    "hidden_size": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn": 48,
    "max_positions": 128,
}
STAGES = ("pretrain", "sft", "dpo", "lora")
_KINDS = {"pretrain": "Pretrain", "sft": "SFT", "dpo": "DPO", "kto": "KTO", "lora": "LoRA"}
_KINDS |= {"grpo": "GRPO", "reward": "Reward"}
Fit = Callable[..., Any]  # what the fixture `fit` gives
RUN: dict[str, Any] = {
    "trainer__max_steps": 6,
    "trainer__val_check_interval": 3,
    "model__init_args__sample_prompts": ["the cat"],
    "model__init_args__sampling": {"max_new_tokens": 4},
    "checkpoint": {"every": 2, "keep": 5},
}
_BEFORE = dict.fromkeys(("dpo", "kto", "lora", "grpo", "reward"), "sft") | {"sft": "pretrain"}
_FILES = {"lora": "sft", "reward": "dpo"}  # of stages that have none of their own
# Where a stage's options are not those of all.
_DATA: dict[str, dict[str, Any]] = {
    "grpo": {
        "prompts_per_batch": 4,
        "num_generations": 4,
        "max_completion_length": 6,
    }
}


def _sentence(rng: random.Random, longest: int = 14) -> str:
    return " ".join(rng.choices(WORDS.split(), k=rng.randint(2, longest)))


def _chat(rng: random.Random) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * rng.randint(1, 2)
    return [{"role": role, "content": _sentence(rng)} for role in roles]


def _preference(rng: random.Random) -> dict[str, str]:
    good, bad = _sentence(rng), _sentence(rng, 24)
    return {"prompt": _sentence(rng), "chosen": good, "rejected": f"{bad} no"}


def _unpaired(rng: random.Random, number: int) -> dict[str, Any]:
    pair = _preference(rng)
    completion = pair["chosen" if number % 3 else "rejected"]
    return {"prompt": pair["prompt"], "completion": completion, "label": number % 3 > 0}


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(root: Path) -> Path:
    """Write a tokenizer, training and held-out files of all kinds, an exam and prompts."""
    rng = random.Random(0)
    for name, rows in (("", 48), ("_val", 10)):
        texts = [{"text": _sentence(rng, 40)} for _ in range(rows)]
        write_jsonl(root / f"pretrain{name}.jsonl", texts)
        write_jsonl(root / f"sft{name}.jsonl", [{"messages": _chat(rng)} for _ in range(rows)])
        write_jsonl(root / f"dpo{name}.jsonl", [_preference(rng) for _ in range(rows)])
        write_jsonl(root / f"grpo{name}.jsonl", [{"prompt": text["text"][:9]} for text in texts])
        others = random.Random(rows)  # the exam and the prompts stay what they are
        write_jsonl(root / f"kto{name}.jsonl", [_unpaired(others, n) for n in range(rows)])
    asked = [{"role": "user", "content": "the cat"}]
    exam = [
        {"id": f"{family}-{i}", "family": family, "messages": asked, "answer": answer}
        for family, answer, count in (("empty", "", 2), ("odd", "no such reply", 3))
        for i in range(count)
    ]
    write_jsonl(root / "exam.jsonl", exam)
    prompts = [{"prompt": _sentence(rng), "mark": mark} for mark in range(7)]
    write_jsonl(root / "prompts.jsonl", prompts)
    tokenizer = tokenizers.train([root / "pretrain.jsonl", root / "sft.jsonl"], 320)
    tokenizer.save_pretrained(str(root / "tokenizer"))
    return root


def config(root: Path, stage: str, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Return a stage's config; `changes` are dotted paths with `__` for each dot."""
    data = _FILES.get(stage, stage)
    run_config: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {
            "class_path": f"{_KINDS[stage]}Module",
            "init_args": {"optimizer": {"lr": 0.01}, "schedule": {"warmup": 1, "decay": 1}},
        },
        "data": {
            "class_path": f"{_KINDS[data]}DataModule",
            "init_args": {
                "train": str(root / f"{data}.jsonl"),
                "val": str(root / f"{data}_val.jsonl"),
                "max_length": 64,
                **_DATA.get(stage, {"tokens_per_batch": 256}),
            },
        },
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
        },
    }
    start: dict[str, Any] = run_config["model"]["init_args"]
    if stage == "pretrain":
        start |= {"tokenizer": str(root / "tokenizer"), "architecture": dict(ARCHITECTURE)}
    else:
        start["init_from"] = str(root / _BEFORE[stage])
    for path, value in changes.items():
        *folders, name = path.split("__")
        section = run_config
        for folder in folders:
            section = section.setdefault(folder, {})
        section[name] = value
    return run_config


def arguments(verb: str, run_config: dict[str, Any], *more: str) -> list[str]:
    """Write a config beside its run directory and return the command line that uses it."""
    run_dir = Path(run_config["run_dir"])
    file = run_dir.with_name(f"{run_dir.name}-{verb}.yaml")
    file.write_text(json.dumps(run_config))  # JSON is YAML
    return [verb, "--config", str(file), *more]


def metrics(run_dir: Path, name: str = "train/loss") -> list[float]:
    """Return a metric's values in the order in which they were logged."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def assert_refused(outcome: Any, *fragments: object) -> str:
    """Assert that a command was refused in one paragraph that holds the fragments."""
    assert outcome.status == 2
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("minigpt: ")
    assert "Traceback" not in outcome.err
    assert len(re.findall("^minigpt: ", outcome.err, re.MULTILINE)) == 1
    for fragment in fragments:
        assert str(fragment) in last
    return last
