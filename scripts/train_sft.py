#!/usr/bin/env python
"""Fine-tune a pretrained model on chats."""

from __future__ import annotations

import sys

from stage_args import ROOT, Defaults, fit, parser_for

DEFAULTS = Defaults(
    model_path=str(ROOT / "outputs" / "pretrain"),
    output_dir=str(ROOT / "outputs" / "sft"),
    data_file=str(ROOT / "data" / "mini" / "sft.jsonl"),
    batch_size=4,
    accumulation=8,
    epochs=3,
    learning_rate=1e-5,
)


def main() -> int:
    """Parse the flags and train."""
    args = parser_for("sft", DEFAULTS).parse_args()
    return fit("SFTModule", "SFTDataModule", args, {"schedule.name": "cosine"})


if __name__ == "__main__":
    sys.exit(main())
