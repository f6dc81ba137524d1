"""The loss of a linear head by chunks of targets: a batch's logits never exist all at once.

As in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989), the gradients of a summed loss are computed
with it, chunk by chunk. With p = softmax(logits), d(-log p_label) / d logits is p - 1 for the label
and p for the others.

Shape legend: N targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from minigpt.accel.context import Context
from minigpt.accel.early_end import close, end_early
from minigpt.data.batch import PackedBatch

log = logging.getLogger(__name__)

CHUNK_LOGITS = 2**23  # about
CHUNK_LOGITS_ON_CUDA = 2**27  # small matmuls would leave a GPU idle
FP32_LOGITS = 2**24  # logits that are fp32 at a time where nothing compiles the softmax
ROWS = 64  # a chunk has a multiple of them: matmuls of some other lengths are far slower
SAVED_CHUNKS = 4  # up to so many, probabilities are saved for the backward pass

Softmax = Callable[[Tensor], Tensor]


def prepare(hf: PreTrainedModel, packed: bool) -> LinearHead | None:
    """Prepare a model for training; as `accel.linear_head`."""
    hf.get_input_embeddings().register_forward_hook(_narrow_on_gpu)
    training = hf.training
    hf.eval()
    try:
        embedding = cast(nn.Embedding, hf.get_input_embeddings())
        ids = torch.arange(min(8, len(embedding.weight)), device=hf.device)[None]
        if head_is_linear(hf, ids):
            return LinearHead(packed and end_early(hf, ids))
    finally:
        hf.train(training)
    log.warning(
        "%s changes its logits after the head: they are computed whole, which takes more memory.",
        type(hf).__name__,
    )
    return None


def _narrow_on_gpu(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Let what layers add to be bf16 where matmuls are: autocast leaves embeddings wide, which
    takes a GPU time to move. A CPU gains nothing.
    """
    if out.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        return out.to(dtype) if dtype == torch.bfloat16 else out
    return out


