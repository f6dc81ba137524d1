"""Train the reward model with several seeds, and print what each chooses among drawn replies.

    python scripts/best_of.py
    python scripts/best_of.py --seeds 0 --trainer.max_steps 20

The model that the reward models start from answers the exam of style several times, at temperature
1. Printed is how often a reply is right: of all that are drawn, of the shortest to each question,
and of those that a reward model scores highest. Further options go to all runs. A run that is
finished is not made again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import ROOT, fit_once

if TYPE_CHECKING:
    from minigpt.evaluate.exam import Item
    from minigpt.infer.engine import Engine, Reply

EXAM = "data/exam/style.jsonl"
LONGEST = 64  # tokens of a reply, as in the pipeline's exams


def train(args: argparse.Namespace, seed: str, more: list[str]) -> Path:
    """Train a reward model with a seed, if that was not done; return its run directory."""
    run_dir = Path(args.output_dir) / f"seed-{seed}"
    options = {
        "--config": "configs/reward.yaml",
        "--seed_everything": seed,
        "--model.init_args.init_from": args.model,
        "--data.init_args.seed": seed,
    }
    fit_once(run_dir, options, more)
    return run_dir


def scores_of(
    run_dir: Path, engine: Engine, items: Sequence[Item], drawn: Sequence[Sequence[Reply]]
) -> list[list[float]]:
    """Return for each item the scores of its replies by a reward model."""
    from minigpt.evaluate.reward_model import RewardScorer, score_replies

    scorer = RewardScorer.load(run_dir, engine.model.device, engine.tokenizer)
    return [
        score_replies(scorer, engine, [item.prompt] * len(replies), replies)
        for item, replies in zip(items, drawn, strict=True)
    ]


def chosen(right: Sequence[Sequence[bool]], scores: Sequence[Sequence[float]]) -> float:
    """Return the share of items whose reply with the highest score is right."""
    pairs = zip(right, scores, strict=True)
    return sum(of_item[values.index(max(values))] for of_item, values in pairs) / len(right)


def main() -> None:
    """Train with each seed, and print the shares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2", help="of training, joined by commas")
    parser.add_argument("--model", default="outputs/sft", help="run that all start from")
    parser.add_argument("--count", type=int, default=8, help="replies to each item (8)")
    parser.add_argument("--output_dir", default="outputs/best_of")
    args, more = parser.parse_known_args()
    os.chdir(ROOT)
    from minigpt.evaluate.exam import judge, load_items
    from minigpt.evaluate.reward_model import draw
    from minigpt.infer.engine import Engine, Sampling

    runs = {seed: train(args, seed, more) for seed in args.seeds.split(",")}
    engine, items = Engine.load(args.model), load_items(EXAM, "exam")
    sampling = Sampling(LONGEST, temperature=1.0, seed=0)
    drawn = list(draw(engine, [item.prompt for item in items], sampling, args.count))
    right = [
        [judge(item, reply).correct for reply in replies]
        for item, replies in zip(items, drawn, strict=True)
    ]
    lengths = [[-float(len(reply.ids)) for reply in replies] for replies in drawn]
    shares = {
        "all that are drawn": sum(map(sum, right)) / (args.count * len(items)),
        f"the shortest of {args.count}": chosen(right, lengths),
    }
    for seed, run_dir in runs.items():
        scores = scores_of(run_dir, engine, items, drawn)
        shares[f"the best of {args.count}, seed {seed}"] = chosen(right, scores)
    print(f"Right replies to {EXAM} ({len(items)} items), in percent:")
    for name, share in shares.items():
        print(f"{name:30}{100 * share:6.1f}")


if __name__ == "__main__":
    main()
