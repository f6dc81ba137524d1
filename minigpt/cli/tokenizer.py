"""`minigpt tokenizer train`: a byte-level BPE from JSONL."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from minigpt.cli.options import CommandParser, add_columns, check_output, positive, writing
from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import expand_files
from minigpt.files import atomic_directory, clear_leftovers
from minigpt.progress import shown

log = logging.getLogger(__name__)

MEASURED = 2000  # rows whose characters per token are reported
TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
}

EXAMPLES = """examples:
  minigpt tokenizer train --data_file data/pretrain.jsonl --output_dir outputs/tokenizer
  minigpt tokenizer train --data_file a.jsonl b.jsonl --output_dir tok --vocab_size 6400
"""


def main(argv: list[str]) -> None:
    """Parse the command line and train."""
    args = parser().parse_args(argv)
    train_to(
        Path(args.output_dir),
        expand_files(args.data_file),
        args.vocab_size,
        args.data_limit,
        args.overwrite,
        dict(args.columns),
    )


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(
        prog="minigpt tokenizer", description="Train a tokenizer on JSONL.", epilog=EXAMPLES
    )
    actions = top.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="train a byte-level BPE", epilog=EXAMPLES)
    train.add_argument(
        "--data_file", nargs="+", required=True, help="data files, folders, patterns"
    )
    train.add_argument("--output_dir", required=True, help="where to save it")
    train.add_argument("--vocab_size", type=int, default=6400, help="tokens in all (6400)")
    train.add_argument("--data_limit", type=positive, help="use only the first rows")
    add_columns(train)
    train.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    return top


def train_to(
    directory: Path,
    files: list[str],
    vocab_size: int,
    limit: int | None = None,
    overwrite: bool = False,
    columns: Mapping[str, str] | None = None,
) -> float:
    """Train a tokenizer, save it, and return its characters per token on the text.

    Args:
        directory: where it is saved.
        files: of data, of any form.
        vocab_size: tokens in all.
        limit: use only the first rows.
        overwrite: replace a tokenizer that is there.
        columns: new names of the rows' keys by their old ones.

    Raises:
        ConfigError: when the directory holds one already and `overwrite` is false.
    """
    clear_leftovers(directory.parent)
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    names += [directory.name] if directory.is_file() else []
    others = sorted(name for name in names if name not in TOKENIZER_FILES)
    check_output(directory, "a tokenizer", others, overwrite)
    # The trainer reads all texts, then merges: the bar changes when the texts are at their end.
    with ExitStack() as merging:

        def texts() -> Iterator[str]:
            with shown("reading texts"):
                yield from tokenizers.training_texts(files, limit, columns)
            merging.enter_context(shown("merging tokens"))

        tokenizer = tokenizers.train_on(texts(), vocab_size)
    with writing(directory), atomic_directory(directory) as partial:
        tokenizers.save(tokenizer, partial)
    rows = MEASURED if limit is None else min(limit, MEASURED)
    ratio = characters_per_token(tokenizer, files, rows, columns)
    log.info("%d tokens, %.2f characters per token: %s", len(tokenizer), ratio, directory)
    return ratio


def characters_per_token(
    tokenizer: PreTrainedTokenizerFast,
    files: list[str],
    rows: int = MEASURED,
    columns: Mapping[str, str] | None = None,
) -> float:
    """Return how many characters a token stands for, over the first rows."""
    texts = list(tokenizers.training_texts(files, rows, columns))
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(map(len, texts)) / max(1, sum(len(e.ids) for e in encoded))
