"""The argument parser of the verbs that need no Trainer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.infer.engine import Engine, Sampling


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one paragraph, and which keeps the lines of the examples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the parser's complaint as a ConfigError."""
        raise ConfigError(f"{message}. See: {self.prog} --help")


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r}")
    return int(text)


def add_model(parser: CommandParser) -> None:
    """Add the options that say which model answers."""
    parser.add_argument("--model", required=True, help="run directory, HF directory or hub id")
    parser.add_argument("--adapter", help="LoRA directory to put on the model")
    parser.add_argument(
        "--weights", choices=("fp32", "bf16", "int8"), default="fp32", help="kept in (fp32)"
    )


def load_engine(chosen: argparse.Namespace) -> Engine:
    """Load the model that the options of `add_model` name."""
    from minigpt.cli import quiet
    from minigpt.infer.engine import Engine

    quiet()
    return Engine.load(chosen.model, chosen.adapter, weights=chosen.weights)


def add_sampling(parser: CommandParser, max_new_tokens: int, temperature: float) -> None:
    """Add the options that say how tokens are chosen, with a verb's own defaults."""
    add = parser.add_argument
    add("--max_new_tokens", type=positive, default=max_new_tokens, help=f"({max_new_tokens})")
    told = f"0 takes the likeliest token ({temperature:g})"
    add("--temperature", type=float, default=temperature, help=told)
    add("--top_k", type=int, default=0, help="choose among so many tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="or those that hold this probability (1)")
    add("--min_p", type=float, default=0.0, help="leave out tokens below this share of the best's")
    add("--repetition_penalty", type=float, default=1.0, help="1 is none")
    add("--stop", action="append", default=[], help="end before this text; may be repeated")
    add("--seed", type=int, default=0)


def sampling(chosen: argparse.Namespace) -> Sampling:
    """Return what the options of `add_sampling` say.

    Raises:
        ConfigError: for a value out of range.
    """
    from minigpt.infer.engine import Sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "min_p")
    values = {name: getattr(chosen, name) for name in (*names, "repetition_penalty")}
    return Sampling(**values, stop=tuple(chosen.stop))
