#!/usr/bin/env python
"""Train a fine-tuned model on completions that are desirable or not."""

from __future__ import annotations

import sys

from stage_args import ROOT, Defaults, fit, parser_for

DEFAULTS = Defaults(
    model_path=str(ROOT / "outputs" / "sft"),
    output_dir=str(ROOT / "outputs" / "kto"),
    data_file=str(ROOT / "data" / "kto.jsonl"),
    batch_size=2,
    accumulation=16,
    epochs=3,
    learning_rate=5e-6,
)


def main() -> int:
    """Parse the flags and train."""
    parser = parser_for("kto", DEFAULTS)
    parser.add_argument("--max_prompt_length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--beta", type=float, default=0.1, help="pull towards the reference")
    for kind in ("desirable", "undesirable"):
        text = f"of the losses of {kind} completions"
        parser.add_argument(f"--{kind}_weight", type=float, default=1.0, help=text)
    args = parser.parse_args()
    model = {
        "beta": args.beta,
        "desirable_weight": args.desirable_weight,
        "undesirable_weight": args.undesirable_weight,
        "schedule.name": "cosine",
    }
    data = {"max_prompt_length": args.max_prompt_length}
    return fit("KTOModule", "KTODataModule", args, model, data)


if __name__ == "__main__":
    sys.exit(main())
