"""Show what the model is trained on: each token of rows, and whether it is a target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.text import Text
from transformers import PreTrainedTokenizerFast

from minigpt.data.chat import refused_texts
from minigpt.data.formats import (
    BadRows,
    Kind,
    Record,
    Source,
    guess_kind,
    parse_row,
    renamed,
    scan_rows,
)
from minigpt.data.store import EncodedSample, Encoder, Limits
from minigpt.errors import DataError
from minigpt.page import escape
from minigpt.terminal import printable

STYLES = {True: ("black on green3", "black on pale_green3"), False: ("grey50", "grey62")}
REPLACEMENT = "\ufffd"  # what some bytes of a character decode to
CSS = """<style>
figure { margin-top: 1rem; }
.tokens { white-space: pre-wrap; font: .9rem/1.9 ui-monospace, monospace; }
.t { border-bottom: 2px solid var(--c2); }
.t { background: color-mix(in srgb, var(--c2) 34%, transparent); }
.t.o { background: color-mix(in srgb, var(--c2) 16%, transparent); }
.m { color: var(--soft); }
.m.o { background: color-mix(in srgb, var(--soft) 14%, transparent); }
</style>
<p class="soft">What is underlined is trained on, the rest only read. Each shade is one token.</p>
"""


class Segment(NamedTuple):
    """A sample, or its prompt or an answer to that, as (text, is a target) for each token."""

    heading: str
    tokens: list[tuple[str, bool]]


def segments(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: Kind | None = None,
    max_length: int = 512,
    start: int = 1,
    rows: int = 3,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Segment]:
    """Yield the segments that training makes of the first `rows` rows from line `start` on.

    Raises:
        DataError: for a bad row.
    """
    kind = kind or guess_kind(path, columns)
    encoder = Encoder(kind, tokenizer, Limits(max_length=max_length))
    records = _records(path, kind, start, refused_texts(tokenizer, kind), columns)
    bad = BadRows()
    for sample, source in encoder.encode(list(islice(records, rows)), bad):
        for name, ids, targets in _named_ids(sample, kind):
            counts = f"{len(ids)} tokens, {sum(targets)} trained on"
            tokens = list(_pieces(tokenizer, ids, targets))
            yield Segment(f"{path}:{source.line}{name}: {counts}", tokens)
    if first := bad.first_too_long:
        yield Segment(f"{path}:{first.line}: {first.problem}", [])


def _records(
    path: Path, kind: Kind, start: int, special: Sequence[str], columns: Mapping[str, str] | None
) -> Iterator[tuple[Record, Source]]:
    """Read the rows from a line on, whatever stands before it."""
    for line, row in scan_rows(path, columns=columns):
        if line >= start:
            try:
                yield parse_row(renamed(row, columns), kind, special), Source(path, line)
            except DataError as error:
                raise error.at(path, line) from None


def _named_ids(sample: EncodedSample, kind: Kind) -> Iterator[tuple[str, list[int], list[bool]]]:
    if kind == "preference":
        yield " prompt", sample.prompt, [False] * len(sample.prompt)
        margin = f" (margin {sample.margin:g})" if sample.margin else ""
        for name, ids in zip((f"chosen{margin}", "rejected"), sample.answers, strict=True):
            yield f" {name}", ids, [True] * len(ids)
    elif kind == "unpaired":
        yield " prompt", sample.prompt, [False] * len(sample.prompt)
        name = "desirable" if sample.desirable else "undesirable"
        yield f" {name}", sample.answers[0], [True] * len(sample.answers[0])
    else:
        ids = sample.ids
        targets = sample.targets or [True] * len(ids)
        yield "", ids, [False, *targets[1:]]  # nothing predicts the first token


def _pieces(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], targets: list[bool]
) -> Iterator[tuple[str, bool]]:
    """Yield tokens as text; those that share a character, of up to 4 bytes, come together."""
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.backend_tokenizer.decode(ids[start:end], skip_special_tokens=False)
        if not text.endswith(REPLACEMENT) or end - start >= 4 or end == len(ids):
            yield text, targets[end - 1]
            start = end


def coloured(segment: Segment) -> Text:
    """Return a segment for a terminal with colours."""
    line = Text()
    for number, (text, target) in enumerate(segment.tokens):
        line.append(printable(text).replace("\n", "↵\n"), STYLES[target][number % 2])
    return line


def plain(segment: Segment) -> str:
    """Return a segment for a terminal without colours: targets stand in ⟦ ⟧."""
    text = ""
    in_targets = False
    for piece, target in (*segment.tokens, ("", False)):
        if target != in_targets:
            text += "⟦" if target else "⟧"
        text += printable(piece)
        in_targets = target
    return text


def html(segments: list[Segment]) -> str:
    """Return segments as the body of an HTML page."""
    body = CSS
    for heading, tokens in segments:
        body += f'<figure><figcaption>{escape(heading)}</figcaption><div class="tokens">'
        for number, (text, target) in enumerate(tokens):
            css_class = ("t" if target else "m") + " o" * (number % 2)
            shown = escape(text.replace("\n", "↵\n"))
            body += f'<span class="{css_class}">{shown}</span>'
        body += "</div></figure>\n"
    return body
