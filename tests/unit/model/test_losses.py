"""Losses against tables of numbers and against plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.model import losses
from minigpt.model.losses import dpo, linear_cross_entropy, linear_logprobs, softmax_, sum_by

BETA = 0.1
TABLE = [  # loss, smoothing, values at beta * d = 0, 1 and 2
    ("sigmoid", 0.0, (0.693147, 0.313262, 0.126928)),
    ("cdpo", 0.1, (0.693147, 0.413262, 0.326928)),
    ("robust", 0.1, (0.693147, 0.188262, -0.123072)),
    ("hinge", 0.0, (1.0, 0.0, 0.0)),
    ("ipo", 0.0, (25.0, 20.25, 16.0)),
    ("sigmoid_norm", 0.0, (0.693147, 0.668460, 0.644397)),
]
LENGTHS = torch.tensor([20, 20])  # for the losses by means: they see a 20th of d
TABLE_ROWS = [(loss, eps, float(m), v) for loss, eps, row in TABLE for m, v in enumerate(row)]


@pytest.mark.parametrize(("loss", "smoothing", "margin", "value"), TABLE_ROWS)
def test_dpo_table(loss: str, smoothing: float, margin: float, value: float) -> None:
    reference = torch.tensor([-30.0, -20.0])
    d = margin / BETA
    policy = reference + torch.tensor([0.75 * d, -0.25 * d])
    pairs = dpo(policy, reference, LENGTHS, BETA, loss, smoothing)
    assert pairs.losses.item() == pytest.approx(value, abs=1e-5)
    assert pairs.chosen_rewards.item() == pytest.approx(0.75 * margin, abs=1e-5)
    assert pairs.rejected_rewards.item() == pytest.approx(-0.25 * margin, abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "value"),
    [("ipo", (4 / 8 + 6 / 2 - 5) ** 2), ("sigmoid_norm", math.log1p(math.exp(-0.35)))],
)
def test_each_answer_is_divided_by_its_own_length(loss: str, value: float) -> None:
    policy = torch.tensor([4.0, -6.0])
    pairs = dpo(policy, torch.zeros(2), torch.tensor([8, 2]), BETA, loss)
    assert pairs.losses.item() == pytest.approx(value, abs=1e-5)
    assert pairs.chosen_rewards.item() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("loss", "smoothing", "slope"),
    [
        ("sigmoid", 0.0, BETA / 2),
        ("cdpo", 0.1, BETA / 2 * 0.8),
        ("robust", 0.1, BETA / 2 / 0.8),
        ("hinge", 0.0, BETA),
        ("ipo", 0.0, 1 / BETA / 20),
        ("sigmoid_norm", 0.0, BETA / 2 / 20),
    ],
)
def test_dpo_at_step_zero(loss: str, smoothing: float, slope: float) -> None:
    policy = torch.tensor([-3.0, -4.0, -50.0, -1.0], requires_grad=True)
    reference = policy.detach().clone()
    pairs = dpo(policy, reference, LENGTHS.repeat(2), BETA, loss, smoothing)
    assert pairs.chosen_rewards.tolist() == pairs.rejected_rewards.tolist() == [0.0, 0.0]
    pairs.losses.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-slope, slope] * 2)


def test_dpo_is_finite_far_away() -> None:
    policy = torch.tensor([-1e5, 0.0, 0.0, -1e5], requires_grad=True)
    pairs = dpo(policy, torch.zeros(4), LENGTHS.repeat(2), 1.0)
    pairs.losses.sum().backward()
    assert pairs.losses.tolist() == [1e5, 0.0]
    assert policy.grad is not None
    assert policy.grad.tolist() == [-1.0, 1.0, 0.0, 0.0]


Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor]


def arguments(n: int, h: int, v: int, bias: bool, dtype: torch.dtype = torch.float32) -> Arguments:
    generator = torch.Generator().manual_seed(n * 1009 + h * 31 + v)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    labels = torch.randint(v, (n,), generator=generator)
    return leaf(n, h), leaf(v, h), leaf(v) if bias else None, labels


def gradients(function: Callable[..., Tensor], args: Arguments) -> list[Tensor]:
    """The value and the gradients of hidden, weight and bias; each label weighs differently."""
    value = function(*args)
    weights = torch.linspace(-1, 2, len(args[3]), dtype=value.dtype) if value.ndim else 1.0
    total = (value * weights).sum()
    leaves = [x for x in args[:3] if x is not None]
    return [value.detach(), *torch.autograd.grad(total, leaves)]


def plain_sum(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    return cross_entropy(linear(h, w, b), y, reduction="sum")


def plain_logprobs(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    return linear(h, w, b).log_softmax(-1).gather(1, y[:, None]).squeeze(1)


PAIRS = pytest.mark.parametrize(
    ("ours", "plain"),
    [(linear_cross_entropy, plain_sum), (linear_logprobs, plain_logprobs)],
    ids=["cross_entropy", "logprobs"],
)


@PAIRS
@given(n=st.integers(1, 40), h=st.integers(1, 24), v=st.integers(2, 300), bias=st.booleans())
@settings(max_examples=40)
def test_linear_losses_equal_torch(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], n: int, h: int, v: int, bias: bool
) -> None:
    args = arguments(n, h, v, bias)
    exact = tuple(x.detach().double().requires_grad_() if x is not None else None for x in args[:3])
    got = gradients(ours, args)
    for mine, torchs, truth in zip(
        got, gradients(plain, args), gradients(plain, (*exact, args[3])), strict=True
    ):
        assert torch.allclose(mine, torchs, rtol=1e-4, atol=1e-4)
        assert torch.allclose(mine.double(), truth, rtol=1e-4, atol=1e-4)


def test_cross_entropy_without_gradients_is_the_same() -> None:
    args = arguments(207, 8, 30, True)
    with torch.no_grad():
        value = linear_cross_entropy(*args)
    assert not value.requires_grad
    assert value.item() == pytest.approx(linear_cross_entropy(*args).item(), rel=1e-6)


def test_probabilities_are_kept_only_where_there_is_a_way_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[int] = []
    save = torch.autograd.function.FunctionCtx.save_for_backward
    monkeypatch.setattr(
        torch.autograd.function.FunctionCtx,
        "save_for_backward",
        lambda ctx, *tensors: (kept.append(len(tensors)), save(ctx, *tensors)),
    )
    args = arguments(207, 8, 30, True)
    linear_logprobs(*args)
    with torch.no_grad():
        linear_logprobs(*args)
    assert kept == [6, 5]


@pytest.mark.parametrize("kept", [3, 2], ids=["kept", "computed again"])  # of 207 * 30
@PAIRS
def test_linear_losses_over_several_chunks(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "LOGITS", 30 * 100)
    monkeypatch.setattr(losses, "ROWS", 23)
    monkeypatch.setattr(losses, "KEPT", kept)
    args = arguments(207, 8, 30, True)
    assert [len(own) for _, own in losses._chunks(args[0], args[1], args[3])] == [69, 69, 69]
    for mine, truth in zip(gradients(ours, args), gradients(plain, args), strict=True):
        assert torch.allclose(mine, truth, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("n", "sizes"), [(0, []), (63, [63]), (500, [256, 244]), (1000, [384, 384, 232])]
)
def test_chunks_are_multiples_of_what_products_like(
    n: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGITS", 400)
    hidden, weight, _, labels = arguments(n, 2, 1, False)
    assert [len(own) for _, own in losses._chunks(hidden, weight, labels)] == sizes


class Largest(TorchDispatchMode):
    """Notes the size of the largest fp32 tensor that is computed."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.dtype == torch.float32:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_a_softmax_that_is_not_compiled_widens_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(50, 30).bfloat16()
    whole = logits.clone()
    expected = softmax_(whole)
    monkeypatch.setattr(losses, "WIDE", 7 * 30 + 1)
    with Largest() as largest:
        got = softmax_(logits)
    assert largest.numbers == 7 * 30
    assert torch.equal(got, expected)
    assert torch.equal(logits, whole)


