"""Losses as pure functions of tensors. They import only torch.

Shape legend: N targets, H hidden size, V vocabulary, P preference pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

LOGITS = 2**23  # that exist at a time, about
LOGITS_ON_CUDA = 2**27  # which small products leave idle
WIDE = 2**24  # logits that are fp32 at a time where nothing compiles the softmax
ROWS = 64  # a chunk has a multiple of them: products of some other lengths are far slower
KEPT = 4  # times so many probabilities are kept for the way back instead of computed again

PreferenceLoss = Literal["sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm"]
SMOOTHED = ("cdpo", "robust")  # the losses that assume a share of wrong labels
Softmax = Callable[[Tensor], Tensor]


def softmax_(logits: Tensor) -> Tensor:
    """Put probabilities in the place of logits [N, V]; return log Σ exp [N] in fp32.

    What is wanted of the logits themselves has to be taken before.
    """
    if torch.compiler.is_compiling() or logits.numel() <= WIDE:
        return _softmax_rows_(logits)
    rows = max(1, WIDE // logits.shape[1])  # else several copies in fp32 would exist at a time
    return torch.cat([_softmax_rows_(part) for part in logits.split(rows)])


def _softmax_rows_(logits: Tensor) -> Tensor:
    wide = logits.float()
    top = wide.amax(-1, keepdim=True)  # spelled so that the compiler reads the logits once
    normaliser = (wide - top).exp().sum(-1, keepdim=True).log() + top
    logits.copy_((wide - normaliser).exp())
    return normaliser[:, 0]


def _limit(hidden: Tensor) -> int:
    return LOGITS_ON_CUDA if hidden.is_cuda else LOGITS


def _chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of about equal length, and their labels [n, 1]."""
    number = -(-len(labels) * len(weight) // _limit(hidden))
    size = -(-len(labels) // max(1, number) // ROWS) * ROWS
    for start in range(0, len(labels), size or 1):
        chunk = slice(start, start + size)
        yield chunk, labels[chunk, None]


def _with_labels(of_logits: Tensor, own: Tensor, values: Tensor) -> Tensor:
    """Put values [n, 1] in the labels' places, in place; `scatter_` would widen the whole of a
    bf16 matrix on a CPU.
    """
    row = torch.arange(len(own), device=own.device)
    return of_logits.index_put_((row, own[:, 0]), values[:, 0].to(of_logits.dtype))


class _Head:
    """Gradients of a linear head, added up chunk by chunk."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight = hidden, weight
        self.of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        self.of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        self.of_bias = torch.zeros_like(bias) if bias is not None else None

    def add(self, chunk: slice, of_logits: Tensor) -> None:
        """Add what the gradient of a chunk's logits [n, V] comes to."""
        if self.of_hidden is not None:
            self.of_hidden[chunk] = of_logits @ self.weight
        if self.of_weight is not None:
            self.of_weight.addmm_(of_logits.T, self.hidden[chunk])
        if self.of_bias is not None:
            self.of_bias += of_logits.sum(0)

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias."""
        return self.of_hidden, self.of_weight, self.of_bias


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of a linear head, with its gradients computed in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softmax: Softmax,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        head = _Head(ctx, hidden, weight, bias)
        for chunk, own in _chunks(hidden, weight, labels):
            logits = linear(hidden[chunk], weight, bias)
            logp = logits.gather(1, own).float() - softmax(logits)[:, None]
            total -= logp.sum()
            head.add(chunk, _with_labels(logits, own, logp.expm1()))
        ctx.save_for_backward(*head.gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if g is None else g * grads[0] for g in ctx.saved_tensors), None, None)


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities of the labels under a linear head; if there are many, the logits are
    computed again to go back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softmax: Softmax,
        goes_back: bool,
    ) -> Tensor:
        out = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        keep = goes_back and len(labels) * len(weight) <= KEPT * _limit(hidden)
        kept = []
        for chunk, own in _chunks(hidden, weight, labels):
            logits = linear(hidden[chunk], weight, bias)
            out[chunk] = logits.gather(1, own).squeeze(1).float() - softmax(logits)
            kept += [logits] * keep  # probabilities by now
        ctx.save_for_backward(hidden, weight, bias, labels, out, *kept)
        ctx.softmax = softmax
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, logp, *kept = ctx.saved_tensors
        head = _Head(ctx, hidden, weight, bias)
        for number, (chunk, own) in enumerate(_chunks(hidden, weight, labels)):
            probabilities = kept[number] if kept else linear(hidden[chunk], weight, bias)
            if not kept:
                ctx.softmax(probabilities)
            factor = -grads[0][chunk, None]
            of_logits = probabilities * factor.to(probabilities.dtype)
            of_own = logp[chunk, None].expm1() * factor
            head.add(chunk, _with_labels(of_logits, own, of_own))
        return (*head.gradients, None, None, None)


def _under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """Cast what autocast would cast: it does not reach into our own functions."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return [hidden.to(weight.dtype), weight, bias]
    dtype = torch.get_autocast_dtype(kind)
    return [None if x is None else x.to(dtype) for x in (hidden, weight, bias)]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softmax: Softmax = softmax_,
) -> Tensor:
    """Sum of cross-entropies in nats, without ever holding the logits of the whole batch.

    Args:
        hidden: [N, H] hidden states of the target positions.
        weight: [V, H] head; `bias`: [V] or None.
        labels: [N] target ids.
        softmax: this module's, or the same compiled.

    Returns:
        Scalar, fp32; 0 when N is 0.
    """
    if not torch.is_grad_enabled():  # else the gradients would be computed all the same
        return -linear_logprobs(hidden, weight, bias, labels, softmax).sum()
    h, w, b = _under_autocast(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(h, w, b, labels, softmax)
    return loss


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softmax: Softmax = softmax_,
) -> Tensor:
    """Return log p(label) in nats, [N] fp32; arguments as for `linear_cross_entropy`."""
    h, w, b = _under_autocast(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        goes_back = torch.is_grad_enabled()  # inside the function it never is
        out: Tensor = _LinearLogprobs.apply(h, w, b, labels, softmax, goes_back)
    return out


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
