from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data.packing import GRAIN, pack, utilisation
from minigpt.errors import DataError

CASES = st.integers(1, 200).flatmap(
    lambda budget: st.tuples(
        st.lists(st.integers(1, budget), max_size=200), st.just(budget), st.integers(0, 99)
    )
)


def packed(lengths: list[int], budget: int, seed: int = 0) -> list[list[int]]:
    return pack(np.array(lengths, np.int64), budget, np.random.default_rng(seed))


@given(CASES)
def test_each_sample_is_in_one_bin_within_the_budget(case: tuple[list[int], int, int]) -> None:
    lengths, budget, seed = case
    bins = packed(lengths, budget, seed)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= budget for members in bins)
    assert bins == packed(lengths, budget, seed)


@given(CASES)
def test_no_two_bins_would_fit_in_one(case: tuple[list[int], int, int]) -> None:
    lengths, budget, seed = case
    sums = sorted(sum(lengths[i] for i in members) for members in packed(lengths, budget, seed))
    smallest = -(-sum(lengths) // budget)
    assert len(sums) == smallest or sum(sums[:2]) > budget - 2 * GRAIN


@settings(max_examples=50)
@given(st.integers(64, 2000), st.integers(0, 2**32 - 1))
def test_many_small_samples_fill_their_bins(budget: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, budget // 16 + 1, 1000)
    bins = pack(lengths, budget, rng)
    assert utilisation(lengths, bins, budget) >= 0.9


def test_bins_are_filled_evenly_and_mixed() -> None:
    lengths = np.array([100] * 8 + [10] * 80)
    bins = pack(lengths, 400, np.random.default_rng(0))
    assert [sum(lengths[members]) for members in bins] == [400] * 4
    assert [sorted(lengths[members])[-2:] for members in bins] == [[100, 100]] * 4


def test_the_seed_decides_who_meets() -> None:
    lengths = [5] * 40
    assert packed(lengths, 20, 0) != packed(lengths, 20, 1)
    assert {frozenset(b) for b in packed(lengths, 20, 0)} != {
        frozenset(b) for b in packed(lengths, 20, 1)
    }


def test_a_sample_above_the_budget_is_refused() -> None:
    assert packed([9, 10], 10) in ([[0], [1]], [[1], [0]])
    with pytest.raises(DataError, match=r"a sample of 11 tokens .* micro-batch of 10") as caught:
        packed([1, 11], 10)
    assert (caught.value.reason, caught.value.field) == ("oversize", "tokens_per_batch")


def test_utilisation() -> None:
    assert packed([], 10) == []
    assert utilisation(np.array([], np.int64), [], 10) == 1.0
    assert utilisation(np.array([5, 10]), [[0], [1]], 10) == 0.75
