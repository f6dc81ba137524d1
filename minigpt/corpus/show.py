"""Show what the model is trained on: each token of rows, and whether it is a target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.text import Text
from transformers import PreTrainedTokenizerFast

from minigpt.corpus.check import guess_kind
from minigpt.data.records import BadRows, Kind, read_records
from minigpt.data.store import Encoded, Encoder, Limits
from minigpt.data.tokenizer import special_texts
from minigpt.report.page import escape

STYLES = {True: ("black on green3", "black on pale_green3"), False: ("grey50", "grey62")}
LOST = "\ufffd"
LEGEND = "What is underlined is trained on, the rest only read. Each shade is one token."
CSS = """<style>
figure { margin-top: 1rem; }
.tokens { white-space: pre-wrap; font: .9rem/1.9 ui-monospace, monospace; }
.t { border-bottom: 2px solid var(--c2); }
.t { background: color-mix(in srgb, var(--c2) 34%, transparent); }
.t.o { background: color-mix(in srgb, var(--c2) 16%, transparent); }
.m { color: var(--soft); }
.m.o { background: color-mix(in srgb, var(--soft) 14%, transparent); }
</style>
"""


@dataclass(frozen=True)
class Segment:
    """A run of tokens that attention never leaves, or a part of a preference.

    Attributes:
        title: the place of its row, and what part of it this is.
        tokens: text of each token and whether it is a target.
        count: tokens, and how many of them are targets.
    """

    title: str
    tokens: tuple[tuple[str, bool], ...]
    count: tuple[int, int]


def segments(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: Kind | None = None,
    max_length: int = 512,
    start: int = 1,
    rows: int = 3,
) -> Iterator[Segment]:
    """Yield the segments that training makes of rows from line `start` on, in order.

    Raises:
        DataError: for a bad row, or when there is none from `start` on.
    """
    kind = kind or guess_kind(path)
    encoder, bad = Encoder(kind, tokenizer, Limits(max_length=max_length)), BadRows()
    records = read_records([path], kind, bad, special_tokens=special_texts(tokenizer))
    wanted = list(islice((row for row in records if row[1].line >= start), rows))
    for sample, source in encoder.encode(wanted, bad):
        for part, ids, targets in _parts(sample, kind):
            tokens = tuple(_pieces(tokenizer, ids, targets))
            yield Segment(f"{path}:{source.line}{part}", tokens, (len(ids), sum(targets)))


def _parts(sample: Encoded, kind: Kind) -> Iterator[tuple[str, list[int], list[bool]]]:
    if kind == "preference":
        yield " prompt", sample.prompt, [False] * len(sample.prompt)
        yield " chosen", sample.first, [True] * len(sample.first)
        yield " rejected", sample.second, [True] * len(sample.second)
    else:
        targets = sample.targets or [True] * len(sample.first)
        yield "", sample.first, [False, *targets[1:]]  # nothing predicts the first token


def _pieces(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], targets: list[bool]
) -> Iterator[tuple[str, bool]]:
    """Yield tokens as text; those that share a character come together."""
    decode, held = tokenizer.backend_tokenizer.decode, 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[held:end], skip_special_tokens=False)
        if not text.endswith(LOST) or end - held >= 4 or end == len(ids):
            yield text, targets[end - 1]
            held = end


def heading(segment: Segment) -> str:
    """Return a segment's place and its counts."""
    return f"{segment.title}: {segment.count[0]} tokens, {segment.count[1]} trained on"


def coloured(segment: Segment) -> Text:
    """Return a segment for a terminal with colours."""
    line = Text()
    for number, (text, target) in enumerate(segment.tokens):
        line.append(text.replace("\n", "↵\n"), STYLES[target][number % 2])
    return line


def plain(segment: Segment) -> str:
    """Return a segment for a terminal without colours: targets stand in ⟦ ⟧."""
    text, before = "", False
    for piece, target in (*segment.tokens, ("", False)):
        text += ("⟦" if target else "⟧") if target != before else ""
        text, before = text + piece, target
    return text


def html(parts: list[Segment]) -> str:
    """Return segments as the body of an HTML page."""
    body = [CSS, f'<p class="soft">{LEGEND}</p>']
    for part in parts:
        spans = (
            f'<span class="{"t" if target else "m"}{" o" if number % 2 else ""}">'
            f"{escape(text).replace(chr(10), '↵' + chr(10))}</span>"
            for number, (text, target) in enumerate(part.tokens)
        )
        title = f"<figcaption>{escape(heading(part))}</figcaption>"
        body.append(f'<figure>{title}<div class="tokens">{"".join(spans)}</div></figure>')
    return "\n".join(body)
