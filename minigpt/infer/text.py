"""Tokens become text: complete characters only, and nothing that may still be a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character, or not yet


class StopTexts:
    """Releases text up to a stop text, and holds back what may become one.

    Args:
        stop: texts that end the reply.

    Attributes:
        stopped: whether a stop text has come; the released text ends before it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._pending = ""

    def add(self, text: str) -> str:
        """Take more text; return what is certain now."""
        self._pending += text
        if self.stopped:
            self._pending = ""
            return ""
        starts = [self._pending.find(stop) for stop in self.stop if stop in self._pending]
        if starts:
            released = self._pending[: min(starts)]
            self.stopped = True
            self._pending = ""
            return released
        overlap = max((_overlap(self._pending, stop) for stop in self.stop), default=0)
        end = len(self._pending) - overlap
        released, self._pending = self._pending[:end], self._pending[end:]
        return released

    def end(self) -> str:
        """Return what was held back, when no more text comes."""
        released, self._pending = self._pending, ""
        return released


class TextStream:
    """The text of a reply as its tokens arrive.

    Args:
        tokenizer: decodes the tokens.
        stop: texts that end the reply.

    Attributes:
        decoded: characters of the text so far.
        released: characters of it that `add` has returned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.decoded = 0
        self.released = 0
        self._stops = StopTexts(stop)
        self._ids: list[int] = []  # the last tokens, which are decoded together
        self._prefix_ids = 0  # how many of them come before the last complete character
        self._prefix_chars = 0  # characters of their text that were taken before

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come; the released text ends before it."""
        return self._stops.stopped

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._ids.append(token)
        text = self.backend.decode(self._ids)
        complete = text.rstrip(UNFINISHED)
        released = self._take(complete)
        if complete == text:
            # The last tokens stay, because some decoders write a first token in another way.
            self._ids = self._ids[self._prefix_ids :]
            self._prefix_ids = len(self._ids)
            self._prefix_chars = len(self.backend.decode(self._ids))
        return released

    def end(self) -> str:
        """Return what was held back, when no more tokens come; bytes of half a character go."""
        return self._take(self.backend.decode(self._ids).rstrip(UNFINISHED)) + self._stops.end()

    def _take(self, text: str) -> str:
        new = text[self._prefix_chars :]
        self._prefix_chars = max(self._prefix_chars, len(text))
        released = self._stops.add(new)
        self.decoded += len(new)
        self.released += len(released)
        return released


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop text begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Pieces:
    """The text and the bytes of single tokens of a vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = tokenizer.backend_tokenizer
        # A byte-level vocabulary writes each byte as a character; these stand for themselves.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        bytes_of = {chr(byte): byte for byte in printable}
        bytes_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
        self._bytes_of = bytes_of if "ByteLevel" in str(self.backend.decoder) else {}

    def text(self, token: int) -> str:
        """Return a token's text; bytes that are no character are replaced."""
        return str(self.backend.decode([token], skip_special_tokens=False))

    def bytes(self, token: int) -> list[int]:
        """Return the UTF-8 bytes that a token stands for."""
        piece = self.backend.id_to_token(token) or ""
        if all(char in self._bytes_of for char in piece):
            return [self._bytes_of[char] for char in piece]
        if piece.startswith("<0x") and piece.endswith(">"):
            return [int(piece[3:-1], 16)]
        return list(self.text(token).encode())
