"""PackedLM: a causal LM that takes packed batches and returns losses or log-probs.

It is one module so that everything a step computes happens inside its forward, where DDP
and FSDP2 have the parameters at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from minigpt.data.batch import AttentionPlan, PackedBatch, plan_attention
from minigpt.model import forward
from minigpt.model.attention import attention_of, dtype_of
from minigpt.model.conformance import checked
from minigpt.model.losses import Softmax, linear_cross_entropy, linear_logprobs, softmax_, sum_by

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of logits and hidden states in fp32, relative to their size
PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}  # of Llama's layers


class PackedLM(nn.Module):
    """Wraps a transformers causal LM for training on packed batches.

    Args:
        hf: the model; its attention becomes that by which its kind is exact.

    Attributes:
        conduct: how its kind is computed; samples of one that is not exact when they are packed
            are read each in a row of its own.
        softmax: of the head's logits; compiled with the layers.
        plain_head: True when the model's logits are not hidden @ weight + bias (soft caps,
            scaling), so that its own forward computes them.

    Raises:
        ModelError: when models of its kind cannot be computed exactly.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        self.conduct = checked(hf, training=True)
        hf.config._attn_implementation = self.conduct.training
        self.softmax: Softmax = softmax_
        hf.get_input_embeddings().register_forward_hook(_narrow_on_gpu)
        self.plain_head = not head_is_linear(hf)
        packs = self.conduct.packed and not self.plain_head
        self.ends_early = packs and end_early(hf)
        if not self.conduct.packed:
            log.warning(
                "%s is not exact with packed samples (%s): each has a row of its own, which "
                "takes more time.",
                type(hf).__name__,
                self.conduct.problem,
            )
        if self.plain_head:
            log.warning(
                "%s changes its logits after the head: they are computed whole, which takes "
                "more memory.",
                type(hf).__name__,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLM:
        """Let `to` move buffers and never change their type, which bf16-true would: see
        `cast_weights`.
        """
        exact = [(m, n, b) for m in self.modules() for n, b in m.named_buffers(recurse=False)]
        super()._apply(fn, recurse)
        for module, name, before in exact:
            after = module.get_buffer(name)
            if after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    def forward(self, batch: PackedBatch, per_answer: bool = False) -> Tensor:
        """Return the summed cross-entropy [] or each answer's summed log-prob [A], in nats."""
        if self.plain_head:
            logp = self._plain_logprobs(batch)
            return sum_by(logp, batch.answers, batch.n_answers) if per_answer else -logp.sum()
        hidden = forward.hidden_states(self.hf, batch, self.conduct.packed)
        head: Any = self.hf.get_output_embeddings()
        if not self.ends_early:
            hidden = hidden.index_select(0, batch.predict_at)
        if not per_answer:
            return linear_cross_entropy(hidden, head.weight, head.bias, batch.labels, self.softmax)
        logp = linear_logprobs(hidden, head.weight, head.bias, batch.labels, self.softmax)
        return sum_by(logp, batch.answers, batch.n_answers)

    def _plain_logprobs(self, batch: PackedBatch) -> Tensor:
        out = forward.logits(self.hf, batch, self.conduct.packed)
        logp: Tensor = out.float().log_softmax(-1)
        return logp.gather(1, batch.labels[:, None]).squeeze(1)


def _narrow_on_gpu(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    """Let what layers add to be bf16 where products are: autocast leaves embeddings wide, which
    takes a GPU time to move. A CPU gains nothing.
    """
    return out.to(torch.bfloat16) if out.is_cuda and dtype_of(out) == torch.bfloat16 else out


@torch.no_grad()
def head_is_linear(hf: PreTrainedModel) -> bool:
    """Whether the model's logits are exactly its head applied to the last hidden states."""
    head = hf.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    config = hf.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None):  # hardly seen while logits are small
        return False
    with _as_loaded(hf) as ids:
        out = hf(input_ids=ids, use_cache=False)
        try:
            ours = head(hf.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        except (TypeError, AttributeError, ValueError, RuntimeError):  # a body of another kind
            return False
    return ours.shape == out.logits.shape and _close(ours, out.logits)


@torch.no_grad()
def end_early(hf: PreTrainedModel) -> bool:
    """Let the last layer go on from its attention with the plan's `predict_at` alone: prompts
    cost none of what follows.

    Returns:
        Whether that gives this model's hidden states; if not, nothing was changed.
    """
    layers = [m for m in hf.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or {name for name, _ in layers[-1].named_children()} != PARTS:
        return False
    layer = layers[-1]
    with _as_loaded(hf) as ids:
        some = torch.arange(1, ids.shape[1], 2, device=ids.device)
        plan = plan_attention([(0, 0, 0, ids.shape[1])], some)
        whole = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        layer.forward = MethodType(_early, layer)  # a method, which a copy of the layer binds anew
        try:
            ours = hf.base_model(input_ids=ids, plan=plan, use_cache=False).last_hidden_state
            same = _close(ours, whole[:, some])
        except (TypeError, AttributeError, RuntimeError):  # other outputs, or layers run in cycles
            same = False
    if not same:
        del layer.forward
    return same


def _early(
    layer: Any, hidden_states: Tensor, *, plan: AttentionPlan | None = None, **kwargs: Any
) -> Tensor:
    """Compute a layer of Llama's kind, [1, N, H] of [1, T, H]; without a plan, all of it."""
    if plan is None:
        whole: Tensor = type(layer).forward(layer, hidden_states, **kwargs)
        return whole
    normed = layer.input_layernorm(hidden_states)
    attended = hidden_states + layer.self_attn(hidden_states=normed, plan=plan, **kwargs)[0]
    kept = attended.index_select(1, plan.predict_at)
    return kept + layer.mlp(layer.post_attention_layernorm(kept))  # type: ignore[no-any-return]


@contextmanager
def _as_loaded(hf: PreTrainedModel) -> Iterator[Tensor]:
    """Let a model compute as its authors do for a while; gives some ids [1, n] to try it on."""
    training = hf.training
    hf.eval()
    try:
        with attention_of(hf, checked(hf, training=False).decoding):
            rows: Any = hf.get_input_embeddings()
            yield torch.arange(min(8, len(rows.weight)), device=hf.device)[None]
    finally:
        hf.train(training)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    bound = TOLERANCE * max(1.0, float(theirs.abs().max()))
    return bool((ours - theirs).abs().max() <= bound)
