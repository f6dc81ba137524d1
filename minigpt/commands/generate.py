"""`minigpt generate`: complete one prompt with a trained model."""

from __future__ import annotations

import argparse
import sys

from minigpt.commands.options import CommandParser, positive
from minigpt.errors import ConfigError

EXAMPLES = """examples:
  minigpt generate --model outputs/sft --prompt "Hello"
  minigpt generate --model outputs/pretrain --text --prompt "Once upon"
  echo "Hello" | minigpt generate --model outputs/sft
"""


def main(args: list[str]) -> None:
    """Parse the command line, load the model and print the reply."""
    parser = CommandParser(
        prog="minigpt generate", description="Complete one prompt.", epilog=EXAMPLES
    )
    parser.add_argument("--model", required=True, help="run directory, HF directory or hub id")
    parser.add_argument("--adapter", help="LoRA directory to put on the model")
    parser.add_argument("--prompt", help="the prompt; read from standard input when left out")
    parser.add_argument("--system", help="system message of the chat")
    parser.add_argument("--text", action="store_true", help="continue text instead of chatting")
    parser.add_argument("--max_new_tokens", type=positive, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(args)
    prompt = chosen.prompt if chosen.prompt is not None else read_prompt()
    if not prompt:
        raise ConfigError("The prompt is empty. Give --prompt, or text on standard input.")
    print(reply(chosen, prompt))


def read_prompt() -> str:
    """Return the text on standard input.

    Raises:
        ConfigError: when it is not UTF-8.
    """
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ConfigError("The text on standard input is not UTF-8. Convert it.") from error


def reply(chosen: argparse.Namespace, prompt: str) -> str:
    """Return the model's reply to a prompt."""
    from minigpt.cli import quiet
    from minigpt.data.records import Message
    from minigpt.infer.engine import Engine, Sampling

    quiet()
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: getattr(chosen, name) for name in names})
    engine = Engine.load(chosen.model, chosen.adapter)
    if chosen.text:
        return engine.complete([prompt], sampling)[0].text
    system = (Message("system", chosen.system),) if chosen.system else ()
    return engine.complete([(*system, Message("user", prompt))], sampling)[0].text
