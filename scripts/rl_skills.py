"""Train each verifiable skill by its rewards alone, with several seeds, and print what came of it.

    python scripts/rl_skills.py
    python scripts/rl_skills.py --families reverse_digits --seeds 0 --trainer.max_steps 60

All start from one model, with the options of `configs/grpo.yaml` but more steps, and are validated
on the skill's exam: greedily, and with several samples an item. Further options go to all of them.
A run that is finished is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

from pipeline import ROOT, exam_and_style, fit_once

FAMILIES = ("reverse_digits", "sort_digits", "add_carry", "count_letters")
PROMPTS = (Path("data/grpo.jsonl"), Path("data/grpo_hard.jsonl"))


class Scores(NamedTuple):
    """What a model can do, as shares."""

    accuracy: float
    pass_at_k: float
    cut_off: float
    exam: float
    style: float


HEAD = "skill, seed          greedy          pass@8          cut off        exam          style   s"


def row(name: str, before: Scores, after: Scores, seconds: float) -> str:
    """Write what a run changed, in percent, and the seconds of its optimizer steps."""
    pairs = (f"{100 * b:5.1f} →{100 * a:6.1f}" for b, a in zip(before, after, strict=True))
    return f"{name:18}" + "  ".join(pairs) + f" {seconds:4.0f}"


def write_prompts(family: str, target: Path) -> Path:
    """Write the training prompts of a family to a file of their own."""
    lines = [line for file in PROMPTS for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = [line for line in lines if json.loads(line)["family"] == family]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
    return target


def train(args: argparse.Namespace, family: str, seed: str, more: list[str]) -> Path:
    """Train a family from the model with a seed, if that was not done; return the run directory."""
    run_dir = Path(args.output_dir) / f"{family}-{seed}"
    options = {
        "--config": "configs/grpo.yaml",
        "--seed_everything": seed,
        "--model.init_args.init_from": args.model,
        "--data.init_args.train": write_prompts(family, Path(args.output_dir) / f"{family}.jsonl"),
        "--data.init_args.val": f"data/exam/{family}.jsonl",
        "--data.init_args.seed": seed,
        "--trainer.max_steps": 280,  # in two minutes of two CPU cores
        "--trainer.val_check_interval": "null",  # before the first step and after the last
    }
    fit_once(run_dir, options, more)
    return run_dir


def validated(summary: dict[str, dict[str, float]], when: str) -> tuple[float, float, float]:
    """Return the validation before or at the end of a run: greedy, best of the samples, cut off."""
    values = summary[when]
    samples = [name for name in values if name.startswith("val/pass_at_")]
    most = max(samples, key=lambda name: int(name.rpartition("_")[2]))
    return values["val/accuracy"], values[most], values["val/cut_off"]


def main() -> None:
    """Train all that are named, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, joined by commas")
    parser.add_argument("--seeds", default="0,1,2", help="joined by commas")
    parser.add_argument("--model", default="outputs/dpo", help="run that all start from")
    parser.add_argument("--output_dir", default="outputs/rl_skills")
    args, more = parser.parse_known_args()
    os.chdir(ROOT)
    before = exam_and_style(args.model)
    print("In percent, before → after; s: seconds of optimizer steps.", HEAD, sep="\n")
    for family in args.families.split(","):
        for seed in args.seeds.split(","):
            run_dir = train(args, family, seed, more)
            summary = json.loads((run_dir / "summary.json").read_text())
            first = Scores(*validated(summary, "before"), *before)
            last = Scores(*validated(summary, "final"), *exam_and_style(run_dir))
            seconds = summary["tokens_seen"] / summary["useful_tokens_per_s"]
            print(row(f"{family}, {seed}", first, last, seconds), flush=True)


if __name__ == "__main__":
    main()
