#!/usr/bin/env python
"""Train a byte-level BPE tokenizer on JSONL texts."""

from __future__ import annotations

import argparse
import sys

from stage_args import ROOT


def main() -> int:
    """Parse the flags and train; an existing tokenizer is replaced, as in the original tool."""
    from minigpt.__main__ import main as minigpt

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data_file", default=str(ROOT / "data" / "pretrain.jsonl"), help="JSONL")
    parser.add_argument("--output_dir", default=str(ROOT / "mini_tokenizer"), help="where it goes")
    parser.add_argument("--vocab_size", type=int, default=6400, help="tokens in all")
    args = parser.parse_args()
    return minigpt(
        [
            "tokenizer",
            "train",
            f"--data_file={args.data_file}",
            f"--output_dir={args.output_dir}",
            f"--vocab_size={args.vocab_size}",
            "--overwrite",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
