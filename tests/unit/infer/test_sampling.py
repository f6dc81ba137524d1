"""Which tokens may be drawn, and how likely each is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt.errors import ConfigError
from minigpt.infer.sampling import PARTIAL_SORT, Sampler, Sampling, draw, filtered, sample


@given(
    temperature=st.floats(0, 1e308),
    top_k=st.integers(0, 10**9),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1, exclude_max=True),
    penalty=st.floats(0.01, 100),
    seed=st.integers(0, 2**63 - 1),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
)
def test_whatever_numbers_are_accepted_give_a_token(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seed: int,
    scale: float,
) -> None:
    sampling = Sampling(1, temperature, top_k, top_p, seed, min_p, penalty)
    logits = scale * torch.randn(40, generator=torch.Generator().manual_seed(seed % 99))
    assert 0 <= Sampler(sampling, [3, 5]).sample(logits) < 40


def test_a_tiny_temperature_takes_the_likeliest_token() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-46, 5e-324, 1e-7):
        assert Sampler(Sampling(1, temperature), []).sample(logits) == int(logits.argmax())


@given(
    values=st.lists(
        st.sampled_from([-math.inf, math.inf, math.nan, -3e38, 3e38, 0.0, 1.0]),
        min_size=3,
        max_size=3,
    ),
    temperature=st.sampled_from([0.0, 5e-324, 1.0, 1e308]),
    penalty=st.sampled_from([0.01, 1.0, 100.0]),
    min_p=st.sampled_from([0.0, 0.5]),
)
def test_logits_without_a_distribution_give_none(
    values: list[float], temperature: float, penalty: float, min_p: float
) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5], values, [0.0, 1.0, 0.5]])
    greedy = Sampling()
    sampling = Sampling(1, temperature, min_p=min_p, repetition_penalty=penalty)
    samplers = [Sampler(one, [1]) for one in (greedy, sampling, greedy)]
    before, token, after = sample(logits, samplers)
    assert before == after == 1
    assert (token is None) == (not math.isfinite(max(values)) or any(map(math.isnan, values)))


@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_filters_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    steps: list[Any] = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    expected = LogitsProcessorList(steps)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    sampling = Sampling(1, temperature, top_k, top_p, min_p=min_p)
    torch.testing.assert_close(filtered(logits, sampling).softmax(-1), expected.softmax(-1))


def most_sorted(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> int:
    """Return how many of 5,000 logits were sorted to draw a token."""
    sizes = [0]
    topk, sort = torch.Tensor.topk, torch.Tensor.sort
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", lambda x, k: sizes.append(k) or topk(x, k))
        patch.setattr(torch.Tensor, "sort", lambda x, **k: sizes.append(len(x)) or sort(x, **k))
        logits = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
        Sampler(Sampling(1, changes.pop("temperature", 1.0), **changes), []).sample(logits)
    return max(sizes)


def test_no_more_tokens_are_sorted_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_sorted(monkeypatch) == 0
    assert most_sorted(monkeypatch, min_p=0.1) == 0
    assert most_sorted(monkeypatch, top_k=7, top_p=0.9) == 7
    assert most_sorted(monkeypatch, top_p=0.5) == PARTIAL_SORT
    assert most_sorted(monkeypatch, top_p=0.9, temperature=9.0) == 5000


@given(seed=st.integers(0, 10**6), top_p=st.sampled_from([0.01, 0.5, 0.99, 1 - 1e-7]))
def test_few_tokens_cut_where_all_would(seed: int, top_p: float) -> None:
    logits = 2 * torch.randn(3000, generator=torch.Generator().manual_seed(seed))
    expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]
    allowed = filtered(logits, Sampling(1, 1.0, top_p=top_p)) > -torch.inf
    # One token more or less may be allowed where the sum's last digits decide.
    assert abs(int(allowed.sum()) - int((expected > -torch.inf).sum())) <= (top_p > 0.999) * 20 + 1


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = Sampler(Sampling(1, temperature=1.0), [])
    counts = torch.bincount(torch.tensor([sampler.sample(logits) for _ in range(4000)]))
    torch.testing.assert_close(counts / 4000, logits.softmax(-1), atol=0.03, rtol=0)


def test_a_tiny_temperature_is_greedy_and_a_seed_may_be_any_number() -> None:
    logits = torch.tensor([1e3, 1e3 - 1e-2, -1e3])
    assert Sampler(Sampling(1, temperature=1e-38, seed=-(2**70)), []).sample(logits) == 0


@given(
    seed=st.integers(0, 10**6),
    temperatures=st.lists(st.sampled_from([1e-9, 0.3, 1.0, 2.5, 1e35]), min_size=1, max_size=5),
    size=st.sampled_from([3, 50, 6400]),
)
def test_tokens_drawn_together_are_those_of_multinomial_with_their_logprobs(
    seed: int, temperatures: list[float], size: int
) -> None:
    logits = 3 * torch.randn(len(temperatures), size, generator=torch.Generator().manual_seed(seed))
    samplings = [Sampling(1, t, seed=seed + n) for n, t in enumerate(temperatures)]
    alone = [Sampler(sampling, []) for sampling in samplings]
    together = [Sampler(sampling, []) for sampling in samplings]
    for _ in range(2):
        tokens, logprobs = draw(logits, together)
        assert tokens.tolist() == [s.sample(row) for s, row in zip(alone, logits, strict=True)]
        rows = [filtered(row, s).log_softmax(-1) for row, s in zip(logits, samplings, strict=True)]
        expected = torch.stack(rows).gather(-1, tokens[:, None]).flatten()
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


def test_each_row_has_its_sampling() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9], [0.0, 5.0, 4.9]])
    samplings = (Sampling(), Sampling(repetition_penalty=2.0))
    assert sample(logits, [Sampler(sampling, [1]) for sampling in samplings]) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_p": 1.1}, "top_p must lie"),
        ({"min_p": 1.0}, "min_p must lie"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must lie in \[0.01, 100\]"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty must lie in"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must lie in"),
        ({"temperature": math.inf}, "temperature must be at least 0, and finite"),
        ({"temperature": math.nan}, "temperature must be at least 0, and finite"),
        ({"stop": ("a", "")}, "stop text must not be empty"),
        ({"logprobs": -1}, "logprobs must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**changes)