@torch.no_grad()
def head_is_linear(hf: PreTrainedModel, ids: Tensor) -> bool:
    """Whether a model's logits are exactly its head applied to the last hidden states.

    Args:
        hf: the model, which has to be in eval mode.
        ids: [1, n] to try it on.
    """
    head = hf.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    config = hf.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None):  # hardly seen while logits are small
        return False
    out = hf(input_ids=ids, use_cache=False)
    try:
        logits = head(hf.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    except (TypeError, AttributeError, ValueError, RuntimeError):  # a body of another kind
        return False
    return close(logits, out.logits)


class LinearHead:
    """Computes the loss of a model from its last hidden states.

    Attributes:
        softmax: of a chunk's logits; compiled with the layers.
        ends_early: the last layer gives the hidden states that predict targets, and no others.
    """

    def __init__(self, ends_early: bool) -> None:
        self.softmax: Softmax = softmax_
        self.ends_early = ends_early

    def loss(self, head: nn.Module | None, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Return the summed cross-entropy [] of hidden states, in nats."""
        assert isinstance(head, nn.Linear)
        hidden = self._predictors(hidden, batch)
        return linear_cross_entropy(hidden, head.weight, head.bias, batch.labels, self.softmax)

    def logprobs(
        self,
        head: nn.Module | None,
        hidden: Tensor,
        batch: PackedBatch,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Return the targets' log-probabilities [N] by hidden states, in nats.

        Dividing hidden states by a temperature [N] divides the logits of a head without a bias.
        """
        assert isinstance(head, nn.Linear)
        hidden = self._predictors(hidden, batch)
        if temperature is not None:
            hidden = hidden / temperature[:, None]
        return linear_logprobs(hidden, head.weight, head.bias, batch.labels, self.softmax)

    def _predictors(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Return the hidden states [N, H] that predict the targets."""
        return hidden if self.ends_early else hidden.index_select(0, batch.predict_at)


def softmax_(logits: Tensor) -> Tensor:
    """Overwrite logits [N, V] with their probabilities; return log Σ exp [N] in fp32."""
    if torch.compiler.is_compiling() or logits.numel() <= FP32_LOGITS:
        return _softmax_rows_(logits)
    rows = max(1, FP32_LOGITS // logits.shape[1])  # else several copies in fp32 would exist
    return torch.cat([_softmax_rows_(chunk) for chunk in logits.split(rows)])


def _softmax_rows_(logits: Tensor) -> Tensor:
    wide = logits.float()
    top = wide.amax(-1, keepdim=True)  # spelled so that the compiler reads the logits once
    normaliser = (wide - top).exp().sum(-1, keepdim=True).log() + top
    logits.copy_((wide - normaliser).exp())
    return normaliser[:, 0]


def _chunk_logits(hidden: Tensor) -> int:
    return CHUNK_LOGITS_ON_CUDA if hidden.is_cuda else CHUNK_LOGITS


def _chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of about equal length, and their labels [n, 1]."""
    count = math.ceil(len(labels) * len(weight) / _chunk_logits(hidden))
    size = math.ceil(len(labels) / (max(1, count) * ROWS)) * ROWS
    for start in range(0, len(labels), max(1, size)):
        chunk = slice(start, start + size)
        yield chunk, labels[chunk, None]


def _set_at_labels(grad_logits: Tensor, labels: Tensor, values: Tensor) -> Tensor:
    """Set [n, V] at each row's label [n, 1] to a value [n, 1], in place; `scatter_` would widen all
    of a bf16 matrix on a CPU.
    """
    row = torch.arange(len(labels), device=labels.device)
    return grad_logits.index_put_((row, labels[:, 0]), values[:, 0].to(grad_logits.dtype))


class _HeadGradients:
    """Gradients of a linear head, added up chunk by chunk."""

    def __init__(self, ctx: Context, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.inputs = hidden, weight
        self.hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        self.weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        self.bias = torch.zeros_like(bias) if bias is not None else None

    def add(self, chunk: slice, grad_logits: Tensor) -> None:
        """Add what the gradient of a chunk's logits [n, V] comes to."""
        hidden, weight = self.inputs
        if self.hidden is not None:
            self.hidden[chunk] = grad_logits @ weight
        if self.weight is not None:
            self.weight.addmm_(grad_logits.T, hidden[chunk])
        if self.bias is not None:
            self.bias += grad_logits.sum(0)

    @property
    def as_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden states, weight and bias."""
        return self.hidden, self.weight, self.bias


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of a linear head, with its gradients computed in the same pass."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softmax: Softmax,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _HeadGradients(ctx, hidden, weight, bias)
        for chunk, label in _chunks(hidden, weight, labels):
            logits = linear(hidden[chunk], weight, bias)
            logp = logits.gather(1, label).float() - softmax(logits)[:, None]
            total -= logp.sum()
            # The logits are probabilities p by now, and expm1(logp) is p - 1 without its rounding.
            gradients.add(chunk, _set_at_labels(logits, label, logp.expm1()))
        ctx.save_for_backward(*gradients.as_tuple)
        return total

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if g is None else g * grads[0] for g in ctx.saved_tensors), None, None)


class _LogprobsContext(Context, Protocol):
    softmax: Softmax


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities of the labels under a linear head; where there are more than
    `SAVED_CHUNKS`, the backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: _LogprobsContext,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softmax: Softmax,
        needs_backward: bool,
    ) -> Tensor:
        out = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        fits = len(labels) * len(weight) <= SAVED_CHUNKS * _chunk_logits(hidden)
        saved = []
        for chunk, label in _chunks(hidden, weight, labels):
            logits = linear(hidden[chunk], weight, bias)
            out[chunk] = logits.gather(1, label).squeeze(1).float() - softmax(logits)
            if needs_backward and fits:
                saved.append(logits)  # probabilities by now
        ctx.save_for_backward(hidden, weight, bias, labels, out, *saved)
        ctx.softmax = softmax
        return out

    @staticmethod
    def backward(ctx: _LogprobsContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, logp, *saved = ctx.saved_tensors
        gradients = _HeadGradients(ctx, hidden, weight, bias)
        for index, (chunk, label) in enumerate(_chunks(hidden, weight, labels)):
            if saved:
                probabilities = saved[index]
            else:
                probabilities = linear(hidden[chunk], weight, bias)
                ctx.softmax(probabilities)  # in place
            factor = -grads[0][chunk, None]
            grad_logits = probabilities * factor.to(probabilities.dtype)
            grad_label = logp[chunk, None].expm1() * factor
            gradients.add(chunk, _set_at_labels(grad_logits, label, grad_label))
        return (*gradients.as_tuple, None, None, None)


def _cast_as_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """Cast what autocast would cast; it leaves the arguments of autograd functions as they are."""
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
    h, w, b = _cast_as_autocast(hidden, weight, bias)
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
    h, w, b = _cast_as_autocast(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        needs_backward = torch.is_grad_enabled()  # inside the function it never is
        out: Tensor = _LinearLogprobs.apply(h, w, b, labels, softmax, needs_backward)
    return out
