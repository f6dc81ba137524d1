#!/usr/bin/env python
"""Every stage on the bundled data, one after the other, with its exam, and a report.

`make pipeline` runs this. Each finished stage leaves a record in outputs/pipeline/, so a
second run goes on after the last finished stage; `--force` starts over.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from minigpt.infer.engine import Engine

OUT = Path("outputs")
RECORDS = OUT / "pipeline"
VOCABULARY = 2048
GENERAL = ("asked_new_wording", "never_asked", "skills")
REWARDED = ("reverse_digits", "sort_digits")  # the skills of configs/grpo.yaml
Record = dict[str, Any]


def main() -> int:
    """Run the stages that have no record yet, then write the report."""
    parser = argparse.ArgumentParser(description="Train and examine every stage.")
    parser.add_argument("--force", action="store_true", help="start over")
    parser.add_argument("--configs", default="configs", help="folder of the stages' configs")
    args = parser.parse_args()
    os.chdir(ROOT)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("minigpt").setLevel(logging.INFO)
    if args.force:
        for name in ("pipeline", "tokenizer", *STAGES):
            shutil.rmtree(OUT / name, ignore_errors=True)
    from minigpt.errors import MiniGPTError

    try:
        records = run_stages(args.configs)
    except MiniGPTError as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit):  # the latter is Lightning's answer to Ctrl-C
        print("pipeline: interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    write_report(records)
    return 0


def run_stages(configs: str) -> dict[str, Record]:
    """Run the stages without a record, and all after the first of them; return the records."""
    records: dict[str, Record] = {}
    anew = False
    for name, stage in STAGES.items():
        if anew:
            (RECORDS / f"{name}.json").unlink(missing_ok=True)
            shutil.rmtree(OUT / name / "checkpoints", ignore_errors=True)
        anew = anew or not (RECORDS / f"{name}.json").is_file()
        records[name] = recorded(name, stage, configs)
    return records


def recorded(name: str, stage: Callable[[str], Record], configs: str) -> Record:
    """Return a stage's record, running the stage when it has none."""
    file = RECORDS / f"{name}.json"
    if file.is_file():
        print(f"[{name}] done before", flush=True)
        return json.loads(file.read_text())  # type: ignore[no-any-return]
    from minigpt.files import write_json

    print(f"[{name}]", flush=True)
    start = time.perf_counter()
    record = stage(configs)
    record["seconds"] = round(time.perf_counter() - start, 1)
    write_json(file, record)
    return record


def train_tokenizer(configs: str) -> Record:
    """Train the tokenizer on the pretraining text."""
    from minigpt.cli.tokenizer import train_to

    files = ["data/pretrain.jsonl"]
    ratio = train_to(OUT / "tokenizer", files, VOCABULARY, overwrite=True)
    return {"chars_per_token": ratio}


def fit(stage: str, configs: str) -> Record:
    """Train a stage (on from its newest checkpoint if it was cut off); return its summary."""
    from minigpt.cli.trainer import run
    from minigpt.runs.checkpoints import newest_checkpoint

    resume = ["--ckpt_path", "auto"] if newest_checkpoint(OUT / stage) else ["--overwrite", "true"]
    run(["fit", "--config", f"{configs}/{stage}.yaml", "--run_dir", str(OUT / stage), *resume])
    return json.loads((OUT / stage / "summary.json").read_text())  # type: ignore[no-any-return]


def fit_once(run_dir: Path, options: Mapping[str, object], more: Sequence[str]) -> None:
    """Train into a run directory by options and further ones, unless that run is finished."""
    from minigpt.cli.trainer import run

    if not (run_dir / "summary.json").is_file():
        options = {**options, "--run_dir": run_dir, "--overwrite": "true"}
        run(["fit", *(f"{name}={value}" for name, value in options.items()), *more])


def examine(engine: Engine, *families: str) -> dict[str, float]:
    """Run exams on a model; return each family's share of right replies."""
    from minigpt.evaluate.exam import accuracies, load_items, run_eval
    from minigpt.infer.engine import Sampling

    files = [f"data/exam/{family}.jsonl" for family in families]
    items = [item for file in files for item in load_items(file, "exam")]
    return accuracies(run_eval(engine, items, Sampling(max_new_tokens=64)))


def mean(scores: dict[str, float], families: Sequence[str] = GENERAL) -> float:
    """Return the mean of some families, by default those of the general exam."""
    return sum(scores[family] for family in families) / len(families)


def load(stage: str, merged: bool = True) -> Engine:
    """Load a stage's model for inference."""
    from minigpt.infer.engine import Engine

    return Engine.load(OUT / stage, merged=merged)


def exam_and_style(model: str | Path) -> tuple[float, float]:
    """Return a model's scores in the general exam and in style."""
    from minigpt.infer.engine import Engine

    families = examine(Engine.load(model), *GENERAL, "style")
    return mean(families), families["style"]


def pretrain(configs: str) -> Record:
    """Pretrain; the exam before SFT shows what the text alone teaches."""
    summary = fit("pretrain", configs)
    return {
        "val_bpb": summary["final"]["val/bits_per_byte"],
        "val_bpb_untrained": summary["before"]["val/bits_per_byte"],
        "useful_tokens_per_s": summary["useful_tokens_per_s"],
        "exam_before_sft": examine(load("pretrain"), *GENERAL),
    }


