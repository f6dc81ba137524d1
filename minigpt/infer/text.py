"""Tokens become text: whole characters only, and nothing that may still be a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character, or not yet


class StopTexts:
    """Lets text pass up to a stop text, and holds back what may become one.

    Args:
        stop: texts that end the reply.

    Attributes:
        stopped: whether a stop text has come; what passed ends before it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.stopped, self._held = tuple(stop), False, ""

    def add(self, text: str) -> str:
        """Take more text; return what is certain now."""
        self._held += text
        places = [at for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if self.stopped or places:
            out = "" if self.stopped else self._held[: min(places)]
            self.stopped, self._held = True, ""
            return out
        held = max((_overlap(self._held, stop) for stop in self.stop), default=0)
        cut = len(self._held) - held
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def end(self) -> str:
        """Return what was held back, when no more text comes."""
        out, self._held = self._held, ""
        return out


class TextStream:
    """The text of a reply as its tokens arrive.

    Args:
        tokenizer: turns ids into text.
        stop: texts that end the reply.

    Attributes:
        came, passed: how many characters have come, and how many of them `add` let out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self.backend, self._stops = tokenizer.backend_tokenizer, StopTexts(stop)
        self.came = self.passed = 0
        self._ids: list[int] = []  # of the window that is still decoded
        self._known = 0  # how many of them were there when the window's text was last whole
        self._taken = 0  # characters of the window's text that were taken

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come; the released text ends before it."""
        return self._stops.stopped

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._ids.append(token)
        text = self.backend.decode(self._ids)
        whole = text.rstrip(UNFINISHED)
        out = self._take(whole)
        if whole == text:  # the last tokens stay: some decoders write a first token otherwise
            self._ids = self._ids[self._known :]
            self._known, self._taken = len(self._ids), len(self.backend.decode(self._ids))
        return out

    def end(self) -> str:
        """Return what was held back, when no more tokens come."""
        return self._take(self.backend.decode(self._ids)) + self._stops.end()

    def _take(self, text: str) -> str:
        new = text[self._taken :]
        self._taken = max(self._taken, len(text))
        out = self._stops.add(new)
        self.came, self.passed = self.came + len(new), self.passed + len(out)
        return out


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop text begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Pieces:
    """What single tokens of a tokenizer's vocabulary stand for."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = tokenizer.backend_tokenizer
        # A byte-level vocabulary writes each byte as a character; these are as they are.
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in shown]
        letters = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}
        self._letters = letters if "ByteLevel" in str(self.backend.decoder) else {}

    def text(self, token: int) -> str:
        """Return a token's text; bytes that are no character are replaced."""
        return str(self.backend.decode([token], skip_special_tokens=False))

    def bytes(self, token: int) -> list[int]:
        """Return the UTF-8 bytes that a token stands for."""
        written = self.backend.id_to_token(token) or ""
        if all(char in self._letters for char in written):
            return [self._letters[char] for char in written]
        if written.startswith("<0x") and written.endswith(">"):
            return [int(written[3:-1], 16)]
        return list(self.text(token).encode())
