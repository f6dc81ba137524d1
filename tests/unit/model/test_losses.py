"""Losses against tables of numbers, closed forms, finite differences, and TRL."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.model.losses import (
    Preferences,
    bradley_terry,
    chosen_nll,
    cpo,
    dpo,
    kto,
    orpo,
    simpo,
    sum_by,
)

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


@pytest.mark.parametrize(
    ("loss", "smoothing", "value"),
    [
        ("exo", 1e-3, 2.761231),
        ("nca", 0.0, 1.386294),
        ("apo_zero", 0.0, 1.0),
        ("apo_down", 0.0, 1.0),
        ("sppo_hard", 0.0, 50.0),
    ],
)
def test_losses_where_policy_and_reference_agree(loss: Any, smoothing: float, value: float) -> None:
    policy = torch.tensor([-3.0, -4.0, -50.0, -1.0])
    pairs = dpo(policy, policy.clone(), LENGTHS.repeat(2), BETA, loss, smoothing)
    assert pairs.losses.tolist() == pytest.approx([value, value], abs=1e-6)
    assert pairs.chosen_rewards.tolist() == pairs.rejected_rewards.tolist() == [0.0, 0.0]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# One pair, in numbers: log-probs of policy and reference, chosen before rejected, and tokens.
POLICY, REFERENCE, TOKENS = (-7.0, -12.0), (-10.0, -11.0), (4, 8)
H, B = (3.0, -1.0), 0.3  # log-ratios, and a beta
EXO = sigma(1.2), sigma(-1.2)
ODDS = [1 / (math.exp(-logp / n) - 1) for n, logp in zip(TOKENS, POLICY, strict=True)]
BY_HAND: dict[str, float] = {
    "exo": EXO[0] * math.log(EXO[0] / 0.9) + EXO[1] * math.log(EXO[1] / 0.1),
    "nca": -math.log(sigma(0.9)) - math.log(sigma(-0.9)) / 2 - math.log(sigma(0.3)) / 2,
    "apo_zero": sigma(-0.9) + sigma(-0.3),
    "apo_down": sigma(0.9) + sigma(-1.2),
    "sppo_hard": (3 - 1 / 0.6) ** 2 + (-1 + 1 / 0.6) ** 2,
    # The probability that Bradley and Terry give the pair, from its scores.
    "simpo": math.log1p(math.exp(-(B * (-7 / 4 + 12 / 8) - 0.7))),
    "orpo": B * math.log(1 + ODDS[1] / ODDS[0]),
    "cpo": math.log((math.exp(-7 * B) + math.exp(-12 * B)) / math.exp(-7 * B)),
}
REWARDS = {
    "simpo": (B * -7 / 4, B * -12 / 8),
    "orpo": (B * -7 / 4, B * -12 / 8),
    "cpo": (B * -7, B * -12),
}
Loss = Callable[[Tensor], Preferences]
LOSSES: dict[str, Loss] = {
    **{
        name: lambda policy, name=name: dpo(
            policy,
            policy.new_tensor(REFERENCE),
            torch.tensor(TOKENS),
            B,
            name,
            0.1 if name in ("exo", "cdpo", "robust") else 0.0,
        )
        for name in (*(row[0] for row in TABLE), "exo", "nca", "apo_zero", "apo_down", "sppo_hard")
    },
    "simpo": partial(simpo, lengths=torch.tensor(TOKENS), beta=B, gamma=0.7),
    "orpo": partial(orpo, lengths=torch.tensor(TOKENS), beta=B),
    "cpo": partial(cpo, beta=B),
}


@pytest.mark.parametrize("loss", BY_HAND)
def test_losses_by_hand(loss: str) -> None:
    pairs = LOSSES[loss](torch.tensor(POLICY, dtype=torch.float64))
    assert pairs.losses.tolist() == pytest.approx([BY_HAND[loss]], rel=1e-12)
    rewards = REWARDS.get(loss, (B * H[0], B * H[1]))
    assert (pairs.chosen_rewards.item(), pairs.rejected_rewards.item()) == pytest.approx(rewards)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_finite_differences(loss: str) -> None:
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: LOSSES[loss](p).losses, (policy,))
    pairs = LOSSES[loss](policy)
    assert not pairs.chosen_rewards.requires_grad
    assert not pairs.rejected_rewards.requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_finite_far_away(loss: str) -> None:
    """Also where an answer is certain, or nothing of it is left to learn."""
    for values in ((-1e5, 0.0), (0.0, -1e5), (0.0, 0.0)):
        policy = torch.tensor(values, requires_grad=True)
        losses = LOSSES[loss](policy).losses
        losses.sum().backward()
        assert losses.isfinite().all(), values
        assert policy.grad is not None
        assert policy.grad.isfinite().all(), values


def test_the_margin_of_simpo_moves_its_loss() -> None:
    policy, lengths = torch.tensor([-4.0, -4.0]), torch.tensor([2, 2])
    losses = [simpo(policy, lengths, 2.0, gamma).losses.item() for gamma in (0.0, 1.0)]
    assert losses == pytest.approx([math.log(2), math.log1p(math.e)])


def test_the_sft_term_is_of_the_chosen_answers_by_their_lengths() -> None:
    policy = torch.tensor([-6.0, -5.0, -8.0, -1.0], requires_grad=True)
    term = chosen_nll(policy, torch.tensor([3, 5, 0, 2]))
    assert term.tolist() == [2.0, 8.0]
    term.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-1 / 3, 0.0, -1.0, 0.0])


TRL = """
import json, warnings
warnings.simplefilter("ignore")
from collections import defaultdict
from types import SimpleNamespace
import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

