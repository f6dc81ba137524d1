"""`minigpt bench`: measure speed and memory against plain loops and libraries."""

from __future__ import annotations

import importlib

from minigpt.errors import ConfigError

VERBS = {
    "train": "a stage of training against a plain transformers loop",
    "data": "tokenising and packing against the tokenizer library alone",
    "generate": "decoding against transformers' generate, and prompts together against one by one",
}
HELP = """usage: minigpt bench <what> [options]

Measure on this machine, both sides in one command.

what:
{verbs}

examples:
  minigpt bench train --stage sft --data data/sft.jsonl --max-length 768 --json sft.json
  minigpt bench data --data data/pretrain.jsonl --sizes 10 100
  minigpt bench generate --size 26m --json generate.json

Each explains itself: minigpt bench <what> --help
"""


def main(args: list[str]) -> None:
    """Run one benchmark.

    Raises:
        ConfigError: for an unknown one.
    """
    if not args or args[0] in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {v:10} {what}" for v, what in VERBS.items())))
    elif args[0] in VERBS:
        importlib.import_module(f"minigpt.bench.{args[0]}").main(args[1:])
    else:
        raise ConfigError(f"Unknown benchmark: {args[0]}. Known: {', '.join(VERBS)}.")
