"""A last layer that computes its MLP only for tokens that predict targets: no others are needed."""

from __future__ import annotations

from types import MethodType
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from minigpt.data.batch import AttentionPlan, Span, plan_attention

TOLERANCE = 1e-3  # of hidden states in fp32, relative to their size
CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}  # of Llama's layers


class LlamaLayer(Protocol):
    """A decoder layer as Llama has it."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """Return the hidden states after the layer."""


@torch.no_grad()
def end_early(hf: PreTrainedModel, ids: Tensor) -> bool:
    """Let the last layer compute, after its attention, only the positions `predict_at` of a plan.

    Args:
        hf: the model, which has to be in eval mode.
        ids: [1, n] to try it on.

    Returns:
        Whether that gives this model's hidden states; if not, the model is as it was.
    """
    layers = [m for m in hf.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or {name for name, _ in layers[-1].named_children()} != CHILDREN:
        return False
    layer = layers[-1]
    predict_at = torch.arange(1, ids.shape[1], 2, device=ids.device)
    plan = plan_attention([Span(0, 0, 0, ids.shape[1])], predict_at)
    expected = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, predict_at]
    layer.forward = MethodType(_forward, layer)  # a method, which a copy of the layer binds anew
    try:
        result = hf.base_model(input_ids=ids, plan=plan, use_cache=False).last_hidden_state
        same = close(result, expected)
    except (TypeError, AttributeError, RuntimeError):  # other outputs, or layers run in cycles
        same = False
    if not same:
        del layer.forward
    return same


def _forward(
    layer: LlamaLayer,
    hidden_states: Tensor,
    *,
    plan: AttentionPlan | None = None,
    **kwargs: object,
) -> Tensor:
    """Compute a layer of Llama's kind, [1, N, H] of [1, T, H]; without a plan, all of it."""
    if plan is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    normed = layer.input_layernorm(hidden_states)
    attended = hidden_states + layer.self_attn(hidden_states=normed, plan=plan, **kwargs)[0]
    predictors = attended.index_select(1, plan.predict_at)
    out: Tensor = predictors + layer.mlp(layer.post_attention_layernorm(predictors))
    return out


def close(result: Tensor, expected: Tensor) -> bool:
    """Whether a model's numbers are equal, up to the tolerance of fp32."""
    bound = TOLERANCE * max(1.0, float(expected.abs().max()))
    return result.shape == expected.shape and bool((result - expected).abs().max() <= bound)