def sft(configs: str) -> Record:
    """Fine-tune on chats; the general exam before and after."""
    before = json.loads((RECORDS / "pretrain.json").read_text())["exam_before_sft"]
    summary = fit("sft", configs)
    scores = examine(load("sft"), *GENERAL, "style", "advice", "medical")
    return {
        "exam_before": mean(before),
        "exam_after": mean(scores),
        "families": {family: scores[family] for family in GENERAL},
        "style": scores["style"],
        "advice": scores["advice"],
        "medical": scores["medical"],
        "useful_tokens_per_s": summary["useful_tokens_per_s"],
    }


def dpo(configs: str) -> Record:
    """Train on preferences; style before and after, and what the general exam lost."""
    summary = fit("dpo", configs)
    scores = examine(load("dpo"), *GENERAL, "style", "advice")
    return {
        "reward_accuracy": summary["final"]["val/rewards/accuracy"],
        "preferred_style_before": json.loads((RECORDS / "sft.json").read_text())["style"],
        "preferred_style_after": scores["style"],
        "right_advice_before": json.loads((RECORDS / "sft.json").read_text())["advice"],
        "right_advice_after": scores["advice"],
        "exam_after": mean(scores),
        "useful_tokens_per_s": summary["useful_tokens_per_s"],
    }


def reward(configs: str) -> Record:
    """Train a judge of answers; beside it, what length and words alone tell of the same pairs."""
    summary = fit("reward", configs)
    final = summary["final"]
    return {
        "accuracy": final["val/rewards/accuracy"],
        "accuracy_by_length": final["val/accuracy_by_length"],
        "accuracy_by_words": final["val/accuracy_by_words"],
        "useful_tokens_per_s": summary["useful_tokens_per_s"],
    }


def grpo(configs: str) -> Record:
    """Learn skills from rewards; these before and after, and what the other exams lost."""
    before = examine(load("dpo"), *REWARDED)
    summary = fit("grpo", configs)
    scores = examine(load("grpo"), *REWARDED, *GENERAL, "style")
    return {
        "skills_before": mean(before, REWARDED),
        "skills_after": mean(scores, REWARDED),
        "families_before": before,
        "families_after": {family: scores[family] for family in REWARDED},
        "exam_after": mean(scores),
        "preferred_style_after": scores["style"],
        "useful_tokens_per_s": summary["useful_tokens_per_s"],
    }


def lora(configs: str) -> Record:
    """Train an adapter for the domain; check that it can be merged and switched off."""
    from minigpt.evaluate.exam import load_items
    from minigpt.infer.engine import Sampling

    summary = fit("lora", configs)
    merged, beside = load("lora"), load("lora", merged=False)
    scores = examine(merged, *GENERAL, "medical")
    prompts = [item.prompt for item in load_items("data/exam/medical.jsonl", "exam")]
    replies = [engine.complete(prompts, Sampling()) for engine in (merged, beside)]
    return {
        "domain_before": json.loads((RECORDS / "sft.json").read_text())["medical"],
        "domain_after": scores["medical"],
        "exam_after": mean(scores),
        "merged_equals_adapter": [r.ids for r in replies[0]] == [r.ids for r in replies[1]],
        "adapter_off_equals_base": off_equals_base(beside),
        "useful_tokens_per_s": summary["useful_tokens_per_s"],
    }


def off_equals_base(engine: Engine) -> bool:
    """Whether the model with its adapter switched off gives the same logits as the base."""
    import torch

    ids = torch.tensor([engine.encode("Mira Tolan")])
    base = load("sft").model
    with torch.no_grad(), engine.adapter.disable_adapter():
        return torch.equal(engine.model(ids).logits, base(ids).logits)


STAGES: dict[str, Callable[[str], Record]] = {
    "tokenizer": train_tokenizer,
    "pretrain": pretrain,
    "sft": sft,
    "dpo": dpo,
    "reward": reward,
    "grpo": grpo,
    "lora": lora,
}


def write_report(records: dict[str, Record]) -> None:
    """Write report.json, report.html and report.md, and print the exam table."""
    from pipeline_report import add_pipeline

    from minigpt.files import write_json
    from minigpt.machine import machine
    from minigpt.report.build import write_report

    seconds = {name: record.pop("seconds") for name, record in records.items()}
    seconds["total"] = round(sum(seconds.values()), 1)
    files = [*Path("data/exam").glob("*.jsonl"), *Path("data").glob("dpo_val.jsonl")]
    items = {file.stem: len(file.read_bytes().splitlines()) for file in sorted(files)}
    report = {"seconds": seconds, "machine": machine(), "items": items, "stages": records}
    write_json(RECORDS / "report.json", report)
    runs = [OUT / name for name in STAGES if (OUT / name / "config.yaml").is_file()]
    page = RECORDS / "report.html"
    section = write_report(runs, page, introduce=lambda document: add_pipeline(document, report))
    print(f"\n{section}")
    print(f"written to {RECORDS}/report.html, report.md and report.json")


if __name__ == "__main__":
    sys.exit(main())
