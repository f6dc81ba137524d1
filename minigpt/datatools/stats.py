"""Measure data files: lengths, turns, languages, repeated prompts, bias of preferences, labels.

One pass; memory does not grow with the file, but for two numbers a row where the tokens of
all rows are counted.
"""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from minigpt.data.formats import (
    BadRows,
    Kind,
    Preference,
    Record,
    Source,
    Text,
    Unpaired,
    guess_kind,
    messages_of,
    read_records,
    texts_of,
)
from minigpt.data.order import histogram, pack, utilisation
from minigpt.data.store import Encoder, Limits
from minigpt.datatools.duplicates import unicode_tables
from minigpt.errors import DataError
from minigpt.page import bar_chart, charts, escape, number, table

_TEXTS = 2000  # rows, of those added at once, whose characters per token are counted
_PROMPTS = 100_000  # different prompts that are counted at a time
_TOP = 10  # repeated prompts that a report lists
_SCRIPTS = (  # what most of a row's letters belong to, and where these lie in Unicode
    ("Latin script", ((0x41, 0x5B), (0x61, 0x7B), (0xC0, 0x250), (0x1E00, 0x1F00))),
    ("Chinese", ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x33480))),
    ("Japanese", ((0x3041, 0x3100),)),
    ("Korean", ((0x1100, 0x1200), (0xAC00, 0xD7A4))),
    ("Cyrillic", ((0x400, 0x530),)),
    ("Arabic", ((0x600, 0x780),)),
)
_LATIN_PER_CHINESE = 3  # Latin letters that weigh as much as one character of another script
_LATIN = re.compile("[A-Za-z]")
_BLOCK_ROWS = 300  # measured together
# Where the texts of a row hold the prompt, and how many of its characters are compared.
_PROMPT: dict[Kind, tuple[int, int]] = {
    "text": (-1, 80),
    "chat": (-2, 200),
    "preference": (-3, 200),
    "unpaired": (-2, 200),
}
# Whose messages count the turns of a row.
_TURN_ROLE: dict[Kind, str] = {"chat": "assistant", "preference": "user", "unpaired": "user"}


@cache
def _scripts() -> NDArray[np.uint8]:
    """Return for each code point what script its folded form belongs to."""
    scripts = np.zeros(0x110000, np.uint8)
    for index, (_, ranges) in enumerate(_SCRIPTS, 1):
        for start, end in ranges:
            scripts[start:end] = index
    return scripts[unicode_tables()[0]]


def languages(texts: Sequence[str]) -> Counter[str]:
    """Count texts by the script of most of their letters; a tenth of kana makes Japanese."""
    names = [name for name, _ in _SCRIPTS] + ["other"]
    kinds = len(names)
    ascii_texts = [text for text in texts if text.isascii()]
    latin = sum(map(bool, map(_LATIN.search, ascii_texts)))
    texts = [text for text in texts if not text.isascii()]
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    first_cells = np.arange(0, kinds * len(texts), kinds).repeat(lengths)  # of each one's text
    cells = np.bincount(first_cells + _scripts()[codes], minlength=kinds * len(texts))
    counts = cells.reshape(len(texts), kinds)[:, 1:]  # a text's letters of each script
    counts[:, 1:] *= _LATIN_PER_CHINESE
    chinese, japanese = counts[:, 1], counts[:, 2]
    japanese += np.where(japanese * 10 > chinese, chinese, 0)
    most = np.where(counts.any(1), counts.argmax(1), len(_SCRIPTS))
    totals = np.bincount(most, minlength=kinds)
    totals[0] += latin
    totals[-1] += len(ascii_texts) - latin
    return Counter({name: n for name, n in zip(names, totals.tolist(), strict=True) if n})


