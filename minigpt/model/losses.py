"""Losses as pure functions of tensors. They import only torch.

Shape legend: N targets, P preference pairs, C completions.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

# Against a frozen reference: see `dpo`.
ReferenceLoss = Literal[
    "sigmoid",
    "cdpo",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo",
    "nca",
    "apo_zero",
    "apo_down",
    "sppo_hard",
]
# Of the model alone: see the functions of these names.
ReferenceFreeLoss = Literal["simpo", "orpo", "cpo"]
PreferenceLoss = Literal[ReferenceLoss, ReferenceFreeLoss]
LARGEST_MEAN = -1e-6  # of an answer's log-probs in `orpo`: at 0 its odds would be infinite


def sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum `values` [N] into `size` bins by `index` [N]."""
    return values.new_zeros(size).index_add_(0, index, values)


class Preferences(NamedTuple):
    """Losses and rewards of preference pairs, each [P]."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo(
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor,
    beta: float,
    loss: ReferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
) -> Preferences:
    """Direct preference optimisation, and losses of its kind.

    With h = log π - log π_ref of the chosen (c) and the rejected (r) answer, of n_c and n_r
    tokens, and d = h_c - h_r:

    sigmoid: -log σ(βd) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).
    cdpo: -(1-ε) log σ(βd) - ε log σ(-βd), for labels that are wrong with probability ε
    (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    robust: [-(1-ε) log σ(βd) + ε log σ(-βd)] / (1-2ε), whose mean over such wrong labels is the
    loss on right ones (Chowdhury et al. 2024, arXiv:2403.00409); it can be negative.
    hinge: max(0, 1 - βd) (SLiC, Zhao et al. 2023, arXiv:2305.10425).
    ipo: (h_c/n_c - h_r/n_r - 1/(2β))² (Azar et al. 2023, arXiv:2310.12036, eq. 17, on means over
    tokens).
    sigmoid_norm: -log σ(β(h_c/n_c - h_r/n_r)), so that long answers weigh no more than short ones.
    exo: KL of (σ(βd), σ(-βd)) from (1-ε, ε): σ(βd)[log σ(βd) - log(1-ε)] +
    σ(-βd)[log σ(-βd) - log ε], with ε > 0 (Ji et al. 2024, arXiv:2402.00856, eq. 16).
    nca: -log σ(βh_c) - ½ log σ(-βh_c) - ½ log σ(-βh_r), which also holds the chosen answer's own
    likelihood (Chen et al. 2024, arXiv:2402.05369).
    apo_zero: 1 - σ(βh_c) + σ(βh_r), chosen up and rejected down (D'Oosterlinck et al. 2024,
    arXiv:2408.06266, eq. 7).
    apo_down: σ(βh_c) + 1 - σ(βd), both down, the rejected further (there, eq. 8).
    sppo_hard: (h_c - 1/(2β))² + (h_r + 1/(2β))², for a chosen answer that always wins (Wu et al.
    2024, arXiv:2405.00675, eq. 4.7 with P of 1 and 0).

    Args:
        policy: [2P] summed log-probs of answers, chosen and rejected alternating.
        reference: [2P] the same under the frozen reference.
        lengths: [2P] target tokens of each answer.
        beta: strength of the pull towards the reference.
        loss: which of them.
        label_smoothing: ε of cdpo, robust and exo; must be 0 for the others.

    Returns:
        Losses and rewards β(log π - log π_ref), each [P]; rewards carry no gradient.
    """
    ratios = policy - reference
    rewards = (beta * ratios).detach()
    if loss in ("ipo", "sigmoid_norm"):
        ratios = ratios / lengths.clamp(min=1)
    chosen, rejected = ratios[0::2], ratios[1::2]
    if loss in ("nca", "apo_zero", "apo_down", "sppo_hard"):
        losses = _of_each_answer(chosen, rejected, beta, loss)
    else:
        losses = _of_difference(chosen - rejected, beta, loss, label_smoothing)
    return Preferences(losses, rewards[0::2], rewards[1::2])


def _of_difference(
    difference: Tensor, beta: float, loss: ReferenceLoss, label_smoothing: float
) -> Tensor:
    margin = beta * difference
    if loss == "ipo":
        return (difference - 1 / (2 * beta)).square()
    if loss == "hinge":
        return (1 - margin).relu()
    if loss == "exo":
        preferred = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-label_smoothing))
        return preferred + (-margin).sigmoid() * (logsigmoid(-margin) - math.log(label_smoothing))
    losses = -(1 - label_smoothing) * logsigmoid(margin)
    opposite = label_smoothing * logsigmoid(-margin)
    if loss == "robust":
        return (losses + opposite) / (1 - 2 * label_smoothing)
    return losses - opposite


def _of_each_answer(chosen: Tensor, rejected: Tensor, beta: float, loss: ReferenceLoss) -> Tensor:
    up, down = beta * chosen, beta * rejected
    if loss == "nca":
        return -logsigmoid(up) - 0.5 * logsigmoid(-up) - 0.5 * logsigmoid(-down)
    if loss == "apo_zero":
        return 1 - up.sigmoid() + down.sigmoid()
    if loss == "apo_down":
        return up.sigmoid() + 1 - (up - down).sigmoid()
    target = 1 / (2 * beta)
    return (chosen - target).square() + (rejected + target).square()


def simpo(policy: Tensor, lengths: Tensor, beta: float, gamma: float) -> Preferences:
    """Simple preference optimisation, without a reference.

    -log σ(β m_c - β m_r - γ), where m is an answer's mean log-prob per token (Meng et al. 2024,
    arXiv:2405.14734, eq. 6).

    Args:
        policy, lengths: as of `dpo`.
        beta: scale of the difference; the paper takes 2 to 2.5.
        gamma: how far the chosen answer is to be ahead; the paper takes about β/2.

    Returns:
        Losses and rewards βm, each [P]; rewards carry no gradient.
    """
    scores = beta * _means(policy, lengths)
    losses = -logsigmoid(scores[0::2] - scores[1::2] - gamma)
    return Preferences(losses, scores[0::2].detach(), scores[1::2].detach())


def orpo(policy: Tensor, lengths: Tensor, beta: float) -> Preferences:
    """Odds ratio preference optimisation, without a reference: the term beside `chosen_nll`.

    -β log σ(log odds_c - log odds_r), where an answer of mean log-prob m per token has the odds
    e^m / (1 - e^m) (Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7; β is its λ). The whole loss
    is this plus `chosen_nll`. Means above -1e-6, whose odds are infinite in fp32, count as that
    and have no gradient.

    Args:
        policy, lengths: as of `dpo`.
        beta: weight of the term.

    Returns:
        Losses and rewards βm, each [P]; rewards carry no gradient.
    """
    means = _means(policy, lengths)
    rewards = (beta * means).detach()
    means = means.clamp(max=LARGEST_MEAN)
    log_odds = means - (-means.expm1()).log()
    losses = -beta * logsigmoid(log_odds[0::2] - log_odds[1::2])
    return Preferences(losses, rewards[0::2], rewards[1::2])


def cpo(policy: Tensor, beta: float) -> Preferences:
    """Contrastive preference optimisation, without a reference: the term beside `chosen_nll`.

    -log σ(β(log π_c - log π_r)), which is DPO with a reference that is uniform (Xu et al. 2024,
    arXiv:2401.08417, eq. 3). The whole loss is this plus `chosen_nll`.

    Args:
        policy: as of `dpo`.
        beta: scale of the difference.

    Returns:
        Losses and rewards β log π, each [P]; rewards carry no gradient.
    """
    scores = beta * policy
    losses = -logsigmoid(scores[0::2] - scores[1::2])
    return Preferences(losses, scores[0::2].detach(), scores[1::2].detach())


def chosen_nll(policy: Tensor, lengths: Tensor) -> Tensor:
    """Negative log-prob of the chosen answers per token, the SFT term of preference losses.

    -log π_c / n_c (Pang et al. 2024, "Iterative reasoning preference optimization",
    arXiv:2404.19733, eq. 1). TRL's `rpo_alpha` and its loss `sft` take the mean over all tokens of
    a micro-batch, so that what a pair weighs depends on its neighbours; with one pair, or answers
    of one length, they are the same.

    Args:
        policy, lengths: as of `dpo`.

    Returns:
        The term of each pair, [P].
    """
    return -_means(policy, lengths)[0::2]


def bradley_terry(scores: Tensor, margins: Tensor, centering: float = 0.0) -> Tensor:
    """Loss of a reward model on pairs, by Bradley and Terry's model of preferences.

    -log σ(r_c - r_r - m) + λ (r_c + r_r)²

    The first term is that of Ouyang et al. 2022 (arXiv:2203.02155, eq. 1), with the margin m of
    Touvron et al. 2023 (Llama 2, arXiv:2307.09288, eq. 2). The second, of Eisenstein et al. 2023
    (arXiv:2312.09244, eq. 2), keeps scores around 0, which differences leave open; λ is TRL's
    `center_rewards_coefficient`.

    Args:
        scores: [2P] of answers, chosen and rejected alternating.
        margins: [P] by how much the chosen one is to be ahead.
        centering: λ.

    Returns:
        The loss of each pair, [P].
    """
    chosen, rejected = scores[0::2], scores[1::2]
    return -logsigmoid(chosen - rejected - margins) + centering * (chosen + rejected).square()


def kto(
    ratios: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation, on single completions that are desirable or not.

    With h = log π - log π_ref of a completion and z the baseline: λ_D (1 - σ(β(h - z))) for a
    desirable one, λ_U (1 - σ(β(z - h))) for an undesirable one (Ethayarajh et al. 2024,
    arXiv:2402.01306, eqs. 7 and 8, without the constant λ_y in front). z estimates KL(π, π_ref):
    max(0, mean of h over completions that were given to other prompts).

    Args:
        ratios: [C] h.
        desirable: [C] bool.
        baseline: scalar z, which carries no gradient.
        beta: how fast a completion saturates around the baseline.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Returns:
        Losses, [C].
    """
    margins = beta * (ratios - baseline)
    gains = desirable_weight * (-margins).sigmoid()  # 1 - σ(x) = σ(-x)
    return gains.where(desirable, undesirable_weight * margins.sigmoid())


def _means(policy: Tensor, lengths: Tensor) -> Tensor:
    return policy / lengths.clamp(min=1)
