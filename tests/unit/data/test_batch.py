from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from lightning.pytorch.plugins.precision import FSDPPrecision, HalfPrecision, Precision
from tiny import SHAPES, preferences
from torch import Tensor

from minigpt.data.batch import (
    MULTIPLE,
    TILE,
    PackedBatch,
    Sample,
    collate,
    positions,
)


def text(*ids: int, line: int = 1) -> Sample:
    return Sample(np.array(ids, np.uint16), 0, (len(ids),), None, ("a.jsonl", line))


def chat(ids: list[int], targets: list[int]) -> Sample:
    mask = np.array(targets, np.bool_)
    return Sample(np.array(ids, np.uint16), 0, (len(ids),), mask, ("a.jsonl", 1))


def preference(prompt: list[int], chosen: list[int], rejected: list[int]) -> Sample:
    ids = np.array(prompt + chosen + rejected, np.uint16)
    answers = tuple(filter(None, (len(chosen), len(rejected))))
    return Sample(ids, len(prompt), answers, None, ("a.jsonl", 1))


# samples, ids that the model reads, positions, borders, (predict_at, label, answer) of each target
CASES = {
    "texts": (
        [text(10, 11, 12), text(20), text(30, 31)],
        [10, 11, 20, 30],
        [0, 1, 0, 0],
        [0, 2, 3, 4],
        [(0, 11, 0), (1, 12, 0), (3, 31, 2)],
    ),
    "chats": (
        [chat([10, 11, 12, 13, 14], [0, 0, 1, 0, 1]), chat([20, 21, 22], [1, 1, 0])],
        [10, 11, 12, 13, 20, 21],
        [0, 1, 2, 3, 0, 1],
        [0, 4, 6],
        [(1, 12, 0), (3, 14, 0), (4, 21, 1)],
    ),
    "preferences": (
        [preference([10, 11], [12, 13], [14]), preference([20], [21], [22, 23])],
        [10, 11, 12, 14, 20, 21, 22],
        [0, 1, 2, 2, 0, 1, 1],
        [0, 4, 7],
        [(1, 12, 0), (2, 13, 0), (1, 14, 1), (4, 21, 2), (4, 22, 3), (6, 23, 3)],
    ),
    "preference without a prompt": (
        [text(1, 2), preference([], [10, 11], [12, 13, 14])],
        [1, 10, 12, 13],
        [0, 0, 0, 1],
        [0, 1, 4],
        [(0, 2, 0), (1, 11, 1), (2, 13, 2), (3, 14, 2)],
    ),
    "texts of which all but one are read to a multiple": (
        [text(*range(10, 16)), text(*range(20, 26)), text(*range(30, 35))],
        [*range(10, 15), *range(20, 26), *range(30, 35)],
        [*range(5), *range(6), *range(5)],
        [0, 5, 11, MULTIPLE],
        [
            *((i, 11 + i, 0) for i in range(5)),
            *((5 + i, 21 + i, 1) for i in range(5)),
            *((11 + i, 31 + i, 2) for i in range(4)),
        ],
    ),
    "rows that kernels like": (
        [text(*range(TILE)), preference([1] * (TILE - 1), [2], [3, 4])],
        [*range(TILE), *[1] * (TILE - 1), 2, 3],
        [*range(TILE), *range(TILE - 1), TILE - 1, TILE - 1],
        [0, TILE, 2 * TILE + 1],
        [
            *((i, i + 1, 0) for i in range(TILE - 1)),
            (2 * TILE - 2, 2, 1),
            (2 * TILE - 2, 3, 2),
            (2 * TILE, 4, 2),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_collate(name: str) -> None:
    samples, ids, positions, borders, targets = CASES[name]
    batch = collate(samples, resume_at=(2, 3))
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.cu_seqlens.tolist() == borders
    actual = zip(
        batch.predict_at.tolist(), batch.labels.tolist(), batch.answers.tolist(), strict=True
    )
    assert list(actual) == targets
    assert batch.n_answers == sum(len(s.answers) for s in samples)
    assert (batch.n_tokens, batch.resume_at) == (sum(len(s.ids) for s in samples), (2, 3))


def test_types_and_sources() -> None:
    batch = collate([text(1, 2, line=7), preference([3], [4], [65535])])
    longs = ("input_ids", "position_ids", "predict_at", "labels", "answers")
    assert {getattr(batch, name).dtype for name in longs} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.labels.tolist() == [2, 4, 65535]
    assert batch.sources == (("a.jsonl", 7), ("a.jsonl", 1))


def test_a_batch_may_have_no_targets() -> None:
    batch = collate([text(5), chat([6, 7], [1, 0])])
    assert batch.labels.tolist() == batch.predict_at.tolist() == batch.answers.tolist() == []
    assert (batch.n_tokens, batch.n_answers) == (3, 2)


def test_rows_give_each_result_once_and_attend_to_their_prompt() -> None:
    plan = collate([text(7, 8, 0), preference([10, 11], [12, 13, 0], [14]), text(9)]).plan
    assert plan.cu_queries.tolist() == [0, 2, 6, 7, 8]
    assert plan.cu_keys.tolist() == [0, 2, 6, 9, 10]
    assert plan.keys is not None
    assert plan.keys.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 6, 7]
    assert (plan.longest, plan.longest_queries, plan.full) == (4, 4, 0)
    texts = collate([text(7, 8, 0), text(9)]).plan
    assert texts.keys is None
    assert texts.cu_queries.tolist() == texts.cu_keys.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("samples", "full"),
    [
        ([text(1, 2, 0), text(3, 4, 0), text(5, 6, 0)], 3),
        ([text(1, 2, 0), text(3, 4, 0), text(5)], 2),
        ([text(1, 2, 0), text(3)], 0),
        ([text(1), text(2, 3, 0), text(4, 5, 0)], 0),
        ([text(1, 2, 0), text(3, 4, 0), *[text(5)] * 4], 0),
        ([text(1, 2, 0)], 0),
        ([preference([1, 2], [3], [4])], 0),
        ([preference([], [3], [4])], 2),
    ],
)
def test_full_rows_stand_at_the_front(samples: list[Sample], full: int) -> None:
    assert collate(samples).plan.full == full


@given(SHAPES)
def test_last_tokens_are_left_unread_as_far_as_matmuls_like_it(
    shapes: list[tuple[int, int, int]],
) -> None:
    """Those of single tokens and of full tiles never; of others so many that a MULTIPLE is full."""
    rows = [(p, n) for p, *answers in shapes for n in answers if n]
    may = [n > 1 and (p + n) % TILE > 0 for p, n in rows]
    batch = collate(preferences(shapes))
    unread = [n - span[3] for (_, n), span in zip(rows, batch.plan.rows, strict=True)]
    assert all(left in (0, int(free)) for left, free in zip(unread, may, strict=True))
    read = len(batch.input_ids)
    assert read == batch.n_tokens - sum(unread)
    least = batch.n_tokens - sum(may)
    even = least + -least % MULTIPLE
    assert read == (even if even <= batch.n_tokens else least)


@given(SHAPES)
def test_all_last_tokens_are_read_where_they_are_asked_for(
    shapes: list[tuple[int, int, int]],
) -> None:
    samples = preferences(shapes)
    batch = collate(samples, read_last=True)
    assert len(batch.input_ids) == batch.n_tokens
    ends = [
        sample.ids[sample.prompt + sum(sample.answers[: n + 1]) - 1]
        for sample in samples
        for n in range(len(sample.answers))
    ]
    assert batch.input_ids[batch.answer_ends].tolist() == ends


@given(SHAPES)
def test_positions_count_along_each_row(shapes: list[tuple[int, int, int]]) -> None:
    batch = collate(preferences(shapes))
    rows = [positions(span) for span in batch.plan.rows]
    assert all(batch.position_ids[row].tolist() == list(range(len(row))) for row in rows)
    assert batch.plan.longest == max(map(len, rows))


def tensors(batch: PackedBatch) -> list[Tensor]:
    of_batch = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    return of_batch + [v for v in vars(batch.plan).values() if isinstance(v, Tensor)]


def test_to_moves_every_tensor_and_nothing_else() -> None:
    batch = collate([text(1, 2, 3), preference([4], [5], [6])], resume_at=(1, 2))
    moved = batch.to("meta")
    assert len(tensors(batch)) == 5 + 5
    here = [t for t in tensors(moved) if t.device.type != "meta"]
    assert [id(t) for t in here] == [id(batch.plan.spans)]
    assert {t.device.type for t in tensors(batch)} == {"cpu"}
    same = ("n_answers", "sources", "margins", "resume_at", "n_tokens")
    assert [getattr(moved, n) for n in same] == [getattr(batch, n) for n in same]
    assert moved.plan.longest == batch.plan.longest


@pytest.mark.parametrize("precision", [FSDPPrecision("32-true"), HalfPrecision("bf16-true")])
def test_lightning_can_convert_a_batch(precision: Precision) -> None:
    batch = collate([text(1, 2, 3), preference([4], [5], [6])], resume_at=(1, 2))
    converted = precision.convert_input(batch)
    assert [t.tolist() for t in tensors(converted)] == [t.tolist() for t in tensors(batch)]
    assert {t.dtype for t in tensors(converted)} == {torch.int32, torch.int64}
    assert converted.resume_at == (1, 2)


def test_without_targets_keeps_the_tokens_only() -> None:
    batch = collate([text(1, 2, 3)], resume_at=(1, 2))
    filler = batch.without_targets()
    assert [len(t) for t in (filler.labels, filler.predict_at, filler.answers)] == [0, 0, 0]
    assert filler.labels.dtype == filler.predict_at.dtype == torch.int64
    assert torch.equal(filler.input_ids, batch.input_ids)
    assert filler.plan.spans is batch.plan.spans
    assert filler.resume_at == batch.resume_at == (1, 2)
    assert batch.labels.tolist() == [2, 3]
