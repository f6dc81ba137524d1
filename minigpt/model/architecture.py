"""Build native models, and fit any model and its tokenizer to each other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ConfigError, ModelError
from minigpt.model.rope import rope_parameters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """Sizes of a native model (Qwen3: RMSNorm, QK-norm, RoPE, GQA, SwiGLU).

    Args:
        hidden_size: width of the residual stream.
        layers: decoder layers.
        heads: query heads; `kv_heads`: key and value heads.
        head_dim: width of a head.
        ffn: width of the SwiGLU layer.
        max_positions: longest sequence that the model is said to support.
        rope_theta: base of the rotary frequencies.
        tied: share the embedding and the head.
        dropout: of attention weights.
    """

    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 704
    max_positions: int = 4096
    rope_theta: float = 10000.0
    tied: bool = True
    dropout: float = 0.0


SIZES = {  # the names of an `Architecture`'s fields in a config; `rope_theta` is nested there
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "dropout": "attention_dropout",
}


def check_architecture(a: Architecture) -> None:
    """Refuse sizes of which no native model can be built.

    Raises:
        ConfigError: for the first size that is wrong.
    """
    name = "model.init_args.architecture"
    for size in ("hidden_size", "layers", "heads", "kv_heads", "head_dim", "ffn", "max_positions"):
        if (value := getattr(a, size)) < 1:
            raise ConfigError(f"{name}.{size} must be at least 1, but is {value}.")
    if a.heads % a.kv_heads:
        raise ConfigError(
            f"{name}.heads is {a.heads} and kv_heads {a.kv_heads}: as many query heads share each "
            "key and value head, so heads must be a multiple of kv_heads."
        )
    if a.head_dim % 2:
        raise ConfigError(
            f"{name}.head_dim is {a.head_dim}, but rotary positions turn pairs: make it even."
        )


def native_config(a: Architecture, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Return the config of a native model for a tokenizer's vocabulary.

    Raises:
        ConfigError: for sizes that do not go together.
    """
    check_architecture(a)
    return Qwen3Config(
        **{key: getattr(a, name) for name, key in SIZES.items()},
        vocab_size=tokenizers.id_count(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def check_sizes(a: Architecture, config: PreTrainedConfig) -> None:
    """Refuse sizes beside `init_from` that are not those of its model.

    Args:
        a: as given; sizes at their default are not compared.
        config: of the model that is loaded.

    Raises:
        ConfigError: with the settings that would have no effect.
    """
    sizes = {name: getattr(config, key, None) for name, key in SIZES.items()}
    sizes["rope_theta"] = rope_parameters(config).get("rope_theta")
    ignored = []
    for name, size in sizes.items():
        requested = getattr(a, name)
        if requested not in (getattr(Architecture(), name), size):
            ignored.append(f"{name} {requested} (the model has {size})")
    if ignored:
        raise ConfigError(
            "model.init_args.architecture has no effect beside init_from, whose model has sizes of "
            f"its own: {', '.join(ignored)}. Leave the sizes out, or leave init_from out and give "
            "a tokenizer to start from random weights."
        )


def build_native(a: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build a native model with random weights for a tokenizer's vocabulary."""
    model: PreTrainedModel = Qwen3ForCausalLM(native_config(a, tokenizer))
    with torch.no_grad():  # residual outputs start small, so depth does not grow the stream
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * a.layers) ** -0.5)
    return model


@contextmanager
def reproducible_init(seed: int) -> Iterator[None]:
    """Initialise weights inside to the same numbers on all hardware and in all processes.

    A GPU draws other numbers than a CPU from one seed, and bf16 others than fp32. So weights are
    drawn by the CPU's generator, in fp32, whatever the default device and type are outside; the
    strategy moves and converts them afterwards.

    Args:
        seed: of the generators, from here on.
    """
    dtype = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many token ids the model can embed."""
    return len(cast(nn.Embedding, model.get_input_embeddings()).weight)


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Grow the embeddings to hold the tokens that the chat template added."""
    rows, ids = embedding_rows(model), tokenizers.id_count(tokenizer)
    if rows < ids:
        log.warning("The embeddings grow from %d to %d tokens.", rows, ids)
        resize_vocabulary(model, ids)


@torch.no_grad()
def resize_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give a model's embedding and head another number of rows.

    New rows are the same on every device and after every seed: an adapter may be computed beside
    them elsewhere than it was trained, and processes must start alike.

    Args:
        model: changed in place; `resized` tells `save_adapter` that the rows are not its base's.
        rows: of the embedding.
    """
    before = embedding_rows(model)
    if rows == before:
        return
    with torch.random.fork_rng(devices=[]):  # the rows that it draws are overwritten below
        model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator("cpu").manual_seed(before)
    std = float(getattr(model.config, "initializer_range", None) or 0.02)
    head = cast(nn.Linear | None, model.get_output_embeddings())
    weights = [cast(nn.Embedding, model.get_input_embeddings()).weight]
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    for weight in weights:
        shape = (max(0, rows - before), weight.shape[1])
        new = torch.empty(shape, dtype=torch.float32, device="cpu")
        weight[before:] = new.normal_(0.0, std, generator=generator).to(weight)
    if head is not None and head.bias is not None:
        head.bias[before:] = 0
    model.resized = True  # type: ignore[assignment]


def check_same_tokens(tokenizer: PreTrainedTokenizerFast, model: Path | str) -> None:
    """Refuse a tokenizer whose ids mean other tokens than those the model was trained with.

    Args:
        tokenizer: the one named in the config.
        model: the model's directory; without a tokenizer in it there is nothing to compare.

    Raises:
        ModelError: when the vocabularies differ.
    """
    if not isinstance(model, Path) or not (model / "tokenizer.json").is_file():
        return
    saved = tokenizers.load(model)
    if tokenizer.get_vocab() != saved.get_vocab():
        raise ModelError(
            f"The tokenizer given has {len(tokenizer)} tokens, the model's own {len(saved)}, and "
            "they are not the same ones. Leave the tokenizer out: it travels with the model."
        )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Compute activations twice instead of keeping them, also below a frozen embedding."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # named so in 5.2x
    if enable is None:
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


def disable_dropout(model: nn.Module) -> None:
    """Let training drop nothing, neither by layers of dropout nor by functions that take a rate."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_vocabulary(rows: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that is another model's.

    Args:
        rows: of the model's embedding. There may be more than the tokenizer has tokens (padding),
            but no fewer than its vocabulary. Added tokens may lie beyond: `check_ids` refuses texts
            that hold them.
        tokenizer: to be used with it.

    Raises:
        ModelError: when the vocabulary has more tokens than the model has rows.
    """
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    tokens = max(vocabulary.values(), default=-1) + 1
    if tokens > rows:
        raise ModelError(
            f"The tokenizer has {tokens} tokens but the model only {rows}: they do not "
            "belong together. Use the tokenizer that was saved with the model."
        )


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the type of a model's parameters, as transformers' ``from_pretrained`` does.

    Buffers stay: rotary frequencies in bf16 turn position 512 by 0.2 rad too much or too little.

    Args:
        module: changed in place; layers that transformers holds in fp32 stay so.
        dtype: of the other parameters.
    """
    fp32: Sequence[str] = tuple(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and not any(layer in name for layer in fp32):
            weight.data = weight.data.to(dtype)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (all, trainable) parameters; tied ones count once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)
