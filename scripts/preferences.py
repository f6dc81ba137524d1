"""Train each preference loss on the bundled pairs, and print one table of what it brought.

    python scripts/preferences.py
    python scripts/preferences.py --losses sigmoid,simpo --trainer.max_steps 20

All start from one model, with the options of `configs/dpo.yaml` beside those of RUNS below; kto
with those of `configs/kto.yaml`, on one answer of each pair.
Further options go to all of them. A run that is finished is not made again. docs/preferences.md
says when to use which.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from pipeline import ROOT, exam_and_style
from sweep import Choice, label, train

# What a loss needs beside its name; rpo is DPO with an SFT term. simpo's are its paper's.
RUNS: dict[str, Choice] = {
    "sigmoid": {},
    "cdpo": {"label_smoothing": "0.1"},
    "robust": {"label_smoothing": "0.1"},
    "hinge": {},
    "ipo": {},
    "sigmoid_norm": {},
    "exo": {"label_smoothing": "0.001"},
    "nca": {},
    "apo_zero": {},
    "apo_down": {},
    "sppo_hard": {},
    "rpo": {"loss": "sigmoid", "sft_weight": "1.0"},
    "simpo": {"beta": "2.0", "gamma": "1.0"},
    "orpo": {},
    "cpo": {},
}
KTO = "kto"  # no loss of DPOModule, but a stage
PAIRS = "data/dpo_val.jsonl"  # on which the rewards of KTO are measured, whose rows are no pairs
LENGTH = 512  # tokens of these pairs at most; fewer where the models read less
BETA = 0.1  # of their rewards


class Row(NamedTuple):
    """What a loss brought, as shares, and what it took; NaN where the run failed."""

    name: str
    accuracy: float = math.nan
    style: float = math.nan
    exam: float = math.nan
    seconds: float = math.nan

    def text(self, before: Row) -> str:
        """Write the row, with the general exam beside what it was before."""
        shares = (self.accuracy, self.style, self.exam, self.exam - before.exam)
        seconds = f"{self.seconds:9.0f}"
        return f"{self.name:14}" + "".join(f"{100 * s:>10.1f}" for s in shares) + seconds


HEAD = f"{'loss':14}{'accuracy':>10}{'style':>10}{'exam':>10}{'change':>10}{'seconds':>9}"


def choice_of(name: str) -> Choice:
    """Return the options of a run, by their full names."""
    if name == KTO:
        return {"model": "KTOModule"}
    return {f"model.init_args.{key}": value for key, value in ({"loss": name} | RUNS[name]).items()}


def pair_accuracy(model: Path, reference: Path) -> float:
    """Return the share of held-out pairs whose chosen answer has the higher reward."""
    from minigpt.evaluate.preferences import prefer
    from minigpt.infer.engine import Engine

    engines = [Engine.load(path) for path in (model, reference)]
    length = min(LENGTH, *(engine.context for engine in engines))
    return prefer(engines[0], PAIRS, length, engines[1], BETA)["accuracy"].value


def result(args: argparse.Namespace, name: str, more: list[str]) -> Row:
    """Train and examine one loss."""
    choice = choice_of(name)
    if name == KTO:
        args = argparse.Namespace(**vars(args) | {"config": ["configs/kto.yaml"]})
        args.metric = "val/loss"
    accuracy = train(args, choice, [*more, "--model.init_args.init_from", args.model])
    if not math.isfinite(accuracy):
        return Row(name)
    run_dir = Path(args.output_dir) / label(choice).replace(" ", ",")
    if name == KTO:
        accuracy = pair_accuracy(run_dir, Path(args.model))
    seconds = json.loads((run_dir / "summary.json").read_text())["seconds"]
    exam, style = exam_and_style(run_dir)
    return Row(name, accuracy, style, exam, seconds)


def main() -> None:
    """Train all that are named, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", default=",".join((*RUNS, KTO)), help="names, joined by commas")
    parser.add_argument("--model", default="outputs/sft", help="run that all start from")
    parser.add_argument("--config", action="append", help="of all but kto (configs/dpo.yaml)")
    parser.add_argument("--output_dir", default="outputs/preferences")
    args, more = parser.parse_known_args()
    names = args.losses.split(",")
    if unknown := sorted(set(names) - {*RUNS, KTO}):
        parser.error(f"There is no loss {unknown[0]}. There are: {', '.join((*RUNS, KTO))}.")
    args.config, args.metric = args.config or ["configs/dpo.yaml"], "val/rewards/accuracy"
    os.chdir(ROOT)
    exam, style = exam_and_style(args.model)
    before = Row("(before)", math.nan, style, exam)
    rows = [result(args, name, more) for name in names]
    print("In percent; change is that of the general exam.", HEAD, sep="\n")
    for row in (before, *rows):
        print(row.text(before).replace("nan", "  -"))


if __name__ == "__main__":
    main()
