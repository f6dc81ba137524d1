"""Advantages and policy losses against numbers by hand and a second derivation in plain Python."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from importlib.util import find_spec
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from minigpt.model.policy_losses import (
    Advantage,
    Normalisation,
    PolicyLossKind,
    group_advantages,
    groups_with_signal,
    kl_k3,
    normalised,
    policy_loss,
)

NAN = float("nan")
ADVANTAGES, KINDS = get_args(Advantage), get_args(PolicyLossKind)
NORMALISATIONS = get_args(Normalisation)


@pytest.mark.parametrize(
    ("kind", "one_of_four", "two_of_three_scored"),
    [
        ("mean_std", [1.5, -0.5, -0.5, -0.5], [2**-0.5, -(2**-0.5), 0.0, 0.0]),
        ("mean", [0.75, -0.25, -0.25, -0.25], [1.0, -1.0, 0.0, 0.0]),
        ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3], [2.0, -2.0, 0.0, 0.0]),
    ],
)
def test_advantages_by_hand(
    kind: Any, one_of_four: list[float], two_of_three_scored: list[float]
) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, NAN, NAN]])
    first, second = group_advantages(rewards, kind).tolist()
    assert first == pytest.approx(one_of_four)
    assert second == pytest.approx(two_of_three_scored)


def test_advantages_by_a_second_derivation() -> None:
    group = [0.3, -1.2, 2.5, 0.3, 0.9]
    rewards = torch.tensor([group], dtype=torch.float64)
    mean, std = statistics.mean(group), statistics.stdev(group)
    others = [statistics.mean(group[:i] + group[i + 1 :]) for i in range(5)]
    derived = {
        "mean_std": [(r - mean) / std for r in group],
        "mean": [r - mean for r in group],
        "leave_one_out": [r - other for r, other in zip(group, others, strict=True)],
    }
    for kind, values in derived.items():
        assert group_advantages(rewards, kind)[0].tolist() == pytest.approx(values)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_groups_without_signal_have_no_advantage(kind: Any) -> None:
    rounding = 0.1 + 0.2  # is not 0.3: what only rounding tells apart must not be blown up
    groups = [[0.1] * 3, [0.0] * 3, [NAN, 5.0, NAN], [NAN] * 3, [0.3, rounding, 0.3], [1, 0, 1]]
    rewards = torch.tensor(groups, dtype=torch.float64)
    assert groups_with_signal(rewards).tolist() == [False] * 5 + [True]
    advantages = group_advantages(rewards, kind)
    assert advantages[:5].eq(0).all()
    assert advantages[5].ne(0).all()
    assert group_advantages(rewards.float(), kind)[:5].eq(0).all()


# Two answers of 3 and 2 targets. Log-ratios of the first: 0.3, -0.4, 0.1; of the second: -0.5, 0.1.
OLD = [-1.0, -2.0, -0.5, -1.5, -0.2]
LOGPS = [-0.7, -2.4, -0.4, -2.0, -0.1]
ANSWERS = [0, 0, 0, 1, 1]


def by_hand(kind: str, advantages: list[float], low: float, high: float) -> list[float]:
    """The losses in plain Python."""
    ratios = [math.exp(new - old) for new, old in zip(LOGPS, OLD, strict=True)]
    if kind == "sequence":
        ratios = [1.0] * 3 + [math.exp((-0.5 + 0.1) / 2)] * 2
    losses = []
    for ratio, logp, answer in zip(ratios, LOGPS, ANSWERS, strict=True):
        a = advantages[answer]
        bounded = max(1 - low, min(1 + high, ratio))
        losses.append(-bounded * a * logp if kind == "cispo" else -min(ratio * a, bounded * a))
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("advantages", [[2.0, -1.0], [-2.0, 1.0]])
def test_losses_by_a_second_derivation(kind: Any, advantages: list[float]) -> None:
    inputs = [torch.tensor(values, dtype=torch.float64) for values in (LOGPS, OLD, advantages)]
    losses = policy_loss(*inputs, torch.tensor(ANSWERS), kind, 0.2, 0.28).losses
    assert losses.tolist() == pytest.approx(by_hand(kind, advantages, 0.2, 0.28))


@pytest.mark.parametrize(
    ("kind", "advantage", "low", "high", "gradient"),
    [
        # ratios 0.5, 1, 2 with the bounds 0.8 and 1.28
        ("token", 1.0, [0, 0, 0], [0, 0, 1], [-0.5, -1.0, 0.0]),
        ("token", -1.0, [1, 0, 0], [0, 0, 0], [0.0, 1.0, 2.0]),
        ("cispo", 1.0, [1, 0, 0], [0, 0, 1], [-0.8, -1.0, -1.28]),
        ("cispo", -1.0, [1, 0, 0], [0, 0, 1], [0.8, 1.0, 1.28]),
        # one ratio of 1, which nothing clips, and one of 2 (below)
        ("sequence", 1.0, [0, 0, 0], [0, 0, 0], [-1.0, -1.0, -1.0]),
    ],
)
def test_what_is_clipped_has_no_gradient_or_a_bounded_one(
    kind: Any, advantage: float, low: list[int], high: list[int], gradient: list[float]
) -> None:
    logps = torch.tensor([0.5, 1.0, 2.0]).log().requires_grad_()
    arguments = (torch.tensor([advantage]), torch.zeros(3, dtype=torch.long), kind, 0.2, 0.28)
    losses, clipped_low, clipped_high = policy_loss(logps, torch.zeros(3), *arguments)
    losses.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx(gradient)
    assert (clipped_low.int().tolist(), clipped_high.int().tolist()) == (low, high)


def test_a_sequences_ratio_is_clipped_for_all_its_targets() -> None:
    logps = torch.tensor([0.0, 2 * math.log(2), -3.0], requires_grad=True)
    old = torch.tensor([0.0, 0.0, -3.0])
    answers = torch.tensor([0, 0, 1])
    losses, low, high = policy_loss(
        logps, old, torch.tensor([1.0, 1.0]), answers, "sequence", 0.2, 0.28
    )
    losses.sum().backward()
    assert logps.grad is not None
    assert losses.tolist() == pytest.approx([-1.28, -1.28, -1.0])
    assert logps.grad.tolist() == [0.0, 0.0, -1.0]
    assert (low.tolist(), high.tolist()) == ([False] * 3, [True, True, False])


@pytest.mark.parametrize(
    ("normalisation", "weights"),
    [("sequence", [1.0, 1.0]), ("token", [3.0, 2.0]), ("constant", [3 / 4, 2 / 4])],
)
def test_sequence_has_the_gradient_of_the_papers_formula(
    normalisation: Any, weights: list[float]
) -> None:
    """-s a for each answer, with s as a function of all its targets."""
    old, advantages = torch.tensor(OLD, dtype=torch.float64), torch.tensor([2.0, -1.0]).double()
    answers, included = torch.tensor(ANSWERS), torch.ones(2, dtype=torch.bool)
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    losses = policy_loss(logps, old, advantages, answers, "sequence", 0.5, 0.5).losses
    ours = torch.autograd.grad(normalised(losses, answers, included, normalisation, 4)[0], logps)
    ratios = torch.stack([part.mean() for part in (logps - old).split([3, 2])]).exp()
    paper = torch.autograd.grad((-ratios * advantages * torch.tensor(weights)).sum(), logps)
    torch.testing.assert_close(ours, paper)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_has_the_policy_gradient(kind: Any) -> None:
    logps = torch.tensor(LOGPS, requires_grad=True)
    advantages, answers = torch.tensor([2.0, -1.5]), torch.tensor(ANSWERS)
    losses, low, high = policy_loss(logps, logps.detach(), advantages, answers, kind, 0.0, 0.0)
    losses.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [-2.0, -2.0, -2.0, 1.5, 1.5]
    assert not low.any()
    assert not high.any()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_ratios_have_finite_losses_and_gradients(kind: Any) -> None:
    for advantage in (1.0, -1.0):
        logps = torch.tensor([-1e4, 0.0, -1.0], requires_grad=True)
        old = torch.tensor([0.0, -1e4, -1e4])
        weights, answers = torch.full((3,), advantage), torch.arange(3)
        losses = policy_loss(logps, old, weights, answers, kind, 0.2, 0.28).losses
        (losses + kl_k3(logps, old) + kl_k3(logps, torch.zeros(3))).sum().backward()
        assert losses.isfinite().all()
        assert logps.grad is not None
        assert logps.grad.isfinite().all()


def test_k3_by_hand() -> None:
    logps = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    values = kl_k3(logps, torch.tensor([-1.0, 0.0, -2.0], dtype=torch.float64))
    assert values.tolist() == pytest.approx([0.0, math.e - 2, math.exp(-1)])
    values.sum().backward()
    assert logps.grad is not None  # 1 - e^r: up where the reference is higher, down where lower
    assert logps.grad.tolist() == pytest.approx([0.0, 1 - math.e, 1 - math.exp(-1)])


def test_the_mean_of_k3_is_the_kl() -> None:
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64)
    values = kl_k3(policy.log(), reference.log())
    assert values.min() > 0
    exact = sum(
        p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True)
    )
    assert (policy * values).sum().item() == pytest.approx(exact)


def steps_loss(kind: Any, losses: Tensor, answers: Tensor, included: Tensor) -> float:
    total, count = normalised(losses, answers, included, kind, 4)
    return (total / count).item()


@pytest.mark.parametrize(
    ("kind", "of_both", "of_the_second"),
    [
        ("sequence", ((1 + 2 + 6) / 3 + (4 + 8) / 2) / 2, (4 + 8) / 2),
        ("token", 21 / 5, 12 / 2),
        ("constant", (9 / 4 + 12 / 4) / 2, 12 / 4),
    ],
)
def test_normalisations_by_hand(kind: str, of_both: float, of_the_second: float) -> None:
    losses, answers = torch.tensor([1.0, 2.0, 6.0, 4.0, 8.0]), torch.tensor(ANSWERS)
    assert steps_loss(kind, losses, answers, torch.tensor([True, True])) == pytest.approx(of_both)
    assert steps_loss(kind, losses, answers, torch.tensor([False, True])) == of_the_second


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_micro_batches_add_up_to_the_whole_batch(kind: Any) -> None:
    """Also where one of them has no targets, and an answer has none."""
    losses = torch.arange(1.0, 10.0)
    answers = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 4])  # the fourth answer is empty
    included = torch.tensor([True, True, False, True, True])
    full = normalised(losses, answers, included, kind, 7)
    none = torch.empty(0, requires_grad=True)
    empty = normalised(none, torch.empty(0).long(), torch.empty(0).bool(), kind, 7)
    empty[0].backward()  # processes with nothing to do take part in the backward pass
    parts = [
        normalised(losses[:4], answers[:4], included[:2], kind, 7),
        empty,
        normalised(losses[4:], answers[4:] - 2, included[2:], kind, 7),
    ]
    assert (empty[0].item(), empty[1].item()) == (0.0, 0)
    assert sum(part[0].item() for part in parts) == pytest.approx(full[0].item())
    assert sum(part[1].item() for part in parts) == full[1].item()


def test_what_is_excluded_has_no_gradient() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0, 4.0, 8.0], requires_grad=True)
    for kind in NORMALISATIONS:
        included = torch.tensor([True, False])
        gradient = torch.autograd.grad(
            normalised(losses, torch.tensor(ANSWERS), included, kind)[0], losses
        )[0]
        assert gradient[3:].eq(0).all()
        assert gradient[:3].ne(0).all()


# Four answers, and the bounds of the losses: TRL's for cispo is absolute, and has none below.
LENGTHS, WEIGHTS, LONGEST = [6, 3, 1, 4], [1.0, -1.0, 0.5, -0.7], 8
OF_TRL: dict[
    tuple[str, str], Any
] = {  # name and level there: ours, normalisation, weight of the KL, bounds
    ("grpo", "token"): ("token", "sequence", 0.1, (0.2, 0.28)),
    ("dapo", "token"): ("token", "token", 0.0, (0.2, 0.28)),
    ("dr_grpo", "token"): ("token", "constant", 0.04, (0.2, 0.2)),
    ("cispo", "token"): ("cispo", "token", 0.0, (1.0, 0.28)),
    ("grpo", "sequence"): ("sequence", "sequence", 0.1, (0.2, 0.28)),
}
TRL = """
import json, sys, warnings
warnings.simplefilter("ignore")
from collections import defaultdict
from types import SimpleNamespace
import torch
from trl import GRPOTrainer

