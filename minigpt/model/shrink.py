"""A tiny random model of a config: the same kinds of layers, with narrow widths.

Sizes are divided by powers of two, by what their names say they are, so that ratios between them
(query heads to key heads, hidden size to heads times their width) stay what they were.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, logging

VOCABULARY, SPECIAL = 160, 32  # ids below SPECIAL may stand for images, padding and the like
LAYERS = 8  # that are kept from the first on; then as many of kinds that come later
POSITIONS = 512
SLIDING_WINDOW = 8  # tokens; shorter than the samples that are tried
SOFTCAP = 2.0  # which the logits of a tiny model reach
PARAMETERS = 50_000_000  # a larger model is not tiny

_DEPTH = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers"
    r"|num_(encoder|decoder)_layers|num_blocks)$"
)
_HEADS = re.compile(r"heads?$|^n_groups$|mamba_n_groups|num_kv$")
_HEAD_WIDTH = re.compile(
    r"head_?dim|head_size|rotary_dim|rotary_ndims|rope_dim|lora_rank|d_head|dim_head|kv_channels"
    r"|mrope_section|d_kv"
)
_WIDTH = re.compile(
    r"hidden_size|^d_model$|^n_embd$|^dim$|emb(ed|edding)?_dim|embedding_size|intermediate|ffn|n_inner"
    r"|d_inner|d_ff|lru_width|d_ssm|_width$|attention_hidden|hidden_dim|model_dim"
)
_POSITIONS = re.compile(
    r"^(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_target_positions)$"
)
_IDS = re.compile(r"(token_ids?|token_index|_id)$")
_SHARED = re.compile(r"shared_layers$")  # the last ones, which use the keys of earlier ones
_INDICES = re.compile(r"layer.*(idx|idxs|indices|ids)$|_layers$")
_AT_MOST = (
    (re.compile(r"^(num|n|moe_num)_(local_|routed_|real_)?experts$|^zero_expert_num$"), 4),
    (re.compile(r"experts_per_tok|^moe_(top)?k$|^top_k_experts$|^router_top_?k$"), 2),
    (re.compile(r"^(n_group|topk_group|num_expert_groups?|topk_groups?)$"), 1),
    (re.compile(r"window|chunk_size|chunk_length|index_topk|block_size"), SLIDING_WINDOW),
    (re.compile(r"vocab_size|group_vocab$"), VOCABULARY),
)


def _ints(value: object) -> list[int]:
    """Return the whole numbers above 2 in a value or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 2]


def _numbers(values: dict[str, Any], names: re.Pattern[str]) -> list[int]:
    """Return the whole numbers above 2 in a config's values whose names match."""
    return [n for name, value in values.items() if names.search(name) for n in _ints(value)]


def _map(value: object, change: Callable[[int], int]) -> object:
    """Change the whole numbers above 2 in a value or a list of them."""
    if isinstance(value, list):
        return [_map(v, change) for v in value]
    return change(value) if isinstance(value, int) and _ints(value) else value


