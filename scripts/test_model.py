#!/usr/bin/env python
"""Try a trained model: built-in prompts, one prompt of yours, or a dialogue."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from stage_args import ROOT

PROMPTS = (
    "Hello!",
    "你好！",
    "What is 12 plus 7?",
    "Where does Mira Tolan live?",
    "怎样才能睡得更好？",
)


def parse() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model_path", default=str(ROOT / "outputs" / "sft"), help="run directory or model")
    add("--tokenizer_path", help="by default the one saved with the model")
    add("--lora_path", help="adapter to put on the model")
    add("--merge_lora", action="store_true", help="add the adapter to the model's weights")
    add("--max_length", type=int, default=100, help="tokens of the longest reply")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    add("--top_p", type=float, default=0.95, help="share of the likeliest tokens")
    add("--top_k", type=int, default=50, help="number of the likeliest tokens, 0: all")
    add("--prompt", help="ask this instead of the built-in prompts")
    add("--interactive", action="store_true", help="talk; an empty line ends the dialogue")
    return parser.parse_args()


def main() -> int:
    """Load the model and let it answer; return the exit status."""
    logging.basicConfig(format="%(message)s")
    from minigpt.errors import MiniGPTError

    chosen = parse()
    try:
        answer(chosen)
    except MiniGPTError as error:
        print(f"test_model: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def answer(chosen: argparse.Namespace) -> None:
    """Answer the prompts, or talk."""
    from minigpt.cli.trainer import quiet
    from minigpt.infer.engine import Engine, Sampling

    quiet()
    sampling = Sampling(
        chosen.max_length, chosen.temperature, top_k=chosen.top_k, top_p=chosen.top_p
    )
    engine = Engine.load(
        chosen.model_path, chosen.lora_path, chosen.tokenizer_path, merged=chosen.merge_lora
    )
    if chosen.interactive:
        talk(engine, sampling)
        return
    for prompt in [chosen.prompt] if chosen.prompt else PROMPTS:
        print(f"> {prompt}\n{reply(engine, sampling, [('user', prompt)])}\n")


def reply(engine: Any, sampling: Any, turns: list[tuple[str, str]]) -> str:
    """Answer a chat, or continue the last text where the model knows no chats."""
    from minigpt.data.formats import Message

    messages = tuple(Message(role, text) for role, text in turns)
    asked = messages if engine.codec is not None else turns[-1][1]
    return str(engine.complete([asked], sampling)[0].text)


def talk(engine: Any, sampling: Any) -> None:
    """Read lines and answer them, with the whole dialogue as context."""
    turns: list[tuple[str, str]] = []
    while line := read_line():
        turns.append(("user", line))
        turns.append(("assistant", reply(engine, sampling, turns)))
        print(turns[-1][1])


def read_line() -> str:
    """Return the next line of the dialogue; empty at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
