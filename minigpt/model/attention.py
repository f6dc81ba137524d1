"""Packed attention: samples of one batch never see each other.

Registered with transformers under `PACKED`, so every model family that takes an attention
interface uses it. The attention plan arrives as a keyword argument of the model's forward.

Shape legend:
    T  tokens of the batch, H query heads, K key heads, D width of a head
    R  rows of a group of the plan, L its longest row
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.nn.functional import dropout as dropped
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from minigpt.accel import cpu_attention as fused
from minigpt.data.batch import AttentionPlan
from minigpt.errors import ModelError

PACKED = "minigpt_packed"
BLOCK = 64  # queries whose scores exist at a time
LONGEST = 2048  # a longer row would keep too many weights for its backward pass
# Arguments of attention that say what the plan says, or ask for more results.
UNUSED = {"is_causal", "position_ids", "output_attentions", "output_hidden_states", "use_cache"}
UNUSED |= {"output_router_logits", "return_dict", "logits_to_keep", "deterministic"}
# FlashAttention goes back through heads of 256 on these cards, of 192 on later and smaller ones.
WIDE_HEADS = ((8, 0), (9, 0), (10, 0), (10, 3))
_OPTIONS = signature(varlen.varlen_attn).parameters.keys()  # which differ between releases
_GROUPED_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _OPTIONS else {}


@dataclass(frozen=True)
class Rule:
    """How attention differs from the softmax of all logits up to a token's own.

    Attributes:
        window, softcap, sinks: as `packed_attention` takes them.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend inside each row of the plan.

    Args:
        module: the attention layer.
        query: [1, H, T, D].
        key, value: [1, K, T, D] with K dividing H (grouped-query attention); a value may have
            another width, and so has the result.
        attention_mask: refused, the plan says who attends to whom.
        plan: the batch's attention plan.
        dropout: probability of dropping an attention weight.
        scaling: factor of the logits; None means 1/sqrt(D).
        sliding_window: of how many tokens, itself the last, a token sees.
        softcap: c of the logits' soft cap, c · tanh(logits / c).
        s_aux: [H] logits of attention sinks, which take part in the softmax and give nothing.
        others: what changes nothing (`UNUSED`).

    Returns:
        [1, T, H, D] and None.

    Raises:
        ModelError: without a plan, and for arguments that would change the result otherwise.
    """
    if plan is None:
        raise ModelError(
            f"{type(module).__name__} comes without the plan of the batch: layers of this family "
            "do not hand on what attention needs, so it cannot be trained. Take another family."
        )
    _refuse_others(module, {"attention_mask": attention_mask, **others})
    window = None if sliding_window is None or plan.longest <= sliding_window else sliding_window
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = dtype_of(query)
    # [T, heads, D]; the gradient of squeeze is a view, that of [0] is a copy into zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    if window is not None or softcap is not None or s_aux is not None:
        rule = Rule(window, softcap, s_aux)
        return _by_rows(q, k, v, plan, dropout, scaling, rule).unsqueeze(0), None
    if q.shape[-1] == v.shape[-1]:
        if not dropout and kernel_applies(query, q.shape[-1]):
            return _by_kernel(q, k, v, plan, scaling).unsqueeze(0), None
        if fused.applies(q, dropout):
            return fused.fused_attention(q, k, v, plan.spans, scaling).unsqueeze(0), None
    return _by_rows(q, k, v, plan, dropout, scaling).unsqueeze(0), None


def _refuse_others(module: nn.Module, others: dict[str, Any]) -> None:
    given = [name for name, x in others.items() if x is not None and name not in UNUSED]
    if given:
        raise ModelError(
            f"{type(module).__name__} gives its attention {', '.join(sorted(given))}, which is "
            "not computed for packed samples."
        )


AttentionInterface.register(PACKED, packed_attention)


def dtype_of(x: Tensor) -> torch.dtype:
    """Return what autocast would compute in: norms and rotations hand on wider numbers."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def kernel_applies(x: Tensor, width: int = 8) -> bool:
    """Whether attention on x's device, and in the type that it is computed in, has a kernel for
    rows of any length and heads of a width.
    """
    half = dtype_of(x) in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and width % 8 == 0 and width <= _widest_head()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _widest_head() -> int:
    """Return the width up to which torch's FlashAttention computes heads on this machine's GPU; 0
    before Ampere, which it does not know, and on AMD's, where it is another kernel.
    """
    card = torch.cuda.get_device_capability()
    if torch.version.hip or card < (8, 0) or not {"window_size", "scale"} <= _OPTIONS:
        return 0
    return 256 if card in WIDE_HEADS else 192


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scaling: float) -> Tensor:
    """Attend on a GPU, where full rows have a faster kernel than those of any length."""
    if plan.keys is not None:
        k, v = (x.index_select(0, plan.keys) for x in (k, v))
    borders, longest = (plan.cu_queries, plan.cu_keys), (plan.longest_queries, plan.longest)
    if not plan.full:
        return _ragged((q, k, v), borders, longest, scaling)
    rows, tokens = len(plan.cu_queries) - 1, plan.full * plan.longest
    if plan.full == rows:
        return _even((q, k, v), (rows, plan.longest), scaling)
    front, rest = zip(*(x.split([tokens, len(x) - tokens]) for x in (q, k, v)), strict=True)
    of_rest = plan.cu_queries[plan.full :] - tokens
    even = _even(front, (plan.full, plan.longest), scaling)
    return torch.cat([even, _ragged(rest, (of_rest, of_rest), longest, scaling)])