def _divisor(numbers: Iterable[int], smallest: int, limit: int) -> int:
    """Return the largest power of two up to `limit` that leaves numbers whole and not too small."""
    return next(
        (
            factor
            for factor in (2**power for power in range(limit.bit_length() - 1, 0, -1))
            if all(n % factor == 0 and n // factor >= smallest for n in numbers)
        ),
        1,
    )


def _first(values: dict[str, Any], *names: str) -> int:
    return next((values[n] for n in names if isinstance(values.get(n), int)), 0)


def _narrow(values: dict[str, Any]) -> None:
    """Divide widths and head counts in place."""
    layers = list((values.get("per_layer_config") or {}).values())
    heads = [n for level in (values, *layers) for n in _numbers(level, _HEADS)]
    widths = [n for level in (values, *layers) for n in _numbers(level, _HEAD_WIDTH)]
    count = _first(values, "num_attention_heads", "n_head", "num_heads", "decoder_attention_heads")
    hidden = _first(values, "hidden_size", "d_model", "n_embd")
    head_divisor = _divisor(heads, 2, max(1, count // 4))
    # Counts of 2 are not divided (`_ints`), such as of key heads: query heads must stay even.
    two_heads = any(_HEADS.search(name) and value == 2 for name, value in values.items())
    if two_heads and any(n // head_divisor % 2 for n in heads):
        head_divisor = 1
    if count and hidden % count == 0 and not _ints(values.get("head_dim")):
        widths.append(hidden // count)
    width_divisor = _divisor(widths, 8, 16)
    # Until the hidden size divides, so that its ratios to other sizes stay.
    while width_divisor > 1 and hidden % (8 * head_divisor * width_divisor) > 0:
        width_divisor //= 2
    divisor = head_divisor * width_divisor
    changes: tuple[tuple[re.Pattern[str], Callable[[int], int]], ...] = (
        (_HEAD_WIDTH, lambda n: n // width_divisor if n % width_divisor == 0 else n),
        (_HEADS, lambda n: n // head_divisor),
        (_WIDTH, lambda n: -(-n // divisor // 8) * 8),  # experts' matmuls go in steps of eight
    )
    for level in (values, *layers):
        for name, value in level.items():
            change = next((change for names, change in changes if names.search(name)), None)
            if change is not None:
                level[name] = _map(value, change)


def _shallow(values: dict[str, Any]) -> None:
    """Keep the first layers, and of later ones those of a kind that is not among them."""
    names = [k for k, v in values.items() if _DEPTH.match(k) and isinstance(v, int)]
    for depth in {values[name] for name in names}:
        retained = _retained_layers(values, depth)
        for name, value in values.items():
            values[name] = _of_layers(name, value, depth, retained)


def _retained_layers(values: dict[str, Any], depth: int) -> list[int]:
    """Return the numbers of the layers that the tiny model has."""
    retained = [*range(min(depth, LAYERS))]
    kinds = [
        repr([_of_layer(name, value, depth, index) for name, value in values.items()])
        for index in range(depth)
    ]
    later = [i for i in range(len(retained), depth) if kinds[i] not in kinds[:i]]
    retained += later[:LAYERS]
    if kinds[retained[-1]] != kinds[-1]:  # some families demand a certain kind of last layer
        retained.append(depth - 1)
    return retained


def _of_layer(name: str, value: object, depth: int, index: int) -> object:
    """Return what a config's value says of one layer."""
    if isinstance(value, list | str) and len(value) == depth:
        return value[index]
    if name == "per_layer_config" and isinstance(value, dict):
        return value.get(index)
    if _INDICES.search(name) and isinstance(value, list):
        return index in value
    return None


def _of_layers(name: str, value: object, depth: int, retained: list[int]) -> object:
    """Return a config's value for the layers retained of `depth`."""
    if _DEPTH.match(name) and value == depth:
        return len(retained)
    if isinstance(value, list | str) and len(value) == depth:
        layers = [value[index] for index in retained]
        return "".join(layers) if isinstance(value, str) else layers
    if name == "per_layer_config" and value:
        configs = {new: _of_layer(name, value, depth, old) for new, old in enumerate(retained)}
        return {new: layer for new, layer in configs.items() if layer is not None}
    if _INDICES.search(name) and isinstance(value, list) and all(type(v) is int for v in value):
        return [new for new, old in enumerate(retained) if old in value]
    if _SHARED.search(name) and _ints(value):
        return min(2, len(retained) // 2)
    return value


def _limit(name: str, value: object) -> object:
    """Return a smaller value of what is neither a width nor a number of layers."""
    if _IDS.search(name):
        return _map(value, lambda n: n if n < SPECIAL else n % SPECIAL)
    if "softcap" in name and value:
        return SOFTCAP
    for names, limit in _AT_MOST:
        if names.search(name):
            return _map(value, partial(min, limit))
    return value


def _shorten(values: dict[str, Any]) -> None:
    """Shorten tables of learned positions; rotary angles depend on the length itself."""
    if not (values.get("rope_parameters") or values.get("rope_scaling")):
        for name, value in values.items():
            if _POSITIONS.search(name):
                values[name] = _map(value, partial(min, POSITIONS))


def shrunk(values: dict[str, Any], narrow: bool = True) -> dict[str, Any]:
    """Return a config's values, and those of configs inside it, for a tiny model."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name.startswith("_") or name == "quantization_config":
            continue
        if name == "per_layer_config" and value:  # by number, or by text such as "05"
            out[name] = {int(index): dict(layer) for index, layer in value.items()}
            continue
        inner = isinstance(value, dict) and "model_type" in value
        out[name] = shrunk(value, narrow) if inner else _limit(name, value)
    _shallow(out)
    _shorten(out)
    if narrow:
        _narrow(out)
    return out


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' and Python's warnings, which would be about a tiny model."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def tiny_models(config: PreTrainedConfig, seed: int = 0) -> Iterator[PreTrainedModel]:
    """Yield tiny random models of a config on the CPU in fp32, the narrowest first.

    Their weights are large enough that errors show. Exceptions of the model's own code pass.
    """
    for narrow in (True, False):
        values = shrunk(config.to_dict(), narrow)
        small = type(config).from_dict(values)
        small.dtype = torch.float32
        with torch.device("meta"):
            count = sum(p.numel() for p in _built(small).parameters())
        if count <= PARAMETERS:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed)
                model = _built(small)
                _add_noise(model)
            yield model


def _built(config: PreTrainedConfig) -> PreTrainedModel:
    build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    model = build(config, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    return model


@torch.no_grad()
def _add_noise(model: PreTrainedModel) -> None:
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
