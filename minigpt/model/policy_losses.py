"""Advantages and losses of policy gradients over groups of answers, as pure functions of tensors.

They import only torch and `sum_by`. All log-probs are in nats, of the distribution that was sampled
from.

Shape legend: N targets (tokens of answers), A answers, P prompts, G answers of each prompt.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minigpt.model.losses import sum_by

Advantage = Literal["mean_std", "mean", "leave_one_out"]
PolicyLossKind = Literal["token", "sequence", "cispo"]
Normalisation = Literal["sequence", "token", "constant"]

SMALLEST_SPREAD = 1e-6  # of a group's rewards relative to the largest: less is rounding
LARGEST_LOG_RATIO = 20.0  # e^20 = 4.9e8: beyond, a ratio stays the same and has no gradient


def groups_with_signal(rewards: Tensor) -> Tensor:
    """Return which groups have at least two different rewards, so that their advantages are not 0.

    Differences below a millionth of the group's largest reward are rounding, not signal.

    Args:
        rewards: [P, G] finite, or NaN for answers that cannot be scored.

    Returns:
        [P] bool.
    """
    scored = ~rewards.isnan()
    highest = rewards.masked_fill(~scored, -torch.inf).amax(1)
    lowest = rewards.masked_fill(~scored, torch.inf).amin(1)
    largest = rewards.abs().nan_to_num(0.0).amax(1)
    return highest - lowest > SMALLEST_SPREAD * largest


def group_advantages(rewards: Tensor, kind: Advantage) -> Tensor:
    """How much better each answer is than the others to its prompt.

    With r the n rewards of a group that are not NaN:

    mean_std: (r_i - mean(r)) / std(r), std over n - 1 (GRPO, Shao et al. 2024, arXiv:2402.03300,
    section 4.1.2; n - 1 as in TRL).
    mean: r_i - mean(r), so that easy and hard prompts do not weigh more than others (Dr. GRPO, Liu
    et al. 2025, arXiv:2503.20783, section 3.2).
    leave_one_out: r_i - mean of the other n - 1 rewards, which is n/(n-1) times `mean` (RLOO,
    Ahmadian et al. 2024, arXiv:2402.14740).

    Answers that cannot be scored are no part of these statistics and have advantage 0, as have all
    answers of a group without signal (see `groups_with_signal`).

    Args:
        rewards: [P, G] finite, or NaN for answers that cannot be scored.
        kind: which of them.

    Returns:
        Advantages, [P, G]: of `mean_std` without unit, of the others in units of the reward.
    """
    signal = groups_with_signal(rewards)[:, None]
    scored = ~rewards.isnan()
    n = scored.sum(1, keepdim=True)
    mean = rewards.nan_to_num(0.0).sum(1, keepdim=True) / n.clamp(min=1)
    differences = torch.where(scored & signal, rewards - mean, 0.0)
    others = (n - 1).clamp(min=1)
    if kind == "mean_std":
        variance = differences.square().sum(1, keepdim=True) / others
        return differences / torch.where(signal, variance.sqrt(), 1.0)
    return differences * n / others if kind == "leave_one_out" else differences


class PolicyLoss(NamedTuple):
    """Terms of a policy's loss.

    Attributes:
        losses: [N] of each target.
        clipped_low: [N] bool, where the ratio's lower bound changed the gradient.
        clipped_high: [N] bool, where the upper one did.
    """

    losses: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def policy_loss(
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    answers: Tensor,
    kind: PolicyLossKind,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """The policy gradient's loss of each target, with bounds on how far the policy may move.

    With a target's ratio ρ = exp(log π - log π_old), the advantage a of its answer, and
    clip(x) = min(max(x, 1 - clip_low), 1 + clip_high):

    token: -min(ρa, clip(ρ)a) (PPO, Schulman et al. 2017, arXiv:1707.06347, eq. 7; two bounds: DAPO,
    Yu et al. 2025, arXiv:2503.14476, section 3.1). The gradient is 0 above the upper bound for
    a > 0 and below the lower one for a < 0.
    sequence: the same with s = exp(mean of log π - log π_old over the answer's targets) for ρ, one
    ratio an answer (GSPO, Zheng et al. 2025, arXiv:2507.18071). As in its eq. 14 a target's term is
    s times π / π without gradient below, so that its gradient is that target's own; summed over an
    answer they are that of eq. 5 times its number of targets. Bounds are far smaller there: the
    paper takes 3e-4 and 4e-4.
    cispo: -clip(ρ) a log π, where clip(ρ) has no gradient: all targets keep theirs, with bounded
    weights (MiniMax 2025, arXiv:2506.13585, eq. 4). A `clip_low` of 1 bounds only above, as there.

    Where π = π_old the gradient of each is that of -a log π. Log-ratios above 20 count as that and
    have no gradient, so that losses and gradients are finite.

    Args:
        logps: [N] log-probs of the targets.
        old: [N] the same when they were sampled; without gradient.
        advantages: [A] of each answer.
        answers: [N] the answer of each target.
        kind: which of them.
        clip_low: how far below 1 the ratio counts.
        clip_high: how far above 1 it does.
    """
    log_ratios = logps - old
    if kind == "sequence":
        lengths = sum_by(torch.ones_like(logps), answers, len(advantages))
        means = sum_by(log_ratios.detach(), answers, len(advantages)) / lengths.clamp(min=1)
        log_ratios = means[answers] + (logps - logps.detach())
    ratios = log_ratios.clamp(max=LARGEST_LOG_RATIO).exp()
    bounded = ratios.clamp(1 - clip_low, 1 + clip_high)
    weights = advantages[answers]
    low, high = ratios < 1 - clip_low, ratios > 1 + clip_high
    if kind == "cispo":
        return PolicyLoss(-bounded.detach() * weights * logps, low, high)
    losses = -torch.minimum(ratios * weights, bounded * weights)
    return PolicyLoss(losses, low & (weights < 0), high & (weights > 0))


def kl_k3(logps: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(π || π_ref) from targets that were sampled from π.

    exp(r) - r - 1 with r = log π_ref - log π: never negative, and its mean over samples of π is the
    KL (k3 of Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html; GRPO,
    arXiv:2402.03300, eq. 4). An r above 20 counts as that and has no gradient.

    Args:
        logps: [N] log-probs of the targets under the policy.
        reference: [N] the same under the frozen reference.

    Returns:
        [N], in nats.
    """
    r = (reference - logps).clamp(max=LARGEST_LOG_RATIO)
    return r.expm1() - r


def normalised(
    losses: Tensor,
    answers: Tensor,
    included: Tensor,
    kind: Normalisation,
    constant: int = 1,
) -> tuple[Tensor, Tensor]:
    """Sum the targets' losses of a micro-batch, and count what they are divided by.

    The loss of a step is the sum over all micro-batches and processes of the first, divided by that
    of the second, so it does not depend on how the answers lie in micro-batches:

    sequence: the mean over answers of the mean over each one's targets (GRPO, arXiv:2402.03300,
    eq. 3; GSPO). Targets of short answers weigh more.
    token: the mean over all targets of the step (DAPO, arXiv:2503.14476, section 3.3).
    constant: the mean over answers of their sums divided by a constant, such as the longest length
    (Dr. GRPO, arXiv:2503.20783, section 3.2): what a target weighs depends on no length.

    Args:
        losses: [N] of each target.
        answers: [N] the answer of each target.
        included: [A] bool; the others, such as answers that cannot be scored, are in neither sum.
        kind: which of them.
        constant: of that kind, in targets.

    Returns:
        The sum, a scalar, and the number of answers (of `token`: of targets), an integer scalar.
    """
    counts = included[answers]
    losses = torch.where(counts, losses, 0.0)
    if kind == "token":
        return losses.sum(), counts.sum()
    if kind == "constant":
        return losses.sum() / constant, included.sum()
    lengths = sum_by(torch.ones_like(losses), answers, len(included))
    return (losses / lengths[answers]).sum(), included.sum()
