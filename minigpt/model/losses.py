"""Losses as pure functions of tensors. They import only torch.

Shape legend: N targets, P preference pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

PreferenceLoss = Literal["sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm"]
SMOOTHED = ("cdpo", "robust")  # the losses that assume a share of wrong labels


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
    loss: PreferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
) -> Preferences:
    """Direct preference optimisation.

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

    Args:
        policy: [2P] summed log-probs of answers, chosen and rejected alternating.
        reference: [2P] the same under the frozen reference.
        lengths: [2P] target tokens of each answer.
        beta: strength of the pull towards the reference.
        loss: which of them.
        label_smoothing: ε of cdpo and robust; must be 0 for the others.

    Returns:
        Losses and rewards β(log π - log π_ref), each [P]; rewards carry no gradient.
    """
    ratios = policy - reference
    rewards = (beta * ratios).detach()
    if loss in ("ipo", "sigmoid_norm"):
        ratios = ratios / lengths.clamp(min=1)
    difference = ratios[0::2] - ratios[1::2]
    margin = beta * difference
    if loss == "ipo":
        losses = (difference - 1 / (2 * beta)).square()
    elif loss == "hinge":
        losses = (1 - margin).relu()
    else:
        losses = -(1 - label_smoothing) * logsigmoid(margin)
        opposite = label_smoothing * logsigmoid(-margin)
        if loss == "robust":
            losses = (losses + opposite) / (1 - 2 * label_smoothing)
        else:
            losses = losses - opposite
    return Preferences(losses, rewards[0::2], rewards[1::2])