class _TokenCounts:
    """Counts the tokens of rows, uncut and as training cuts them."""

    def __init__(self, kind: Kind, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self.max_length = max_length
        self.backend = tokenizer.backend_tokenizer
        self.uncut_encoder = Encoder(kind, tokenizer, Limits(max_length=1 << 30))
        self.cut_encoder = Encoder(kind, tokenizer, Limits(max_length=max_length))
        self.lengths = array("q")  # of rows, to the end of the longer answer
        self.packed_lengths = array("q")  # of samples as they are packed
        self.characters = 0  # of the texts that `text_tokens` counts
        self.text_tokens = 0

    def add(self, records: Sequence[Record]) -> None:
        bad = BadRows("skip", 1.0)
        rows = [(record, Source(Path(), 0)) for record in records]
        for sample, _ in self.uncut_encoder.encode(rows, bad):
            self.lengths.append(len(sample.prompt) + max(map(len, sample.answers)))
        for sample, _ in self.cut_encoder.encode(rows, bad):
            self.packed_lengths.append(len(sample.ids))
        texts = [text for record in records[:_TEXTS] for text in texts_of(record)]
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        self.characters += sum(map(len, texts))
        self.text_tokens += sum(len(e.ids) for e in encoded)

    def report(self, tokens_per_batch: int) -> dict[str, Any]:
        lengths = np.array(self.lengths)
        packed = np.array(self.packed_lengths)
        limit = self.max_length
        if not len(packed):
            raise DataError(f"no row leaves a token to train on in {limit}", reason="no_targets")
        budget = max(tokens_per_batch, int(packed.max()))
        bins = pack(packed, budget, np.random.default_rng(0))
        quantiles = np.quantile(lengths, [0.5, 0.9, 0.99, 1]).tolist()
        return {
            "rows_measured": len(lengths),
            "mean": float(lengths.mean()),
            **dict(zip(("median", "p90", "p99", "longest"), quantiles, strict=True)),
            "max_length": limit,
            "over_max_length": float((lengths > limit).mean()),
            "histogram": histogram([lengths]),
            "characters_per_token": self.characters / max(1, self.text_tokens),
            "packing_efficiency": utilisation(packed, bins, budget),
            "padding_efficiency": float(np.minimum(lengths, limit).mean() / limit),
        }


def measure(
    path: Path,
    kind: Kind | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_length: int = 512,
    tokens_per_batch: int = 8192,
    sample: int | None = 2000,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Measure one file.

    Args:
        path: a file of any form that training reads.
        kind: the kind of its rows; guessed when None.
        tokenizer: counts tokens; without one there is no "tokens" part.
        max_length: tokens of a sample in training.
        tokens_per_batch: the budget that samples are packed into.
        sample: rows whose tokens are counted, spread evenly by chance; None for all.
        columns: the rows' keys that have other names here.

    Raises:
        DataError: when the file cannot be read or no row can be used.
    """
    kind = kind or guess_kind(path, columns)
    rows = _RowCounts(kind)
    counts = _TokenCounts(kind, tokenizer, max_length) if tokenizer else None
    reservoir = _Reservoir(sample or 0)
    bad = BadRows("skip", 1.0)
    records = (record for record, _ in read_records([path], kind, bad, columns=columns))
    while block := list(islice(records, _BLOCK_ROWS)):
        rows.add(block)
        if counts and sample is None:
            counts.add(block)
        elif counts:
            reservoir.add(block)
    if counts and reservoir.records:
        counts.add(reservoir.records)
    return {
        "file": str(path),
        "kind": kind,
        "bytes": path.stat().st_size,
        "rows": rows.count,
        "bad_rows": dict(bad.counts),
        **rows.report(),
        "tokens": counts.report(tokens_per_batch) if counts else None,
    }


class _RowCounts:
    """Measures rows by their texts."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.count = self.characters = 0
        self.turns = Counter[int]()
        self.languages = Counter[str]()
        self.prompts = Counter[str]()
        self.length_bias = Counter[str]()
        self.desirable = 0

    def add(self, records: Sequence[Record]) -> None:
        rows = [texts_of(record) for record in records]
        texts = ["\n".join(row) for row in rows]
        self.count += len(records)
        self.characters += sum(map(len, texts))
        self.languages += languages(texts)
        index, length = _PROMPT[self.kind]
        self.prompts.update([row[index][:length] for row in rows])
        if len(self.prompts) > _PROMPTS:
            repeated = Counter({text: n for text, n in self.prompts.items() if n > 1})
            self.prompts = Counter(dict(repeated.most_common(_PROMPTS // 2)))
        chats = [record for record in records if not isinstance(record, Text)]
        role = _TURN_ROLE.get(self.kind)
        self.turns.update([sum(m.role == role for m in messages_of(chat)) for chat in chats])
        self.desirable += sum(isinstance(r, Unpaired) and r.desirable for r in records)
        pairs = [record for record in records if isinstance(record, Preference)]
        self._add_length_bias([(len(p.chosen.content), len(p.rejected.content)) for p in pairs])

    def _add_length_bias(self, lengths: Sequence[tuple[int, int]]) -> None:
        """Count which of each pair's answers is the longer one, by their characters."""
        self.length_bias["chosen_longer"] += sum(chosen > rejected for chosen, rejected in lengths)
        self.length_bias["equally_long"] += sum(chosen == rejected for chosen, rejected in lengths)
        self.length_bias["chosen_characters"] += sum(chosen for chosen, _ in lengths)
        self.length_bias["rejected_characters"] += sum(rejected for _, rejected in lengths)

    def report(self) -> dict[str, Any]:
        bias = {name: total / self.count for name, total in self.length_bias.items()}
        return {
            "characters": self.characters,
            "turns": {str(n): count for n, count in sorted(self.turns.items())},
            "languages": {name: n / self.count for name, n in self.languages.most_common()},
            "repeated": [(text, n) for text, n in self.prompts.most_common(_TOP) if n > 1],
            "length_bias": bias if self.kind == "preference" else None,
            "desirable": self.desirable / self.count if self.kind == "unpaired" else None,
        }


class _Reservoir:
    """A fair sample of all records so far (reservoir sampling)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen = 0
        self.records: list[Record] = []
        self.random = random.Random(0)

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            self.seen += 1
            if self.seen <= self.size:
                self.records.append(record)
            elif (index := int(self.random.random() * self.seen)) < self.size:
                self.records[index] = record


def facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a report's single numbers in words: name and value."""
    tokens, bias = report["tokens"], report["length_bias"]
    bad = "".join(f"; bad: {n} {reason}" for reason, n in report["bad_rows"].items())
    lines = [
        ("rows", f"{number(report['rows'])} of {report['kind']}{bad}"),
        ("size", f"{report['bytes'] / 1e6:.3g} MB, {number(report['characters'])} characters"),
    ]
    if tokens:
        named = ("mean", "median", "p90", "p99", "longest")
        lines += [
            ("tokens of a row", ", ".join(f"{name} {tokens[name]:.0f}" for name in named)),
            ("tokens counted in", f"{number(tokens['rows_measured'])} rows"),
            (f"over {tokens['max_length']} tokens", f"{tokens['over_max_length']:.1%} of rows"),
            ("characters per token", f"{tokens['characters_per_token']:.2f}"),
            ("packing efficiency", f"{tokens['packing_efficiency']:.1%} of a micro-batch is data"),
            ("the same, padded", f"{tokens['padding_efficiency']:.1%}, each row to the maximum"),
        ]
    if report["desirable"] is not None:
        lines.append(("desirable", f"{report['desirable']:.1%} of the completions"))
    if bias:
        size = f"{bias['chosen_characters']:.0f} to {bias['rejected_characters']:.0f}"
        lines += [
            ("chosen is longer", f"{bias['chosen_longer']:.1%}; equal: {bias['equally_long']:.1%}"),
            ("mean characters", f"{size}, chosen to rejected"),
        ]
    return lines


def plots(report: dict[str, Any]) -> dict[str, list[tuple[str, float]]]:
    """Return a report's distributions: title to (label, value) bars."""
    bars = {
        "Rows by turns": [*report["turns"].items()][:20],
        "Rows by language, %": [(k, round(v * 100, 1)) for k, v in report["languages"].items()],
    }
    if tokens := report["tokens"]:
        over = f"{tokens['over_max_length']:.1%} over {tokens['max_length']}"
        bars = {f"Rows by tokens ({over})": tokens["histogram"]} | bars
    if bias := report["length_bias"]:
        longer = {"chosen": bias["chosen_longer"], "equal": bias["equally_long"]}
        longer["rejected"] = 1 - sum(longer.values())
        bars["Pairs by the longer answer, %"] = [(k, round(v * 100, 1)) for k, v in longer.items()]
    return {title: plot for title, plot in bars.items() if plot}


def section(report: dict[str, Any]) -> str:
    """Return a report as a part of an HTML page."""
    figures = [bar_chart(title, bars) for title, bars in plots(report).items()]
    repeated = table(("times", "starts with"), [(n, text) for text, n in report["repeated"]])
    return (
        f"<h2>{escape(report['file'])}</h2>\n{table(('', ''), facts(report))}{charts(figures)}"
        f"<h3>Most repeated prompts</h3>{repeated if report['repeated'] else '<p>None.</p>'}\n"
    )


def terminal(report: dict[str, Any], width: int = 36) -> str:
    """Return a report as plain text with bars."""
    lines = [report["file"], *(f"  {name:22} {value}" for name, value in facts(report))]
    for title, bars in plots(report).items():
        most = max(value for _, value in bars) or 1
        lines.append(f"  {title}")
        for label, value in bars:
            bar = "█" * round(value / most * width) or "▏"
            lines.append(f"    {label:>22} {bar} {number(value)}")
    if report["repeated"]:
        lines.append("  Most repeated prompts")
        for text, times in report["repeated"]:
            shown = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
            lines.append(f"    {times:>6} × {shown[:60]}")
    return "\n".join(lines)
