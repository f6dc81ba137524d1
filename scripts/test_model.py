#!/usr/bin/env python
"""Try a trained model: built-in prompts, one prompt of yours, or a dialogue."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from stage_args import ROOT

if TYPE_CHECKING:
    from minigpt.infer.engine import Engine, Sampling

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

    args = parse()
    try:
        answer(args)
    except MiniGPTError as error:
        print(f"test_model: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def answer(args: argparse.Namespace) -> None:
    """Answer the prompts, or talk."""
    from minigpt.cli.options import quiet
    from minigpt.infer.engine import Engine, Sampling

    quiet()
    sampling = Sampling(args.max_length, args.temperature, top_k=args.top_k, top_p=args.top_p)
    engine = Engine.load(
        args.model_path, args.lora_path, args.tokenizer_path, merged=args.merge_lora
    )
    if args.interactive:
        talk(engine, sampling)
        return
    for prompt in [args.prompt] if args.prompt else PROMPTS:
        print(f"> {prompt}\n{reply(engine, sampling, [('user', prompt)])}\n")


def reply(engine: Engine, sampling: Sampling, messages: list[tuple[str, str]]) -> str:
    """Answer a chat, or continue the last text where the model knows no chats."""
    from minigpt.data.formats import Message

    chat = tuple(Message(role, text) for role, text in messages)
    prompt = chat if engine.codec is not None else messages[-1][1]
    return str(engine.complete([prompt], sampling)[0].text)


def talk(engine: Engine, sampling: Sampling) -> None:
    """Read lines and answer them, with the whole dialogue as context."""
    messages: list[tuple[str, str]] = []
    while line := read_line():
        messages.append(("user", line))
        messages.append(("assistant", reply(engine, sampling, messages)))
        print(messages[-1][1])


def read_line() -> str:
    """Return the next line of the dialogue; empty at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
