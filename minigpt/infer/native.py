"""Fast decoding of Qwen3 and Llama models, with fused weights and one cache of slots.

Multiplying one row by a matrix takes the time of reading the matrix; everything else is overhead.
So the matrices are few (q, k and v are one, gate and up another), they lie in the order in which
matmuls read them, the norms' weights and attention's scale are multiplied into them, and the cache
is written in place.

RMSNorm of a vector x of n numbers is √n w · x / √(|x|² + n ε): `unit` computes the fraction, and
√n w is a factor of the next matrix's columns.

Shape legend: T tokens, H query heads, K key heads, D width of a head, L positions, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

GROWTH = 64  # positions by which the cache grows at least
BLOCK = 8  # rows of one call of attention on a CPU, which reads each as far as the longest
# `_op`, because the operator's Python wrapper takes a fifth of a small matmul's time.
INT8_LINEAR: Callable[..., Tensor] = torch.ops.quantized.linear_dynamic._op

USE_ONEDNN = bool(torch.backends.mkldnn.enabled)  # read once, for several threads may be decoding

Attend = Callable[[int, Tensor], Tensor]  # layer, heads [T, H + 2K, D] -> [T, H * D]


def is_native(model: PreTrainedModel) -> bool:
    """Whether a model can be decoded here: a plain Qwen3 or Llama with unsharded weights."""
    if type(model) not in (Qwen3ForCausalLM, LlamaForCausalLM):
        return False
    config = cast(LlamaConfig, model.config)
    if config.hidden_act != "silu":
        return False
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in model.modules()):
        return False
    layers = (m for n, m in model.named_modules() if n.endswith(("_proj", "lm_head")))
    return (
        rope in ("default", "llama3", "linear", "yarn")
        and not windows
        and all(map(_is_plain, layers))
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one complete matrix: without a bias, and no shard."""
    if type(layer) is not nn.Linear or layer.bias is not None:
        return False
    shape = (layer.out_features, layer.in_features)
    return type(layer.weight) is nn.Parameter and layer.weight.shape == shape


class Matrix:
    """The weight [out, in] of a linear layer, with an int8 copy where `int8` is set."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, int8: bool) -> None:
        self.packed = _packed_int8(weight) if int8 else None
        # Row times matrix is faster down the columns in fp32, and along the rows in bf16.
        by_columns = dtype is torch.float32
        self.weight = weight.t().contiguous() if by_columns else weight.to(dtype).t()
        # MKL multiplies one row in one thread: as a batch of shorter rows, whose results are added
        # up, it takes all.
        size = weight.shape[1]
        fewest = max(4, torch.get_num_threads())
        self.splits = next((n for n in range(fewest, size + 1) if size % n == 0), 1)

    def __call__(self, x: Tensor, exact: bool = False) -> Tensor:
        """Return x @ weight.T; x [T, in]; `exact` leaves the int8 copy out."""
        if self.packed is not None and not exact:
            # 7 bits: without VNNI, full bytes overflow where they are summed in pairs.
            return INT8_LINEAR(x, self.packed, True)
        if len(x) > 1 or x.dtype is not torch.float32 or x.device.type != "cpu":
            return x.mm(self.weight)
        rows = x.view(self.splits, 1, -1)
        return rows.bmm(self.weight.view(self.splits, rows.shape[2], -1)).sum(0)


def _packed_int8(weight: Tensor) -> object:
    """Return a weight in the form that the int8 operator takes, with a scale for each row."""
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    values = (weight / scale[:, None]).round().to(torch.int8)
    zero = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*quantized tensor creation functions.*")
        quantized = torch._make_per_channel_quantized_tensor(values, scale.double(), zero, 0)
        packed: object = torch.ops.quantized.linear_prepack(quantized, None)
        return packed


@dataclass(frozen=True)
class Layer:
    """A decoder layer's weights: the norms before qkv and gate_up are multiplied into them."""

    qkv: Matrix
    norm: Tensor | None  # [H + K, D], of queries and keys
    out: Matrix
    gate_up: Matrix
    down: Matrix


