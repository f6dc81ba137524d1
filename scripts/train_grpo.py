#!/usr/bin/env python
"""Train a fine-tuned model on its own answers, scored by rewards."""

from __future__ import annotations

import json
import sys

from stage_args import ROOT, Defaults, fit, parser_for

DEFAULTS = Defaults(
    model_path=str(ROOT / "outputs" / "dpo"),
    output_dir=str(ROOT / "outputs" / "grpo"),
    data_file=str(ROOT / "data" / "grpo.jsonl"),
    batch_size=4,
    accumulation=4,
    epochs=1,
    learning_rate=1e-5,
)


def main() -> int:
    """Parse the flags and train."""
    parser = parser_for("grpo", DEFAULTS)
    add = parser.add_argument
    add("--num_generations", type=int, default=8, help="answers to each prompt")
    add("--max_completion_length", type=int, default=64, help="tokens of the longest answer")
    add("--beta", type=float, default=0.0, help="weight of the KL to the model at the start")
    add("--temperature", type=float, default=1.0, help="at which answers are sampled")
    add(
        "--reward",
        nargs="*",
        help="exact (which is the default without --reward_model), numeric, length or json, or a "
        "function as package.module:name or file.py:name",
    )
    add(
        "--reward_model",
        help="directory of a trained reward model, whose score is added to --reward",
    )
    args = parser.parse_args()
    names = args.reward or ([] if args.reward_model else ["exact"])
    rewards = [
        {"kind": "function", "function": name} if ":" in name else {"kind": name} for name in names
    ]
    if args.reward_model:
        rewards.append({"kind": "reward_model", "model": args.reward_model})
    model = {
        "rewards": json.dumps(rewards),
        "beta": args.beta,
        "temperature": args.temperature,
        "schedule.name": "cosine",
    }
    data = {
        "num_generations": args.num_generations,
        "max_completion_length": args.max_completion_length,
    }
    return fit("GRPOModule", "GRPODataModule", args, model, data)


if __name__ == "__main__":
    sys.exit(main())