@pytest.mark.parametrize("ours", [linear_cross_entropy, linear_logprobs])
def test_linear_losses_without_targets(ours: Callable[..., Tensor]) -> None:
    args = arguments(0, 8, 30, True)
    value, hidden, weight, bias = gradients(ours, args)
    assert value.sum() == 0
    assert hidden.shape == (0, 8)
    assert not weight.any()
    assert not bias.any()


@PAIRS
def test_linear_losses_under_autocast(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    """bf16 keeps 8 bits, so single products are off by up to 2^-8; the norms stay within 2%."""
    args = arguments(200, 32, 300, True)
    with torch.autocast("cpu", torch.bfloat16):
        mine = gradients(ours, args)
    assert mine[0].dtype == torch.float32
    for got, truth in zip(mine, gradients(plain, args), strict=True):
        assert got.dtype == truth.dtype
        assert (got - truth).norm() <= 0.02 * truth.norm()


@pytest.mark.parametrize("ours", [linear_cross_entropy, linear_logprobs])
def test_a_frozen_head_gets_no_gradient(ours: Callable[..., Tensor]) -> None:
    hidden, weight, bias, labels = arguments(5, 4, 9, True)
    assert bias is not None
    ours(hidden, weight.detach(), bias.detach(), labels).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is bias.grad is None


def test_sum_by() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = sum_by(values, torch.tensor([2, 0, 2, 0]), 4)
    assert sums.tolist() == [10.0, 0.0, 5.0, 0.0]
    (sums * torch.tensor([1.0, 1.0, 3.0, 1.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3.0, 1.0, 3.0, 1.0]