def _even(parts: Sequence[Tensor], shape: tuple[int, int], scaling: float) -> Tensor:
    """Attend in rows of one length, by the kernel that PyTorch takes for them: on some cards
    cuDNN's, which is faster.
    """
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in parts)  # [R, heads, L, D]
    out = scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


def _ragged(
    parts: Sequence[Tensor],
    borders: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float,
) -> Tensor:
    """Attend in rows of any length. A row with more keys than queries has them before: the kernel
    aligns both at their ends.
    """
    q, k, v = (x.contiguous() for x in parts)
    out: Any = varlen.varlen_attn(
        *(q, k, v, *borders, *longest), scale=scaling, window_size=(-1, 0), **_GROUPED_HEADS
    )
    return out  # type: ignore[no-any-return]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # each batch has groups of its own
def _by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    dropout: float,
    scaling: float,
    rule: Rule | None = None,
) -> Tensor:
    """Gather rows of like length into one causal call.

    A short row is filled up at its end, where causality hides the filling from every real token.
    """
    index = torch.cat([group.flatten() for group in plan.gather])
    sizes = [group.numel() for group in plan.gather]
    # Once for all groups, whose gradients would be added up one by one; index_select, because its
    # backward is many times faster on a CPU than indexing's.
    parts = (x.index_select(0, index).split(sizes) for x in (q, k, v))
    results = []
    with torch.autocast(q.device.type, enabled=False):
        for group, *flat in zip(plan.gather, *parts, strict=True):
            # [R, heads, L, D]
            rows = [x.unflatten(0, list(group.shape)).transpose(1, 2) for x in flat]
            if rule is None:
                out = _attend(rows[0], rows[1], rows[2], dropout, scaling)
            else:
                out = _attend_by_rule(rows[0], rows[1], rows[2], dropout, scaling, rule)
            results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, plan.scatter)


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float) -> Tensor:
    """Causal attention of rows [R, H, L, D] by what is fastest where they lie."""
    other = q.shape[-1] != v.shape[-1]
    if q.device.type != "cpu" or dropout or other or q.shape[2] > LONGEST:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(
            q, k, v, None, dropout, True, scale=scaling, enable_gqa=grouped
        )
    out: Tensor = _BlockCausal.apply(q * scaling, k, v)
    return out


def _attend_by_rule(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float, rule: Rule
) -> Tensor:
    """Causal attention of rows [R, H, L, D] with a window, a soft cap or sinks.

    The order of cap, mask and softmax, which is in fp32, is that of transformers' Gemma 2 and
    GPT-OSS.
    """
    place = torch.arange(q.shape[2], device=q.device)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (rule.window or len(place)))
    if rule.softcap is None and rule.sinks is None:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(
            q, k, v, seen, dropout, scale=scaling, enable_gqa=grouped
        )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT).float() * scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = dropped(scores.softmax(-1)[..., : len(place)], dropout)
    return weights.to(v.dtype) @ v


class _BlockCausal(torch.autograd.Function):
    """Causal attention by matrix products: each block of queries against its own past.

    On CPUs several times faster than SDPA's fused kernel, most of all in bf16 and backward. Query
    heads that share a key head are rows of one product. Queries come scaled.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, length, width = q.shape[1:]
        keys, values = k.flatten(0, 1), v.flatten(0, 1)  # [R·K, L, D]
        q = q.unflatten(1, (k.shape[1], -1))  # [R, K, H/K, L, D]
        out, kept = torch.empty_like(q), []
        for start, end in _blocks(length):
            queries = q[..., start:end, :].reshape(len(keys), -1, width)
            scores = torch.bmm(queries, keys[:, :end].mT)
            own = scores.view(len(keys), -1, end - start, end)[..., start:]
            own += _future(end - start, q.dtype)
            weights = torch.softmax(scores, -1)
            out[..., start:end, :] = torch.bmm(weights, values[:, :end]).view(
                *q.shape[:3], -1, width
            )
            kept += [queries, weights]
        ctx.save_for_backward(keys, values, *kept)
        ctx.heads = heads
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        keys, values, *kept = ctx.saved_tensors
        rows, heads, length, width = grads[0].shape
        grad = grads[0].reshape(len(keys), -1, length, width)  # [R·K, H/K, L, D]
        grad_q = torch.empty_like(grad)
        # Blocks add up: in fp32, unless there is nothing to add.
        wide = keys.dtype if len(kept) == 2 else torch.float32
        grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        for (start, end), queries, weights in zip(
            _blocks(length), kept[::2], kept[1::2], strict=True
        ):
            g = grad[:, :, start:end].reshape(len(keys), -1, width)
            of_weights = torch.bmm(g, values[:, :end].mT)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            grad_q[:, :, start:end] = torch.bmm(of_scores, keys[:, :end]).view(
                len(keys), -1, end - start, width
            )
            grad_k[:, :end] += torch.bmm(of_scores.mT, queries)
            grad_v[:, :end] += torch.bmm(weights.mT, g)
        of_keys, of_values = (x.to(keys.dtype).unflatten(0, (rows, -1)) for x in (grad_k, grad_v))
        return grad_q.view(rows, heads, length, width), of_keys, of_values


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


@cache
def _future(size: int, dtype: torch.dtype) -> Tensor:
    """Return what hides the future inside a block, [size, size]."""
    return torch.full((size, size), -torch.inf, dtype=dtype).triu_(1)


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model use another attention function for a while.

    Args:
        model: put back in the end.
        name: the function; `sdpa` (to generate) is `eager` for models that do not take it: they
            compute it without a mask.
    """
    before = model.config._attn_implementation
    plain = name == "sdpa" and not model._supports_sdpa
    model.config._attn_implementation = "eager" if plain else name
    try:
        yield
    finally:
        model.config._attn_implementation = before
