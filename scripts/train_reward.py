#!/usr/bin/env python
"""Train a reward model on preferences."""

from __future__ import annotations

import sys

from stage_args import ROOT, Defaults, fit, parser_for

DEFAULTS = Defaults(
    model_path=str(ROOT / "outputs" / "sft"),
    output_dir=str(ROOT / "outputs" / "reward"),
    data_file=str(ROOT / "data" / "dpo.jsonl"),
    batch_size=2,
    accumulation=16,
    epochs=1,
    learning_rate=1e-5,
)


def main() -> int:
    """Parse the flags and train."""
    parser = parser_for("reward", DEFAULTS)
    parser.add_argument("--max_prompt_length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--centering", type=float, default=0.01, help="pull of scores towards 0")
    args = parser.parse_args()
    model = {"centering": args.centering, "schedule.name": "cosine"}
    data = {"max_prompt_length": args.max_prompt_length}
    return fit("RewardModule", "DPODataModule", args, model, data)


if __name__ == "__main__":
    sys.exit(main())
