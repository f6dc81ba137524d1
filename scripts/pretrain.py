#!/usr/bin/env python
"""Pretrain a model from random weights on JSONL texts."""

from __future__ import annotations

import sys

from stage_args import ROOT, Defaults, fit, parser_for

DEFAULTS = Defaults(
    model_path=None,
    output_dir=str(ROOT / "outputs" / "pretrain"),
    data_file=str(ROOT / "data" / "pretrain.jsonl"),
    batch_size=2,
    accumulation=16,
    epochs=5,
    learning_rate=5e-4,
)


def main() -> int:
    """Parse the flags and train."""
    parser = parser_for("pretrain", DEFAULTS)
    parser.set_defaults(tokenizer_path=str(ROOT / "mini_tokenizer"))
    parser.add_argument("--weight_decay", type=float, default=0.01, help="of matrices")
    parser.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--save_total_limit", type=int, default=2, help="checkpoints to keep")
    args = parser.parse_args()
    model = {
        "optimizer.weight_decay": args.weight_decay,
        "schedule.name": "cosine",
        "schedule.warmup": args.warmup_ratio,
    }
    keep = args.save_total_limit
    return fit("PretrainModule", "PretrainDataModule", args, model, keep=keep)


if __name__ == "__main__":
    sys.exit(main())