class FusedWeights:
    """A model's weights, laid out for decoding.

    Args:
        model: a model that `is_native` accepts.
        dtype: the type of the activations and the exact weights.
        int8: decode with int8 weights; prompts are read with the exact ones.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, int8: bool = False) -> None:
        config = cast(LlamaConfig, model.config)
        body = cast(LlamaForCausalLM, model).model
        layers = cast(list[Qwen3DecoderLayer], list(body.layers))  # or Llama's, without the norms
        self.dtype = dtype
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads or self.heads
        self.head_dim = layers[0].self_attn.head_dim
        self.rope = body.rotary_emb
        self._matrix = partial(Matrix, dtype=dtype, int8=int8)
        # √(n ε), for hidden states and for heads.
        self._root_eps, self._head_root_eps = (
            torch.tensor((size * config.rms_norm_eps) ** 0.5, device=model.device)
            for size in (config.hidden_size, self.head_dim)
        )
        self.embedding: Tensor = body.embed_tokens.weight.to(dtype)
        # The two numbers of a rotary pair lie half a head apart. In this order of a head's numbers
        # they are neighbours, and so one complex number.
        self._pairs_first = (
            torch.arange(self.head_dim, device=model.device).view(2, -1).t().flatten()
        )
        self.layers = [self._layer(layer) for layer in layers]
        head = cast(LlamaForCausalLM, model).lm_head
        self.head = self._matrix(head.weight.float() * self._norm_factor(body.norm.weight))

    def _norm_factor(self, weight: Tensor) -> Tensor:
        """Return √n w of a norm's weight w [n]."""
        return weight.float().mul(weight.numel() ** 0.5)

    def _layer(self, layer: Qwen3DecoderLayer) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        query, key = (
            m.weight.float().unflatten(0, (-1, self.head_dim))[:, self._pairs_first].flatten(0, 1)
            for m in (attention.q_proj, attention.k_proj)
        )
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).float()
        norm = None
        if hasattr(attention, "q_norm"):
            q_norm, k_norm = (
                self._norm_factor(m.weight)[self._pairs_first]
                for m in (attention.q_norm, attention.k_norm)
            )
            q_norm *= self.head_dim**-0.5
            norm = torch.cat([q_norm.expand(self.heads, -1), k_norm.expand(self.kv_heads, -1)])
        else:
            query *= self.head_dim**-0.5
        qkv = torch.cat([query, key, attention.v_proj.weight.float()])
        return Layer(
            self._matrix(qkv * self._norm_factor(layer.input_layernorm.weight)),
            norm,
            self._matrix(attention.o_proj.weight.float()),
            self._matrix(gate_up * self._norm_factor(layer.post_attention_layernorm.weight)),
            self._matrix(mlp.down_proj.weight.float()),
        )

    def rotations(self, length: int) -> Tensor:
        """Return the rotary factors of all positions, complex [length, 1, D / 2]."""
        positions = torch.arange(length, device=self.embedding.device)[None]
        cos, sin = self.rope(torch.empty(0, device=positions.device), positions)
        half = self.head_dim // 2
        return torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())[:, None]

    def unit(self, x: Tensor) -> Tensor:
        """Return vectors x [T, hidden] divided by √(|x|² + n ε), so of length 1 but for ε."""
        return (x / _length(x, self._root_eps)).to(x.dtype)

    def forward(self, tokens: Tensor, rotations: Tensor, attend: Attend, exact: bool) -> Tensor:
        """Return the last layer's output [T, hidden] for a row of tokens [T].

        Args:
            tokens: token ids.
            rotations: the rotary factors of their positions [T, 1, D / 2].
            attend: stores keys and values, and computes the attention.
            exact: use exact weights though there are int8 ones.
        """
        x = F.embedding(tokens, self.embedding)
        rotated = self.heads + self.kv_heads
        for index, layer in enumerate(self.layers):
            heads = layer.qkv(self.unit(x), exact).view(len(x), -1, self.head_dim)
            self._rotate(heads.narrow(1, 0, rotated), layer.norm, rotations)
            x = layer.out(attend(index, heads), exact).add_(x)
            gate, up = layer.gate_up(self.unit(x), exact).chunk(2, -1)
            x = layer.down(F.silu(gate, inplace=True).mul_(up), exact).add_(x)
        return x

    def _rotate(self, heads: Tensor, norm: Tensor | None, rotations: Tensor) -> None:
        """Norm and rotate queries and keys in place."""
        values = heads.float()
        if norm is not None:
            values.div_(_length(values, self._head_root_eps)).mul_(norm)
        torch.view_as_complex(values.unflatten(-1, (-1, 2))).mul_(rotations)
        if values is not heads:
            heads.copy_(values)

    def logits(self, x: Tensor, exact: bool) -> Tensor:
        """Return logits [T, V] of outputs [T, hidden]."""
        return self.head(self.unit(x), exact)


def _length(x: Tensor, root_eps: Tensor) -> Tensor:
    """Return √(|x|² + n ε) of vectors [..., n], in fp32 [..., 1]."""
    length: Tensor = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
    return length.hypot_(root_eps)


