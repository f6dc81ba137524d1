#!/usr/bin/env python
"""Train a LoRA adapter on a fine-tuned model."""

from __future__ import annotations

import sys

from stage_args import ROOT, Defaults, fit, parser_for

DEFAULTS = Defaults(
    model_path=str(ROOT / "outputs" / "sft"),
    output_dir=str(ROOT / "outputs" / "lora"),
    data_file=str(ROOT / "data" / "lora_medical.jsonl"),
    batch_size=4,
    accumulation=8,
    epochs=3,
    learning_rate=1e-4,
)


def main() -> int:
    """Parse the flags and train."""
    parser = parser_for("lora", DEFAULTS)
    parser.add_argument("--lora_r", type=int, default=8, help="rank")
    parser.add_argument("--lora_alpha", type=int, default=32, help="scale, divided by the rank")
    parser.add_argument("--lora_dropout", type=float, default=0.1, help="of its input")
    args = parser.parse_args()
    model = {
        "lora.r": args.lora_r,
        "lora.alpha": args.lora_alpha,
        "lora.dropout": args.lora_dropout,
        "schedule.name": "cosine",
    }
    return fit("LoRAModule", "SFTDataModule", args, model)


if __name__ == "__main__":
    sys.exit(main())
