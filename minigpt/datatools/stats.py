"""Measure data files: lengths, turns, languages, repeated prompts, the bias of preferences.

One pass; memory does not grow with the file, but for two numbers a row where the tokens of
all rows are counted.
"""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import cache
from operator import eq, gt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from minigpt.data.formats import BadRows, Kind, Source, read_records, scan_rows
from minigpt.data.order import histogram, pack, utilisation
from minigpt.data.store import Encoder, Limits
from minigpt.datatools.check import guess_kind
from minigpt.datatools.duplicates import tables
from minigpt.datatools.flat import UNTRAINED, Flat, batches, record_of
from minigpt.errors import DataError
from minigpt.page import bar_chart, charts, escape, number, table

_TEXTS = 2000  # rows whose characters per token are counted
_PROMPTS = 100_000  # different prompts that are counted at a time
_TOP = 10
_SCRIPTS = (  # what most of a row's letters belong to, and where these lie in Unicode
    ("Latin script", ((0x41, 0x5B), (0x61, 0x7B), (0xC0, 0x250), (0x1E00, 0x1F00))),
    ("Chinese", ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x33480))),
    ("Japanese", ((0x3041, 0x3100),)),
    ("Korean", ((0x1100, 0x1200), (0xAC00, 0xD7A4))),
    ("Cyrillic", ((0x400, 0x530),)),
    ("Arabic", ((0x600, 0x780),)),
)
_BIAS = ("chosen_longer", "equally_long", "chosen_characters", "rejected_characters")
_LETTERS = 3  # of Latin script that weigh as much as one Chinese character
_LATIN = re.compile("[A-Za-z]")
_PROMPT: dict[Kind, tuple[int, int]] = {
    "text": (-1, 80),
    "chat": (-3, 200),
    "preference": (-5, 200),
}  # its place and length
_ROLE: dict[Kind, str] = {"chat": "assistant", "preference": "user"}


@cache
def _scripts() -> NDArray[np.uint8]:
    """Return for each code point what script its folded form belongs to."""
    scripts = np.zeros(0x110000, np.uint8)
    for index, (_, ranges) in enumerate(_SCRIPTS, 1):
        for start, end in ranges:
            scripts[start:end] = index
    return scripts[tables()[0]]


def languages(texts: Sequence[str]) -> Counter[str]:
    """Count texts by the script of most of their letters; a tenth of kana makes Japanese."""
    kinds, names = len(_SCRIPTS) + 1, [*(name for name, _ in _SCRIPTS), "other"]
    plain = [text for text in texts if text.isascii()]
    latin = sum(map(bool, map(_LATIN.search, plain)))
    texts = [text for text in texts if not text.isascii()]
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
    rows = np.arange(0, kinds * len(texts), kinds).repeat([*map(len, texts)] or 0)
    cells = np.bincount(rows + _scripts()[codes], minlength=kinds * len(texts))
    counts = cells.reshape(len(texts), kinds)[:, 1:]
    counts[:, 1:] *= _LETTERS
    counts[:, 2] += np.where(counts[:, 2] * 10 > counts[:, 1], counts[:, 1], 0)
    most = np.where(counts.any(1), counts.argmax(1), len(_SCRIPTS))
    found = np.bincount(most, minlength=kinds)
    found[[0, -1]] += (latin, len(plain) - latin)
    return Counter({name: n for name, n in zip(names, found.tolist(), strict=True) if n})