class NativeDecoder:
    """Decodes requests with fused weights over one cache of slots.

    The active requests have the cache's first rows, so that a step computes these rows alone.

    Args:
        weights: the fused weights of the model.
    """

    joins = True  # a new request is decoded together with the active ones

    def __init__(self, weights: FusedWeights) -> None:
        self.weights = weights
        self.lengths: list[int] = []  # of the active rows, in tokens
        self.caches: list[Tensor] = []  # by layer: [2, rows, K, positions, D], keys and values
        self.rotations = weights.rotations(0)
        # By layer, [2, 1, K, L, D]: keys and values of what `read` has read of the next prompt.
        self._prefix: list[Tensor] = []

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> None:
        """Read the beginning of the prompt that is admitted next, or go on with it."""
        start = self._prefix[0].shape[3] if self._prefix else 0
        end = start + len(tokens)
        if end > len(self.rotations):
            self.rotations = self.weights.rotations(end)

        def attend(layer: int, heads: Tensor) -> Tensor:
            before = self._prefix[layer] if start else None
            out, keys_values = _attend_causally(heads, self.weights.kv_heads, before)
            self._prefix[layer : layer + 1] = [keys_values]
            return out

        ids = torch.tensor(tokens, device=self.rotations.device)
        self.weights.forward(ids, self.rotations[start:end], attend, exact=True)

    def forget(self) -> None:
        """Forget what `read` has read."""
        self._prefix = []

    @torch.inference_mode()
    def admit(self, prompts: Sequence[list[int]], counts: Sequence[int] | None = None) -> Tensor:
        """Read prompts into the next rows; return the logits [n, V] of their last tokens.

        Args:
            prompts: each is computed once, the first from where `read` has left off.
            counts: how many rows each gets, one after the other; by default one.
        """
        first, device = len(self.lengths), self.rotations.device
        counts = [1] * len(prompts) if counts is None else counts
        for prompt, count in zip(prompts, counts, strict=True):
            self.lengths += [len(prompt)] * count
        self._reserve()
        prefix, self._prefix = self._prefix, []
        starts = [prefix[0].shape[3] if prefix else 0] + [0] * (len(prompts) - 1)
        pieces = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        ends = _borders(map(len, pieces))
        spans = list(pairwise(ends))
        rows = list(pairwise(_borders(counts, first)))
        tokens = torch.tensor([token for piece in pieces for token in piece], device=device)
        borders = zip(starts, map(len, prompts), strict=True)
        positions = torch.cat([torch.arange(*border, device=device) for border in borders])

        def attend(layer: int, heads: Tensor) -> Tensor:
            outs = []
            for (start, end), (row, next_row) in zip(spans, rows, strict=True):
                before = prefix[layer] if prefix and start == 0 else None
                out, keys_values = _attend_causally(heads[start:end], self.weights.kv_heads, before)
                self.caches[layer][:, row:next_row, :, : keys_values.shape[3]] = keys_values
                outs.append(out)
            return torch.cat(outs)

        out = self.weights.forward(tokens, self.rotations[positions], attend, exact=True)
        last = out[torch.tensor(ends[1:], device=device) - 1]
        logits = self.weights.logits(last, exact=True)
        return logits.repeat_interleave(torch.tensor(counts, device=device), 0)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to each row; return the logits [n, V] that follow."""
        weights, rows, device = self.weights, len(self.lengths), self.rotations.device
        positions = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self._reserve()
        blocks = self._blocks()
        row_indices = torch.arange(rows, device=device)
        last = slice(self.lengths[0] - 1, self.lengths[0])
        rotations = self.rotations[last] if rows == 1 else self.rotations[positions]

        def attend(layer: int, heads: Tensor) -> Tensor:
            cache = self.caches[layer]
            new = heads.narrow(1, weights.heads, 2 * weights.kv_heads).unflatten(1, (2, -1))
            if rows == 1:  # plain indices take a third of the time
                cache.select(3, last.start).select(1, 0).copy_(new[0])
            else:
                cache[:, row_indices, :, positions] = new
            queries = heads.narrow(1, 0, weights.heads)
            outs = []
            for first, count, longest, mask in blocks:
                keys, values = cache.narrow(1, first, count).narrow(3, 0, longest).unbind()
                outs.append(_attend(queries.narrow(0, first, count), keys, values, mask))
            return torch.cat(outs) if len(outs) > 1 else outs[0]

        ids = torch.tensor(tokens, device=device)
        # One row in bf16 takes torch's native matmuls half of oneDNN's time.
        one_row = rows == 1 and weights.dtype is torch.bfloat16
        torch.backends.mkldnn.enabled = USE_ONEDNN and not one_row  # type: ignore[assignment]
        try:
            out = weights.forward(ids, rotations, attend, exact=False)
            return weights.logits(out, exact=False)
        finally:
            torch.backends.mkldnn.enabled = USE_ONEDNN  # type: ignore[assignment]

    def _blocks(self) -> list[tuple[int, int, int, Tensor | None]]:
        """Return the rows in blocks: the first, how many, the longest one's length, the mask.

        No block reads its keys beyond its own longest row. A mask [count * K, 1, longest] is added
        to the scores; where all rows are as long there is none.
        """
        device = self.rotations.device
        size = BLOCK if device.type == "cpu" else len(self.lengths)
        blocks: list[tuple[int, int, int, Tensor | None]] = []
        for first in range(0, len(self.lengths), size):
            lengths = self.lengths[first : first + size]
            longest, mask = max(lengths), None
            if min(lengths) < longest:
                ends = torch.tensor(lengths, device=device)[:, None]
                hidden = torch.arange(longest, device=device) >= ends
                mask = torch.zeros(hidden.shape, dtype=self.weights.dtype, device=device)
                mask = mask.masked_fill_(hidden, -torch.inf)
                mask = mask.repeat_interleave(self.weights.kv_heads, 0)[:, None]
            blocks.append((first, len(lengths), longest, mask))
        return blocks

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """Free a row; the last one moves there."""
        last = self.lengths.pop()
        if row < (end := len(self.lengths)):
            self.lengths[row] = last
            for cache in self.caches:
                cache[:, row, :, :last] = cache[:, end, :, :last]
        if not self.lengths:  # else one long request would hold its memory for as long as we serve
            self.caches = []

    def _reserve(self) -> None:
        """Grow the caches to the rows and their lengths."""
        rows, length = len(self.lengths), max(self.lengths)
        old_rows, old_length = self.caches[0].shape[1:4:2] if self.caches else (0, 0)
        if rows <= old_rows and length <= old_length:
            return
        new_rows = old_rows if rows <= old_rows else max(rows, 2 * old_rows)
        enough = length <= old_length
        new_length = old_length if enough else max(length + GROWTH, old_length * 3 // 2)
        shape = (2, new_rows, self.weights.kv_heads, new_length, self.weights.head_dim)
        for index in range(len(self.weights.layers)):
            # Zeros, because what the mask hides is still multiplied, by 0.
            cache = torch.zeros(shape, dtype=self.weights.dtype, device=self.rotations.device)
            if old_length:
                cache[:, :old_rows, :, :old_length] = self.caches[index]
            self.caches[index : index + 1] = [cache]
        if new_length > len(self.rotations):
            self.rotations = self.weights.rotations(new_length)


def _borders(sizes: Iterable[int], start: int = 0) -> list[int]:
    return list(accumulate(sizes, initial=start))


def _attend_causally(heads: Tensor, kv_heads: int, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the attention [T, H * D] of T tokens of a prompt, with all keys and values.

    Args:
        heads: [T, H + 2K, D], the queries scaled.
        kv_heads: K.
        before: keys and values [2, 1, K, L, D] of the tokens before them.

    Returns:
        The attention, and keys and values [2, 1, K, L + T, D].
    """
    by_head = heads.transpose(0, 1)
    keys_values = by_head[-2 * kv_heads :].unflatten(0, (2, 1, -1))
    if before is not None:
        keys_values = torch.cat([before, keys_values], 3)
    q = by_head[None, : -2 * kv_heads]
    k, v = keys_values
    mask = causal_lower_right(q.shape[2], k.shape[2])
    out = sdpa(q, k, v, mask, enable_gqa=True, scale=1.0)
    return out[0].transpose(0, 1).flatten(1), keys_values


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention [B, H * D] of one query of each row.

    Args:
        q: scaled [B, H, D].
        keys, values: [B, K, L, D].
        mask: [B * K, 1, L], added to the scores.
    """
    kv_heads = keys.shape[1]
    if q.dtype is torch.bfloat16 and q.device.type == "cpu":  # whose kernel reads keys once, too
        by_row = None if mask is None else mask.unflatten(0, (-1, kv_heads))[:, :1]
        out = sdpa(q[:, :, None], keys, values, by_row, scale=1.0, enable_gqa=True)
        return out.reshape(len(q), -1)
    # The query heads of a group are as several queries: its keys are read once.
    grouped = q.reshape(len(q) * kv_heads, -1, q.shape[2])
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    if q.dtype is torch.float32:  # so few queries that a fused kernel's start costs more
        scores = grouped.bmm(keys.mT) if mask is None else torch.baddbmm(mask, grouped, keys.mT)
        out = scores.softmax(-1).bmm(values)
    else:
        by_head = None if mask is None else mask[:, None]
        out = sdpa(grouped[:, None], keys[:, None], values[:, None], by_head, scale=1.0)
    return out.reshape(len(q), -1)