given = json.loads(sys.argv[1])
torch.set_default_dtype(torch.float64)
logps, old, reference, mask, weights = (
    torch.tensor(given[name]) for name in ("new", "old", "ref", "mask", "weights")
)
mask = mask.double()

def same(value, reduction=None): return value

def loss(kind, level, beta, low, high):
    policy = logps.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.zeros_like(mask), None),
        model=SimpleNamespace(training=True), aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta, loss_type=kind,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        epsilon_low=low, epsilon_high=high + (kind == "cispo"), use_vllm=False,
        current_gradient_accumulation_steps=1, max_completion_length=given["longest"],
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(
            device="cpu", num_processes=1, gather=same, gather_for_metrics=same, reduce=same
        ),
    )
    prompt = torch.zeros(len(mask), 1).long()
    inputs = dict(
        prompt_ids=prompt, prompt_mask=prompt + 1, completion_ids=torch.zeros_like(mask).long(),
        completion_mask=mask, advantages=weights,
        old_per_token_logps=old, ref_per_token_logps=reference, num_items_in_batch=mask.sum(),
    )
    value = GRPOTrainer._compute_loss(trainer, None, inputs)
    value.backward()
    return [value.item(), policy.grad[mask.bool()].tolist()]

print(json.dumps([loss(*arguments) for arguments in given["losses"]]))
"""


@pytest.mark.skipif(not find_spec("trl"), reason="the extra `bench` is not installed")
def test_losses_and_gradients_are_those_of_trl() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old, ref = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator) * 0.5 - 2
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    losses = [(*of_trl, beta, *clip) for of_trl, (_, _, beta, clip) in OF_TRL.items()]
    inputs = {
        name: t.tolist() for name, t in zip(("new", "old", "ref"), (new, old, ref), strict=True)
    }
    inputs |= {"mask": mask.tolist(), "weights": WEIGHTS, "longest": LONGEST, "losses": losses}
    command = [sys.executable, "-W", "ignore", "-c", TRL, json.dumps(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    answers = mask.nonzero()[:, 0]
    included, weights = torch.ones(4, dtype=torch.bool), torch.tensor(WEIGHTS, dtype=torch.float64)
    for (value, gradient), (kind, norm, beta, clip) in zip(theirs, OF_TRL.values(), strict=True):
        logps = new[mask].requires_grad_()
        terms = policy_loss(logps, old[mask], weights, answers, kind, *clip).losses
        terms = terms + beta * kl_k3(logps, ref[mask])
        total, count = normalised(terms, answers, included, norm, LONGEST)
        loss = total / count
        assert loss.item() == pytest.approx(value, rel=1e-9)
        assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx(gradient, rel=1e-9)