def same(value): return value

logps = torch.tensor(%(policy)s, dtype=torch.float64)
reference = torch.tensor(%(reference)s, dtype=torch.float64)
lengths = torch.tensor(%(tokens)s)
beta = %(beta)s
accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)

def dpo(*losses, weights, smoothing):
    width = int(lengths.max())
    mask = torch.zeros(2, width + 1)  # one token of a prompt
    for row, length in zip(mask, lengths):
        row[1 : length + 1] = 1
    each = mask[:, 1:] * (logps / lengths)[:, None]
    zeros = torch.zeros(2, width)
    outputs = SimpleNamespace(
        log_probs=each, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    inputs = {"input_ids": mask.long(), "attention_mask": mask, "completion_mask": mask}
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference.chunk(2)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
        loss_types=losses, loss_weights=weights, label_smoothing=smoothing, use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return float(loss)

names = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair")
names += ("apo_zero", "apo_down", "sppo_hard")
smoothed = {"robust": 0.1, "exo_pair": 0.1}
losses = {n: dpo(n, weights=[1.0], smoothing=smoothed.get(n, 0.0)) for n in names}
losses["rpo"] = dpo("sigmoid", "sft", weights=[1.0, 0.4], smoothing=0.0)
cpo = SimpleNamespace(alpha=0.0, beta=beta, label_smoothing=0.0, accelerator=accelerator)
cpo.loss_type = "sigmoid"
losses["cpo"] = float(CPOTrainer.cpo_loss(cpo, *logps.chunk(2))[0])
cpo.loss_type, cpo.simpo_gamma = "simpo", 0.7
losses["simpo"] = float(CPOTrainer.cpo_loss(cpo, *(logps / lengths).chunk(2))[0])
odds = ORPOTrainer.odds_ratio_loss(cpo, *(logps / lengths).chunk(2))[0]
losses["orpo"] = float(-odds)  # it subtracts it
print(json.dumps(losses))
"""


# Scores of the chosen and the rejected answer, margin, weight of the centring: the loss by hand,
# from -log σ of 0, 1, 2 and -1, which are 0.693147, 0.313262, 0.126928 and 1.313262.
SCORED = [
    ((0.0, 0.0), 0.0, 0.0, 0.693147),
    ((1.0, 0.0), 0.0, 0.0, 0.313262),
    ((1.0, 0.0), 1.0, 0.0, 0.693147),
    ((0.0, 1.0), 0.0, 0.0, 1.313262),
    ((3.0, 1.0), 0.0, 0.01, 0.126928 + 0.01 * 16),
    ((1.0, -1.0), 1.0, 0.5, 0.313262),
]


def test_bradley_terry_by_hand() -> None:
    for (chosen, rejected), margin, centering, value in SCORED:
        loss = bradley_terry(torch.tensor([chosen, rejected]), torch.tensor([margin]), centering)
        assert loss.tolist() == pytest.approx([value], abs=2e-6)
    pairs, margins, _, values = zip(*SCORED[:4], strict=True)
    scores = torch.tensor(pairs, requires_grad=True)
    losses = bradley_terry(scores.flatten(), torch.tensor(margins))
    assert losses.tolist() == pytest.approx(values, abs=2e-6)
    losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([-0.5, 0.5])
    assert scores.grad[1].tolist() == pytest.approx([-0.268941, 0.268941], abs=1e-6)


@pytest.mark.skipif(not find_spec("trl"), reason="the extra `bench` is not installed")
def test_losses_are_those_of_trl() -> None:
    numbers = {"policy": POLICY, "reference": REFERENCE, "tokens": TOKENS, "beta": B}
    command = [sys.executable, "-W", "ignore", "-c", TRL % numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    policy = torch.tensor(POLICY, dtype=torch.float64)
    ours = {name: loss(policy).losses.item() for name, loss in LOSSES.items() if name != "cdpo"}
    ours["rpo"] = ours["sigmoid"] + 0.4 * chosen_nll(policy, torch.tensor(TOKENS)).item()
    names = {name.removesuffix("_pair"): value for name, value in theirs.items()}
    assert ours.keys() == names.keys()
    assert ours == pytest.approx(names, rel=1e-6)


# log π - log π_ref, desirable, z, and the loss with β = 0.1, λ_D = 2, λ_U = 3: σ(1) = 0.731059,
# σ(2) = 0.880797, σ(0) = 0.5.
KTO = [
    (0.0, True, 0.0, 2 * 0.5),
    (0.0, False, 0.0, 3 * 0.5),
    (10.0, True, 0.0, 2 * (1 - 0.731059)),
    (10.0, False, 0.0, 3 * 0.731059),
    (10.0, True, 20.0, 2 * 0.731059),
    (10.0, False, 30.0, 3 * (1 - 0.880797)),
    (-20.0, True, 0.0, 2 * 0.880797),
]


def test_kto_table() -> None:
    ratios, desirable, baselines, expected = zip(*KTO, strict=True)
    losses = [
        kto(torch.tensor([r]), torch.tensor([d]), torch.tensor(z), BETA, 2.0, 3.0).item()
        for r, d, z in zip(ratios, desirable, baselines, strict=True)
    ]
    assert losses == pytest.approx(expected, abs=1e-5)
    together = kto(torch.tensor(ratios), torch.tensor(desirable), torch.tensor(0.0), BETA)
    assert together[:4].tolist() == pytest.approx([0.5, 0.5, 1 - 0.731059, 0.731059], abs=1e-5)


def test_kto_pulls_each_kind_its_way_and_least_where_it_is_far() -> None:
    """The gradient is ∓λ β σ'(x): λβ/4 at the baseline."""
    ratios = torch.tensor([0.0, 0.0, 100.0, -100.0], requires_grad=True)
    desirable = torch.tensor([True, False, True, False])
    kto(ratios, desirable, torch.tensor(0.0), BETA, 2.0, 3.0).sum().backward()
    assert ratios.grad is not None
    slopes = [-2 * BETA / 4, 3 * BETA / 4, -2 * BETA * 4.54e-5, 3 * BETA * 4.54e-5]
    assert ratios.grad.tolist() == pytest.approx(slopes, rel=1e-3)
