"""Log-probabilities of given tokens: the one routine behind all scores that sample nothing.

Shape legend: N target tokens of a batch, A answers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt import progress
from minigpt.data.batch import PackedBatch, Sample, collate
from minigpt.data.chat import common_prefix
from minigpt.data.formats import (
    BadRows,
    Kind,
    Record,
    Source,
    parse_row,
    read_records,
    suffix_of,
    whole_text,
)
from minigpt.data.store import Encoder, Limits
from minigpt.data.tokenizer import check_ids, special_texts, token_bytes
from minigpt.errors import DataError
from minigpt.evaluate.scores import Score
from minigpt.infer.engine import Engine
from minigpt.model.conformance import require_conformance
from minigpt.model.losses import sum_by
from minigpt.model.packed_lm import target_logits, token_logprobs, use_attention
from minigpt.model.rope import max_positions, shared_prompt_limit

BATCH_TOKENS = 4096  # of a packed batch, at most
BATCH_LOGITS = 1 << 25  # of a packed batch, at most: 128 MB in fp32

Continuation = tuple[list[int], list[int]]  # ids of a context, and of what follows it


class Reader(Protocol):
    """What reads samples: an engine, or a reward model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    rows: int  # how many token ids the model embeds


def batches(engine: Engine, samples: Iterable[Sample]) -> Iterator[PackedBatch]:
    """Pack samples in their order; one that is longer than a batch is read alone.

    Raises:
        DataError: for a sample that is longer than the model can read, or holds a token that it
            cannot embed.
    """
    for members in grouped(engine, samples, min(BATCH_TOKENS, BATCH_LOGITS // engine.rows)):
        yield collate(members).to(engine.model.device)


def grouped(reader: Reader, samples: Iterable[Sample], budget: int) -> Iterator[list[Sample]]:
    """Yield samples in their order, as many as have at most `budget` tokens together.

    Raises:
        DataError: as `batches`.
    """
    members: list[Sample] = []
    for sample in samples:
        check_sample(reader, sample)
        if members and sum(len(s.ids) for s in members) + len(sample.ids) > budget:
            yield members
            members = []
        members.append(sample)
    if members:
        yield members


def check_sample(reader: Reader, sample: Sample) -> None:
    """Refuse, with a DataError, what a model cannot read, by its length or by a token."""
    config = reader.model.config
    limit = max_positions(config)
    if sample.prompt:
        limit = min(limit, shared_prompt_limit(config))
    length = sample.prompt + max(sample.answers)
    if length > limit:
        raise DataError(
            f"{length} tokens are more than the {limit} that the model reads",
            path=sample.source[0],
            line=sample.source[1],
            remedy="Shorten the row, or lower --max_length for texts.",
            reason="oversize",
        )
    try:
        check_ids(reader.tokenizer, sample.ids.tolist(), reader.rows)
    except DataError as error:
        raise error.at(*sample.source) from None


@torch.no_grad()
def batch_logits(engine: Engine, batch: PackedBatch) -> Tensor:
    """Return the logits [N, V] by which a model predicts the targets of a batch."""
    conformance = require_conformance(engine.model, training=True)
    with use_attention(engine.model, conformance.training):
        return target_logits(engine.model, batch, conformance.packed)


def continuation(engine: Engine, context: str, rest: str) -> Continuation:
    """Return the ids of a text's start and of what follows.

    Both are tokenised together, as in training; a token that spans the border belongs to what
    follows.
    """
    start, ids = engine.encode(context), engine.encode(context + rest)
    if not context and not engine.start:  # `start` is then an end of text, which `ids` lack
        return start, ids
    common = common_prefix(start, ids)
    return (ids[:common], ids[common:]) if common else (engine.encode(""), ids)


def score(
    engine: Engine, continuations: Sequence[Continuation], source: str = ""
) -> list[tuple[float, bool]]:
    """Score continuations.

    Args:
        engine: the model.
        continuations: each with its context, neither of them empty.
        source: the file they come from, for errors.

    Returns:
        For each continuation its summed log-probability in nats, and whether greedy decoding would
        produce it.
    """
    order = sorted(range(len(continuations)), key=lambda i: sum(map(len, continuations[i])))
    samples = (
        Sample(np.array(context + rest), len(context), (len(rest),), None, (source, 0))
        for context, rest in (continuations[i] for i in order)
    )
    results: list[tuple[float, bool]] = []
    for batch in batches(engine, samples):
        logits = batch_logits(engine, batch)
        differs = (logits.argmax(-1) != batch.labels).float()
        logp = token_logprobs(logits, batch.labels)
        sums = sum_by(logp, batch.answers, batch.n_answers)
        greedy = sum_by(differs, batch.answers, batch.n_answers) == 0
        results += zip(sums.tolist(), greedy.tolist(), strict=True)
        progress.report(len(results), len(continuations))
    return [result for _, result in sorted(zip(order, results, strict=True))]


def documents(path: str, special: Sequence[str] = ()) -> Iterator[tuple[Record, Source]]:
    """Read texts: rows with ``text``, or a ``.txt`` file, also compressed, as one text.

    Raises:
        DataError: for a file or row that cannot be read.
    """
    if suffix_of(Path(path)) != ".txt":
        yield from read_records([path], "text", BadRows(), special_tokens=special)
        return
    text = whole_text(Path(path))
    try:
        yield parse_row({"text": text}, "text", special), Source(Path(path), 1)
    except DataError as error:
        raise error.at(path, 1) from None


def samples(
    reader: Reader, kind: Kind, rows: Iterable[tuple[Record, Source]], max_length: int
) -> Iterator[Sample]:
    """Yield records as the samples of training: windows of texts, preferences cut to a length."""
    encoder = Encoder(kind, reader.tokenizer, Limits(max_length=max_length))
    for encoded, source in encoder.encode(rows, BadRows()):
        answers = tuple(map(len, encoded.answers))
        origin = (str(source.path), source.line)
        yield Sample(np.array(encoded.ids), len(encoded.prompt), answers, None, origin)


def bits_per_byte(engine: Engine, path: str, max_length: int) -> dict[str, Score]:
    """Measure the loss on text, in windows of at most `max_length` tokens, as training does.

    The first token of a document is not counted: nothing stands before it, or it is BOS.
    """
    sizes = torch.tensor(token_bytes(engine.tokenizer), device=engine.model.device)
    nats, tokens, size = 0.0, 0, 0
    rows = documents(path, special_texts(engine.tokenizer))
    for batch in batches(engine, samples(engine, "text", rows, max_length)):
        logp = token_logprobs(batch_logits(engine, batch), batch.labels)
        nats -= float(logp.double().sum())
        tokens += len(batch.labels)
        size += int(sizes[batch.labels].sum())
    return {
        "bits_per_byte": Score(nats / math.log(2) / max(1, size), size),
        "loss": Score(nats / max(1, tokens), tokens),
    }
