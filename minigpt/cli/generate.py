"""`minigpt generate`: complete prompts with a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.cli.options import (
    CommandParser,
    add_model,
    add_sampling,
    add_weights,
    load_engine,
    positive,
    sampling_of,
)
from minigpt.errors import ConfigError
from minigpt.reading import read_text, reason_of
from minigpt.terminal import for_output

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from minigpt.data.formats import Message
    from minigpt.infer.engine import Engine, Reply, Sampling
    from minigpt.infer.gguf import Gguf

EXAMPLES = """examples:
  minigpt generate --model outputs/sft --prompt "Hello"
  minigpt generate --model outputs/pretrain --text --prompt "Once upon"
  echo "Hello" | minigpt generate --model outputs/sft --temperature 0.8 --top_p 0.9
  minigpt generate --model outputs/sft --file questions.jsonl > answers.jsonl
  minigpt generate --model exports/sft-gguf/sft-q8_0.gguf --prompt "Hello"
  minigpt generate --model outputs/sft --temperature 1 --best_of 8 \
    --reward_model outputs/reward --prompt "Hello"
"""


def main(argv: list[str]) -> None:
    """Parse the command line, load the model and print the reply as it comes."""
    args = parser().parse_args(argv)
    check_best_of(args)
    if args.file and (files := files_of_rows(args.file)):
        return complete_rows(args, files)
    prompt = args.prompt if args.prompt is not None else read_prompt(args.file)
    if not prompt:
        raise ConfigError("The prompt is empty. Give --prompt, or text on standard input.")
    sampling, engine = sampling_of(args), load_engine(args)
    if args.best_of:
        reply = next(iter(replies_of(args, engine, [engine_prompt(args, prompt)], sampling)))
        print(for_output(reply.text))
        return None
    for delta in engine.stream(engine_prompt(args, prompt), sampling):
        print(for_output(delta.text), end="", flush=True)
    print()
    return None


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(prog="minigpt generate", description="Complete prompts.", epilog=EXAMPLES)
    add_model(top)
    add_weights(top)
    source = top.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="by default the text on standard input")
    source.add_argument(
        "--file",
        help="a text that is the prompt, or prompts and chats as .jsonl, .json, .csv, .tsv, .xlsx, "
        "Parquet or Arrow, or a folder or pattern of such: then each row is printed with its "
        "completion",
    )
    top.add_argument("--system", help="system message of the chat")
    top.add_argument("--text", action="store_true", help="continue text instead of chatting")
    add_sampling(top, max_new_tokens=128, temperature=0.0)
    top.add_argument(
        "--best_of",
        type=positive,
        metavar="N",
        help="draw N replies, by seeds from --seed on, and print the one that --reward_model "
        "scores highest",
    )
    top.add_argument("--reward_model", help="run directory or HF directory of a reward model")
    return top


def check_best_of(args: argparse.Namespace) -> None:
    """Refuse --best_of without a reward model, or among replies that are all the same.

    Raises:
        ConfigError: for such options.
    """
    if (args.best_of is None) != (args.reward_model is None):
        raise ConfigError(
            "--best_of N and --reward_model DIR go together: the reward model chooses among N "
            "replies."
        )
    if args.best_of and args.temperature == 0:
        raise ConfigError(
            "--best_of draws replies, which at --temperature 0 are all the same: give another "
            "temperature, such as --temperature 1."
        )


def replies_of(
    args: argparse.Namespace,
    engine: Engine | Gguf,
    prompts: Sequence[str | tuple[Message, ...]],
    sampling: Sampling,
) -> Iterator[Reply]:
    """Yield the reply to each prompt, or the best of several by a reward model.

    Raises:
        ConfigError: for a GGUF file, whose tokens a reward model cannot read.
    """
    if not args.best_of:
        return engine.replies(prompts, sampling)
    from minigpt.evaluate.reward_model import RewardScorer, best_of
    from minigpt.infer.engine import Engine

    if not isinstance(engine, Engine):
        raise ConfigError(
            "--best_of scores the tokens of replies, which GGUF files write otherwise: give the "
            "run that the file was exported from as --model."
        )
    scorer = RewardScorer.load(args.reward_model, engine.model.device, engine.tokenizer)
    return best_of(scorer, engine, prompts, sampling, args.best_of)


def files_of_rows(name: str) -> list[str]:
    """Return the files that a name stands for; none when it is a text that is one prompt."""
    from minigpt.data.formats import READABLE, expand_files, suffix_of

    files = expand_files([name])
    is_prompt = files == [name] and suffix_of(Path(name)) not in {*READABLE} - {".txt"}
    return [] if is_prompt else files


def read_prompt(file: str | None) -> str:
    """Return the text of a file, or of standard input.

    Raises:
        ConfigError: when it cannot be read, or is not UTF-8.
    """
    source = file or "standard input"
    try:
        return (read_text(Path(file)) if file else sys.stdin.read()).strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"The text on {source} is not UTF-8. Convert it.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {source}: {reason_of(error)}.") from error


def engine_prompt(
    args: argparse.Namespace, content: str | tuple[Message, ...]
) -> str | tuple[Message, ...]:
    """Return a prompt as the engine takes it: a text to continue, or a chat to answer."""
    from minigpt.data.formats import Message

    if isinstance(content, str):
        if args.text:
            return content
        content = (Message("user", content),)
    if args.system and content[0].role != "system":
        content = (Message("system", args.system), *content)
    return content


def complete_rows(args: argparse.Namespace, files: Sequence[str]) -> None:
    """Complete the prompts of files and print their rows with the completions, in their order."""
    from minigpt.data.formats import completed, load_prompts
    from minigpt.progress import shown

    prompts = [prompt for file in files for prompt in load_prompts(file)]
    sampling = sampling_of(args)
    engine = load_engine(args)
    chats = [engine_prompt(args, prompt.content) for prompt in prompts]
    replies = replies_of(args, engine, chats, sampling)
    with shown("completing", printing=True):
        for prompt, reply in zip(prompts, replies, strict=True):
            line = completed(prompt.row, reply.text).decode().rstrip("\n")
            print(for_output(line), flush=True)
