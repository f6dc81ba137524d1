"""Text for a terminal: characters that would command it are written out, nouns are counted."""

from __future__ import annotations

import logging
import re
import sys

# Control characters but tab and line feed, the separators that some terminals take for line ends,
# and marks that change the direction of what follows.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Return a text with its control characters as escapes, such as \u001b.

    A line of JSON stays one, with the same content.
    """
    return _COMMANDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def for_output(text: str) -> str:
    """Return a text as it is, or printable where standard output is a terminal."""
    return printable(text) if sys.stdout.isatty() else text


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class PrintableFormatter(logging.Formatter):
    """Formats messages of the log, in which names from files and models may stand."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message, printable."""
        return printable(super().format(record))
