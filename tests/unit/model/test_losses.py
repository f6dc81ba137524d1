"""Losses against tables of numbers."""

from __future__ import annotations

import math

import pytest
import torch

from minigpt.model.losses import dpo, sum_by

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


def test_sum_by() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = sum_by(values, torch.tensor([2, 0, 2, 0]), 4)
    assert sums.tolist() == [10.0, 0.0, 5.0, 0.0]
    (sums * torch.tensor([1.0, 1.0, 3.0, 1.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3.0, 1.0, 3.0, 1.0]
