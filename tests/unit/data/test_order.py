from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minigpt.data.order import LENGTH_STEP, FileShare, PackedOrder, pack, shuffle, utilisation
from minigpt.errors import DataError

Lengths = Callable[[NDArray[np.int64]], NDArray[np.int64]]
Batches = list[list[tuple[int, int]]]


def lengths(index: NDArray[np.int64]) -> NDArray[np.int64]:
    return 1 + (index * 7) % 10


def order(*shares: tuple[int, int], seed: int | None = 0, buffer: int = 8192) -> PackedOrder:
    file_shares = [FileShare(size, count) for size, count in shares]
    return PackedOrder([lengths] * len(shares), file_shares, 20, seed, buffer)


def drawn(packed_order: PackedOrder, epoch: int = 0) -> Counter[tuple[int, int]]:
    return Counter(sample for members in packed_order.batches(epoch) for sample in members)


def times(part: int, size: int, count: int = 1) -> Counter[tuple[int, int]]:
    return Counter({(part, sample): count for sample in range(size)})


@pytest.mark.parametrize("size", [*range(1, 20), 63, 64, 65, 255, 256, 257, 1000, 1999, 2000])
def test_shuffle_is_a_permutation(size: int) -> None:
    index = np.arange(size, dtype=np.int64)
    permutations = {seed: shuffle(index, size, seed) for seed in range(3)}
    for permuted in permutations.values():
        assert sorted(permuted.tolist()) == index.tolist()
    if size > 10:
        assert not np.array_equal(permutations[0], permutations[1])
        assert not np.array_equal(permutations[0], index)


@settings(max_examples=60)
@given(st.integers(1, 2000), st.integers(0, 2**32 - 1))
def test_shuffle_permutes_any_size(size: int, seed: int) -> None:
    permuted = shuffle(np.arange(size, dtype=np.int64), size, seed)
    assert sorted(permuted.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [10**6, 2**40 + 3])
def test_shuffle_of_some_of_many(size: int) -> None:
    index = np.random.default_rng(0).choice(min(size, 10**6), 20_000, replace=False)
    before = index.copy()
    permuted = shuffle(index, size, 5)
    assert len(set(permuted.tolist())) == len(index)
    assert permuted.min() >= 0
    assert permuted.max() < size
    assert abs(permuted.mean() / size - 0.5) < 0.02
    assert np.array_equal(shuffle(index[::-1], size, 5)[::-1], permuted)  # nothing but a function
    assert np.array_equal(index, before)


def test_shuffle_spreads_neighbours() -> None:
    """Each place is reached from each index about equally often over the seeds."""
    index = np.arange(16, dtype=np.int64)
    counts = np.zeros((16, 16), np.int64)
    for seed in range(1600):
        counts[index, shuffle(index, 16, seed)] += 1
    assert counts.min() > 50  # of 100 expected; chance alone strays by 10 or so
    assert counts.max() < 160


@pytest.mark.parametrize("buffer", [1, 7, 100, 8192])
@pytest.mark.parametrize("seed", [0, 3, None])
def test_an_epoch_holds_each_sample_once(seed: int | None, buffer: int) -> None:
    packed_order = order((50, 50), (1, 1), (33, 33), seed=seed, buffer=buffer)
    expected = times(0, 50) + times(1, 1) + times(2, 33)
    assert [drawn(packed_order, epoch) for epoch in range(3)] == [expected] * 3


def test_batches_keep_the_budget() -> None:
    for members in order((300, 300), buffer=50).batches(1):
        assert 0 < sum(int(lengths(np.array(sample))) for _, sample in members) <= 20


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def batches(seed: int, epoch: int) -> Batches:
        return list(order((100, 100), (60, 30), seed=seed, buffer=32).batches(epoch))

    one = order((100, 100), (60, 30), seed=1, buffer=32)
    list(islice(one.batches(5), 3))  # leaves no trace
    for epoch in (2, 0, 2, 1):
        assert list(one.batches(epoch)) == batches(1, epoch)
    firsts = [batches(seed, epoch)[0] for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(firsts) for b in firsts[:i])


def test_parts_are_mixed() -> None:
    packed_order = order((400, 400), (400, 400), buffer=64)
    first = [part for members in islice(packed_order.batches(0), 12) for part, _ in members]
    assert 0.2 < np.mean(first) < 0.8


def test_weights_repeat_and_thin_out() -> None:
    packed_order = order((20, 40), (20, 10), (20, 20), buffer=16)
    first, second = drawn(packed_order, 0), drawn(packed_order, 1)
    for epoch in (first, second):
        assert epoch.total() == 70
        assert {k: n for k, n in epoch.items() if k[0] != 1} == times(0, 20, 2) + times(2, 20)
        assert max(n for k, n in epoch.items() if k[0] == 1) == 1
    halves = [{k for k in epoch if k[0] == 1} for epoch in (first, second)]
    assert [len(half) for half in halves] == [10, 10]
    assert halves[0] | halves[1] == set(times(1, 20))


@pytest.mark.parametrize(("size", "count"), [(10, 3), (7, 5), (5, 12), (9, 1), (4, 0)])
def test_no_sample_of_a_weighted_part_starves(size: int, count: int) -> None:
    packed_order = order((size, count), (3, 3))
    totals: Counter[tuple[int, int]] = Counter()
    for epoch in range(size):  # `count` whole turns
        now = drawn(packed_order, epoch)
        assert now.total() == count + 3
        totals += now
        per_sample = [totals[0, sample] for sample in range(size)]
        assert max(per_sample) - min(per_sample) <= 1
    assert totals == times(0, size, count) + times(1, 3, size)


def test_turns_of_a_half_part_differ() -> None:
    packed_order = order((40, 20))
    halves = [set(drawn(packed_order, epoch)) for epoch in range(4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(times(0, 40))
    assert halves[2] not in halves[:2]


def test_without_a_seed_windows_keep_the_files_order() -> None:
    packed_order = order((40, 40), (40, 40), seed=None, buffer=16)
    flat = [40 * part + sample for members in packed_order.batches(0) for part, sample in members]
    windows = [sorted(flat[start : start + 16]) for start in range(0, 80, 16)]
    assert windows == [list(range(start, start + 16)) for start in range(0, 80, 16)]
    assert flat != sorted(flat)  # inside a buffer, packing decides


def test_only_the_window_is_measured() -> None:
    asked: list[int] = []

    def measured(index: NDArray[np.int64]) -> NDArray[np.int64]:
        asked.append(len(index))
        return lengths(index)

    packed_order = PackedOrder([measured], [FileShare(10**9, 10**9)], 20, 0, buffer=64)
    next(packed_order.batches(0))
    assert asked == [64]


def test_count() -> None:
    packed_order = order((100, 150), (10, 10), buffer=32)
    assert [packed_order.count(e) for e in (0, 1)] == [
        len(list(packed_order.batches(e))) for e in (0, 1)
    ]
    assert order().count() == 0
    assert packed_order.is_quick_to_count  # it was counted
    sizes = (100, 150), (10, 10)
    assert order(*sizes).is_quick_to_count
    assert not order(*sizes, buffer=32).is_quick_to_count


def test_an_epoch_is_packed_once_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    packed_order = order((30, 30))
    counted = packed_order.count(1)
    monkeypatch.setattr(PackedOrder, "batches", None)
    assert packed_order.count(1) == counted > 0


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
    assert len(sums) == smallest or sum(sums[:2]) > budget - 2 * LENGTH_STEP


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
