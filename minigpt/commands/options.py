"""The argument parser of the verbs that need no Trainer."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from minigpt.errors import ConfigError


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
