"""What the verbs that need no Trainer have in common: parser, options, errors of writing."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.infer.engine import Engine, Sampling
    from minigpt.infer.gguf import Gguf


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
    """Add the options that say which model is meant."""
    parser.add_argument("--model", required=True, help="run directory, HF directory or hub id")
    parser.add_argument("--adapter", help="LoRA directory to put on the model")


def add_weights(parser: CommandParser) -> None:
    """Add the option that says what the weights are kept in."""
    told = "what they are kept in; int8 for CPUs (fp32)"
    parser.add_argument("--weights", choices=("fp32", "bf16", "int8"), default="fp32", help=told)


def load_engine(chosen: argparse.Namespace) -> Engine | Gguf:
    """Load the model that the options of `add_model` and `add_weights` name.

    Raises:
        ConfigError: for options that a GGUF file cannot have.
    """
    from minigpt.cli.trainer import quiet
    from minigpt.infer.engine import Engine
    from minigpt.infer.gguf import Gguf, find_gguf

    quiet()
    if (file := find_gguf(chosen.model)) is not None:
        if chosen.adapter or chosen.weights != "fp32":
            raise ConfigError(
                f"{file} is a GGUF file: its weights are as they are. Leave --adapter and "
                "--weights out, or export it with that adapter and another --dtype."
            )
        return Gguf(file)
    return Engine.load(chosen.model, chosen.adapter, weights=chosen.weights)


def run_name(place: str | Path) -> str:
    """Return the name of a run by its directory, or by the model in it."""
    path = Path(place).resolve()
    return (path.parent if path.name == "hf" else path).name


def check_room(place: Path, what: str, written: Collection[str], overwrite: bool) -> None:
    """Refuse a place where a verb would replace something else than its own earlier work.

    Args:
        place: file or directory to be written.
        what: will be there, such as "a tokenizer".
        written: names of the files that the verb writes, or patterns of them.
        overwrite: whether earlier work may be replaced.

    Raises:
        ConfigError: when the place is taken.
    """
    if not place.exists():
        return
    held = [path.name for path in place.iterdir()] if place.is_dir() else [place.name]
    others = sorted(name for name in held if not any(fnmatch(name, own) for own in written))
    if others:
        raise ConfigError(
            f"{place} is no place for {what}: it holds {', '.join(others[:3])}. Choose another one."
        )
    if held and not overwrite:
        raise ConfigError(
            f"{place} already holds {what}. Choose another place, or replace it with --overwrite."
        )


@contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Tell the user what keeps a file or directory from being written.

    Raises:
        ConfigError: with the place and the reason.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"Cannot write to {place}: {reason}. Choose another place.") from error


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
