"""Shared by the verbs that need no Trainer: the parser, options, errors of writing."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from minigpt.errors import ConfigError
from minigpt.files import is_disk_error, system_reason

if TYPE_CHECKING:
    from minigpt.infer.engine import Engine, Sampling
    from minigpt.infer.gguf import Gguf

MOST_NAMED = 5  # files that `check_output` names


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one paragraph, and which keeps the lines of the examples."""

    def __init__(
        self, prog: str, description: str | None = None, epilog: str | None = None
    ) -> None:
        super().__init__(
            prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the parser's complaint as a ConfigError."""
        raise ConfigError(f"{message}. See: {self.prog} --help")


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r}")
    return int(text)


MODEL_HELP = "run directory, RUN/checkpoints/step=N (or best, last), HF directory or hub id"


def add_model(parser: CommandParser) -> None:
    """Add the options that name a model."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--adapter", help="LoRA directory to put on the model")


def add_weights(parser: CommandParser) -> None:
    """Add the option of the weights' precision."""
    parser.add_argument(
        "--weights",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="precision of the weights; int8 for CPUs (fp32)",
    )


def load_engine(args: argparse.Namespace) -> Engine | Gguf:
    """Load the model that the options of `add_model` and `add_weights` name.

    Raises:
        ConfigError: for options that a GGUF file cannot have.
    """
    from minigpt.infer.engine import Engine
    from minigpt.infer.gguf import Gguf, find_gguf

    quiet()
    if (file := find_gguf(args.model)) is not None:
        if args.adapter or args.weights != "fp32":
            raise ConfigError(
                f"{file} is a GGUF file: its weights are as they are. Leave --adapter and "
                "--weights out, or export it with that adapter and another --dtype."
            )
        return Gguf(file)
    return Engine.load(args.model, args.adapter, weights=args.weights)


def run_name(directory: str | Path) -> str:
    """Return the name of a run by its directory, by a checkpoint, or by the model in either."""
    from minigpt.model.restore import names_checkpoint

    path = Path(directory).resolve()
    path = path.parent if path.name == "hf" else path
    if names_checkpoint(path):
        return f"{path.parent.parent.name}-{path.name.replace('=', '')}"
    return path.name


def check_output(path: Path, what: str, others: list[str], overwrite: bool) -> None:
    """Refuse an output path where a verb would replace anything but its earlier output.

    Args:
        path: file or directory to be written.
        what: names the output in messages, such as "a tokenizer".
        others: names of what is there and the verb has not written.
        overwrite: whether earlier output may be replaced.

    Raises:
        ConfigError: when something else, or earlier output, is there.
    """
    if others:
        names = ", ".join(others[:MOST_NAMED]) + (" and more" if len(others) > MOST_NAMED else "")
        raise ConfigError(
            f"{path} is no place for {what}: it holds {names}. Choose another one; --overwrite "
            f"replaces nothing but {what} as it was written."
        )
    is_used = any(path.iterdir()) if path.is_dir() else path.exists()
    if is_used and not overwrite:
        raise ConfigError(
            f"{path} already holds {what}. Choose another place, or replace it with --overwrite."
        )


def check_distinct(option: str, output: str | Path | None, inputs: Iterable[str | Path]) -> None:
    """Refuse to write over a file that is read.

    Args:
        option: that names the output, such as --json.
        output: the file to be written, if any.
        inputs: the files that are read.

    Raises:
        ConfigError: when they are the same file.
    """
    if output is None or not Path(output).exists():
        return
    for file in map(Path, inputs):
        if file.exists() and file.samefile(output):
            raise ConfigError(
                f"{option} names {output}, which is read: it would be lost. Choose another file."
            )


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the system's errors while a file or directory is written into a ConfigError.

    Raises:
        ConfigError: with the path that the error names, or else `path`, and the reason.
    """
    try:
        yield
    except Exception as error:
        reason = system_reason(error)
        if reason is None and isinstance(error, OSError):
            reason = error.strerror or str(error)
        if reason is None:
            raise
        named = getattr(error, "filename", None)
        if isinstance(named, str) and not _is_beside(Path(named).absolute(), Path(path).absolute()):
            raise ConfigError(f"Cannot use {named}: {reason}.") from error  # a file that is read
        remedy = "Make room there, or choose" if is_disk_error(error) else "Choose"
        raise ConfigError(f"Cannot write to {path}: {reason}. {remedy} another place.") from error


def _is_beside(file: Path, output: Path) -> bool:
    """Whether a file is an output, lies beside or in it, or is a directory that it lies in."""
    return output.parent in file.parents or file in (output, *output.parents)


def add_sampling(
    parser: CommandParser, max_new_tokens: int, temperature: float, min_p: float = 0.0
) -> None:
    """Add the options of sampling, with the defaults of a verb."""
    add = parser.add_argument
    add("--max_new_tokens", type=positive, default=max_new_tokens, help=f"({max_new_tokens})")
    greedy = f"0 takes the likeliest token ({temperature:g})"
    add("--temperature", type=float, default=temperature, help=greedy)
    add("--top_k", type=int, default=0, help="draw from so many likeliest tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="or from those that hold this probability (1)")
    below = f"leave out tokens below this share of the best's ({min_p:g})"
    add("--min_p", type=float, default=min_p, help=below)
    add("--repetition_penalty", type=float, default=1.0, help="1 is none")
    add("--stop", action="append", default=[], help="end before this text; may be repeated")
    add("--seed", type=int, default=0)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return the options of `add_sampling`.

    Raises:
        ConfigError: for a value out of range.
    """
    from minigpt.infer.engine import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
    )


def quiet() -> None:
    """Silence the libraries' hints that no user of MiniGPT can act on."""
    from transformers.utils.logging import disable_progress_bar

    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", text)
    # The numbers are summed over all processes before they are logged.
    warnings.filterwarnings("ignore", ".*It is recommended to use .self.log.*sync_dist.*")
    warnings.filterwarnings("ignore", ".*Total length of .list. across ranks is zero.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated.*")
    disable_progress_bar()


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add `--columns`, pairs of an old and a new name."""
    text = "new names of keys: OLD=NEW"
    parser.add_argument("--columns", type=renaming, nargs="+", default=[], help=text)


def renaming(text: str) -> tuple[str, str]:
    """Read OLD=NEW."""
    old, separator, new = text.partition("=")
    if not (old and separator and new):
        raise argparse.ArgumentTypeError(f"must be OLD=NEW, but is {text!r}")
    return old, new