class _Tokens:
    """Counts the tokens of rows, whole and as training cuts them."""

    def __init__(self, kind: Kind, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self.kind, self.max_length, self.backend = kind, max_length, tokenizer.backend_tokenizer
        self.whole = Encoder(kind, tokenizer, Limits(max_length=1 << 30))
        self.cut = Encoder(kind, tokenizer, Limits(max_length=max_length))
        self.lengths, self.packed = array("q"), array("q")
        self.texts = self.text_tokens = 0

    def add(self, flats: Sequence[Flat]) -> None:
        bad, source = BadRows("skip", 1.0), Source(Path(), 0)
        rows = [(record_of(flat, self.kind), source) for flat in flats]
        for sample, _ in self.whole.encode(rows, bad):
            longest = max(len(sample.first), len(sample.second))
            self.lengths.append(len(sample.prompt) + longest)
        for sample, _ in self.cut.encode(rows, bad):
            self.packed.append(len(sample.prompt) + len(sample.first) + len(sample.second))
        texts = [text for flat in flats[:_TEXTS] for text in flat[1::2]]
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        self.texts += sum(map(len, texts))
        self.text_tokens += sum(len(e.ids) for e in encoded)

    def report(self, tokens_per_batch: int) -> dict[str, Any]:
        lengths, packed = np.array(self.lengths), np.array(self.packed)
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
            "characters_per_token": self.texts / max(1, self.text_tokens),
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
) -> dict[str, Any]:
    """Measure one file.

    Args:
        path: the file.
        kind: of its rows; guessed when None.
        tokenizer: counts tokens; without one there is no "tokens" part.
        max_length: tokens of a sample in training.
        tokens_per_batch: the budget that samples are packed into.
        sample: rows whose tokens are counted, spread evenly by chance; None for all.

    Raises:
        DataError: when the file cannot be read or no row can be used.
    """
    kind = kind or guess_kind(path)
    bad, chance, bias = Counter[str](), random.Random(0), Counter[str]()
    tokens = _Tokens(kind, tokenizer, max_length) if tokenizer else None
    turns, found, prompts = Counter[int](), Counter[str](), Counter[str]()
    kept: list[Flat] = []
    rows = length = 0
    for batch in batches(scan_rows(path), kind):
        flats = [flat for flat in batch.flats if isinstance(flat, tuple)]
        bad.update([error.reason for error in batch.flats if isinstance(error, DataError)])
        texts = ["\n".join(flat[1::2]) for flat in flats]
        place, end = _PROMPT[kind]
        prompts.update([flat[place][:end] for flat in flats])
        if role := _ROLE.get(kind):
            turns.update([flat[::2].count(role) + flat[::2].count(UNTRAINED) for flat in flats])
        if kind == "preference":
            _add_bias(bias, flats)
        length += sum(map(len, texts))
        found += languages(texts)
        if len(prompts) > _PROMPTS:
            again = Counter({text: n for text, n in prompts.items() if n > 1})
            prompts = Counter(dict(again.most_common(_PROMPTS // 2)))
        if tokens and sample is None:
            tokens.add(flats)
        elif tokens and sample:
            _sample(kept, flats, rows, sample, chance)
        rows += len(flats)
    if not rows:
        next(read_records([path], kind, BadRows("skip", 1.0)))  # raises the error that says so
    if tokens and kept:
        tokens.add(kept)
    return {
        "file": str(path),
        "kind": kind,
        "bytes": path.stat().st_size,
        "rows": rows,
        "bad_rows": dict(bad),
        "characters": length,
        "turns": {str(n): count for n, count in sorted(turns.items())},
        "languages": {name: count / rows for name, count in found.most_common()},
        "repeated": [(text, n) for text, n in prompts.most_common(_TOP) if n > 1],
        "length_bias": {key: bias[key] / rows for key in _BIAS} if kind == "preference" else None,
        "tokens": tokens.report(tokens_per_batch) if tokens else None,
    }


def _add_bias(bias: Counter[str], pairs: list[Flat]) -> None:
    """Count which of each pair's answers is the longer one, by their characters."""
    chosen, rejected = [len(flat[-3]) for flat in pairs], [len(flat[-1]) for flat in pairs]
    longer, equal = (sum(map(than, chosen, rejected)) for than in (gt, eq))
    counts = (longer, equal, sum(chosen), sum(rejected))
    bias.update(dict(zip(_BIAS, counts, strict=True)))


def _sample(
    kept: list[Flat], batch: list[Flat], before: int, size: int, chance: random.Random
) -> None:
    """Keep a fair sample of all rows so far (reservoir sampling)."""
    for seen, row in enumerate(batch, before + 1):
        if seen <= size:
            kept.append(row)
        elif (place := int(chance.random() * seen)) < size:
            kept[place] = row


def facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a report's single numbers in words: name and value."""
    tokens, bias = report["tokens"], report["length_bias"]
    bad = "".join(f"; bad: {n} {reason}" for reason, n in report["bad_rows"].items())
    lines = [
        ("rows", f"{number(report['rows'])} of {report['kind']}{bad}"),
        ("size", f"{report['bytes'] / 1e6:.1f} MB, {number(report['characters'])} characters"),
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
    if bias:
        size = f"{bias['chosen_characters']:.0f} to {bias['rejected_characters']:.0f}"
        lines += [
            ("chosen is longer", f"{bias['chosen_longer']:.1%}; equal: {bias['equally_long']:.1%}"),
            ("mean characters", f"{size}, chosen to rejected"),
        ]
    return lines


def plots(report: dict[str, Any]) -> dict[str, list[tuple[str, float]]]:
    """Return a report's distributions: title to (label, value) bars."""
    drawn = {
        "Rows by turns": [*report["turns"].items()][:20],
        "Rows by language, %": [(k, round(v * 100, 1)) for k, v in report["languages"].items()],
    }
    if tokens := report["tokens"]:
        over = f"{tokens['over_max_length']:.1%} over {tokens['max_length']}"
        drawn = {f"Rows by tokens ({over})": tokens["histogram"]} | drawn
    if bias := report["length_bias"]:
        parts = {"chosen": bias["chosen_longer"], "equal": bias["equally_long"]}
        parts["rejected"] = 1 - sum(parts.values())
        drawn["Pairs by the longer answer, %"] = [(k, round(v * 100, 1)) for k, v in parts.items()]
    return {title: bars for title, bars in drawn.items() if bars}


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
