"""`minigpt tokenizer train`: a byte-level BPE from JSONL."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ConfigError
from minigpt.model.build import name_tokenizer_class, whole_directory

log = logging.getLogger(__name__)

MEASURED = 2000  # rows whose characters per token are reported

EXAMPLES = """examples:
  minigpt tokenizer train --data_file data/pretrain.jsonl --output_dir outputs/tokenizer
  minigpt tokenizer train --data_file a.jsonl b.jsonl --output_dir tok --vocab_size 6400
"""


def main(args: list[str]) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="minigpt tokenizer",
        description="Train a tokenizer on JSONL.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="train a byte-level BPE", epilog=EXAMPLES)
    train.formatter_class = argparse.RawDescriptionHelpFormatter
    train.add_argument("--data_file", nargs="+", required=True, help="JSONL files")
    train.add_argument("--output_dir", required=True, help="where to save it")
    train.add_argument("--vocab_size", type=int, default=6400, help="tokens in all (6400)")
    train.add_argument("--data_limit", type=int, help="use only the first rows")
    train.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    chosen = parser.parse_args(args)
    train_to(
        Path(chosen.output_dir),
        chosen.data_file,
        chosen.vocab_size,
        chosen.data_limit,
        chosen.overwrite,
    )


def train_to(
    directory: Path,
    files: list[str],
    vocab_size: int,
    limit: int | None = None,
    overwrite: bool = False,
) -> float:
    """Train a tokenizer, save it, and return its characters per token on the text.

    Raises:
        ConfigError: when the directory holds one already and `overwrite` is false.
    """
    if (directory / "tokenizer.json").exists() and not overwrite:
        raise ConfigError(
            f"{directory} already holds a tokenizer. Choose another --output_dir, or replace it "
            "with --overwrite."
        )
    trained = tokenizers.train(files, vocab_size, limit)
    with whole_directory(directory) as partial:
        tokenizers.save(trained, partial)
        name_tokenizer_class(partial)
    ratio = characters_per_token(
        trained, files, MEASURED if limit is None else min(limit, MEASURED)
    )
    log.info("%d tokens, %.2f characters per token: %s", len(trained), ratio, directory)
    return ratio


def characters_per_token(
    tokenizer: PreTrainedTokenizerFast, files: list[str], rows: int = MEASURED
) -> float:
    """Return how many characters a token stands for, over the first rows."""
    texts = list(tokenizers.corpus(files, rows))
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(map(len, texts)) / max(1, sum(len(e.ids) for e in encoded))
