"""`minigpt generate`: complete prompts with a trained model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from minigpt.cli.options import (
    CommandParser,
    add_model,
    add_sampling,
    add_weights,
    load_engine,
    sampling,
)
from minigpt.errors import ConfigError

EXAMPLES = """examples:
  minigpt generate --model outputs/sft --prompt "Hello"
  minigpt generate --model outputs/pretrain --text --prompt "Once upon"
  echo "Hello" | minigpt generate --model outputs/sft --temperature 0.8 --top_p 0.9
  minigpt generate --model outputs/sft --file questions.jsonl > answers.jsonl
  minigpt generate --model exports/sft-gguf/sft-q8_0.gguf --prompt "Hello"
"""


def main(args: list[str]) -> None:
    """Parse the command line, load the model and print what it says as it comes."""
    parser = CommandParser(
        prog="minigpt generate", description="Complete prompts.", epilog=EXAMPLES
    )
    add_model(parser)
    add_weights(parser)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", help="by default what is on standard input")
    given.add_argument(
        "--file",
        help="a text that is the prompt, or a .jsonl of prompts and chats: then each row "
        "is printed with its completion",
    )
    parser.add_argument("--system", help="system message of the chat")
    parser.add_argument("--text", action="store_true", help="continue text instead of chatting")
    add_sampling(parser, max_new_tokens=128, temperature=0.0)
    chosen = parser.parse_args(args)
    if chosen.file and {".jsonl", ".json"} & set(Path(chosen.file).suffixes):
        return complete_rows(chosen)
    prompt = chosen.prompt if chosen.prompt is not None else read_prompt(chosen.file)
    if not prompt:
        raise ConfigError("The prompt is empty. Give --prompt, or text on standard input.")
    how, engine = sampling(chosen), load_engine(chosen)
    for delta in engine.stream(asked(chosen, prompt), how):
        print(delta.text, end="", flush=True)
    print()
    return None


def read_prompt(file: str | None) -> str:
    """Return the text of a file, or what is on standard input.

    Raises:
        ConfigError: when it cannot be read, or is not UTF-8.
    """
    place = file or "standard input"
    try:
        return (Path(file).read_text(encoding="utf-8") if file else sys.stdin.read()).strip()
    except OSError as error:
        raise ConfigError(f"Cannot read {place}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The text on {place} is not UTF-8. Convert it.") from error


def asked(chosen: argparse.Namespace, content: Any) -> Any:
    """Return a prompt as the engine takes it: a text to continue, or a chat to answer."""
    from minigpt.data.formats import Message

    if isinstance(content, str):
        if chosen.text:
            return content
        content = (Message("user", content),)
    if chosen.system and content[0].role != "system":
        content = (Message("system", chosen.system), *content)
    return content


def complete_rows(chosen: argparse.Namespace) -> None:
    """Complete the prompts of a JSONL and print its rows with the completions, in their order."""
    from minigpt.data.formats import load_prompts
    from minigpt.progress import shown

    prompts, how = load_prompts(chosen.file), sampling(chosen)
    engine = load_engine(chosen)
    replies = engine.replies([asked(chosen, prompt.content) for prompt in prompts], how)
    with shown("completing", printing=True):
        for prompt, reply in zip(prompts, replies, strict=True):
            row = {**prompt.row, "completion": reply.text}
            print(json.dumps(row, ensure_ascii=False), flush=True)
