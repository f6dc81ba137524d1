"""Export as a transformers directory or a peft adapter that older stacks load, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minigpt.errors import ConfigError
from minigpt.export.card import Card
from minigpt.export.check import (
    Expected,
    Numbers,
    check_logits,
    check_tokenizer,
    observe,
)
from minigpt.export.place import use_plain_template
from minigpt.files import whole_directory, write_json
from minigpt.infer.engine import Engine
from minigpt.model.lora import merge, save_adapter
from minigpt.model.saved import ADAPTER, base_of, find_model, save_model

SAME = 1e-5  # the same weights
MERGED = 1e-3  # W x + B A x against (W + B A) x, in fp32


def export_hf(
    model: str,
    directory: Path,
    card: Card,
    adapter: str | None = None,
    keep_adapter: bool = False,
    base_name: str | None = None,
) -> Numbers:
    """Write a transformers directory, or with `keep_adapter` a peft adapter; check it.

    Args:
        model: run directory, HF directory or hub id; an adapter directory brings its base.
        directory: appears whole once it has passed its check.
        card: of the model.
        adapter: LoRA directory to put on the model.
        keep_adapter: export the adapter alone instead of the merged model.
        base_name: written into the adapter as its base's name.

    Returns:
        The numbers of the parity check.

    Raises:
        ConfigError: for a `keep_adapter` that cannot be.
        ModelError: when the export does not do what the model does; nothing is kept.
    """
    engine = Engine.load(model, adapter, merged=False)
    base = adapter_base(engine, model, adapter) if keep_adapter else None
    expected = observe(engine)
    use_plain_template(engine.tokenizer)
    merged = engine.adapter is not None and not keep_adapter
    with whole_directory(directory) as partial:
        if base is not None:
            save_alone(engine, partial, base_name)
        else:
            whole = engine.model if engine.adapter is None else merge(engine.adapter)
            save_model(whole, engine.tokenizer, partial)
            del whole
        name_for_older_stacks(partial, engine)
        del engine  # before it is loaded a second time
        numbers = check_directory(expected, partial, MERGED if merged else SAME, base)
        card.write(partial, numbers, base_name or base)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors are written for their owner only
    return numbers


def adapter_base(engine: Engine, model: str, adapter: str | None) -> str:
    """Return the base of an adapter that is exported alone.

    Raises:
        ConfigError: without an adapter, or when its base lacks tokens that it was trained with.
    """
    found = find_model(model)
    if engine.adapter is None:
        raise ConfigError(f"{model} has no adapter to keep. Give --adapter, or a LoRA run.")
    base = str(found if adapter else base_of(Path(found)))
    rows = AutoConfig.from_pretrained(base).vocab_size
    if rows < len(engine.tokenizer):
        raise ConfigError(
            f"The adapter cannot be kept apart: it was trained with {len(engine.tokenizer)} "
            f"tokens, and its base {base} has {rows}. Export the merged model instead."
        )
    return base


def save_alone(engine: Engine, directory: Path, base_name: str | None) -> None:
    """Write the adapter, under its base's public name if one is given."""
    assert engine.adapter is not None
    save_adapter(engine.adapter, engine.tokenizer, directory)
    if base_name:
        file = directory / ADAPTER
        write_json(file, json.loads(file.read_text()) | {"base_model_name_or_path": base_name})


def name_for_older_stacks(directory: Path, engine: Engine) -> None:
    """Write the tokenizer's config as transformers 4, and what is built on it, reads it."""
    file = directory / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 fails on a list
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    positions = getattr(engine.model.config, "max_position_embeddings", None)
    if positions and config.get("model_max_length", 0) > positions:
        config["model_max_length"] = positions
    if engine.tokenizer.chat_template:  # beside the file that newer stacks read
        config["chat_template"] = engine.tokenizer.chat_template
    write_json(file, config)


def check_directory(
    expected: Expected, directory: Path, limit: float, base: str | None = None
) -> Numbers:
    """Load an export as a user would, with plain transformers and peft, and compare."""
    numbers = check_tokenizer(expected, AutoTokenizer.from_pretrained(directory))
    loaded: Any = AutoModelForCausalLM.from_pretrained(base or directory, dtype=torch.float32)
    if base is not None:
        loaded = PeftModel.from_pretrained(loaded, str(directory))
    return numbers | check_logits(expected, loaded.eval(), limit)
