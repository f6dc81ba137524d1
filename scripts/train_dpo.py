#!/usr/bin/env python
"""Train a fine-tuned model on preferences."""

from __future__ import annotations

import sys

from stage_args import ROOT, Defaults, fit, parser_for

DEFAULTS = Defaults(
    model_path=str(ROOT / "outputs" / "sft"),
    output_dir=str(ROOT / "outputs" / "dpo"),
    data_file=str(ROOT / "data" / "dpo.jsonl"),
    batch_size=2,
    accumulation=16,
    epochs=3,
    learning_rate=5e-6,
)


def main() -> int:
    """Parse the flags and train."""
    parser = parser_for("dpo", DEFAULTS)
    parser.add_argument("--max_prompt_length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--beta", type=float, default=0.1, help="pull towards the reference")
    args = parser.parse_args()
    model = {"beta": args.beta, "schedule.name": "cosine"}
    data = {"max_prompt_length": args.max_prompt_length}
    return fit("DPOModule", "DPODataModule", args, model, data)


if __name__ == "__main__":
    sys.exit(main())
