"""Export as a transformers directory or a peft adapter that older stacks load, too."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from minigpt.data.tokenizer import document_start, id_count
from minigpt.errors import ConfigError
from minigpt.export.card import Card
from minigpt.export.check import (
    Expected,
    Numbers,
    check_special_ids,
    check_texts,
    encode,
    logits_of,
    observe,
    prompt_ids,
    prompts,
    render,
    require,
)
from minigpt.files import atomic_directory, write_json, write_manifest
from minigpt.infer.engine import Engine
from minigpt.model.architecture import embedding_rows
from minigpt.model.lora import ADAPTER, merge, save_adapter
from minigpt.model.pretrained import base_of, find_model, save_model
from minigpt.model.rope import max_positions
from minigpt.reading import NotReadableError, refusing

SAME_WEIGHTS_LIMIT = 1e-5  # of the logits' differences, in fp32
MERGED_WEIGHTS_LIMIT = 1e-3  # of an adapter's W x + B A x against the merged (W + B A) x
# A tag as Jinja reads it in transformers, with the white space that it swallows.
GENERATION_TAG = re.compile(
    r"(?:\s*\{%-|^[ \t]*\{%|\{%\+?)\s*(?:end)?generation\s*(?:-%\}\s*|\+%\}|%\}\n?)", re.MULTILINE
)


def use_plain_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Take the ``{% generation %}`` marks, which only transformers knows, out of the template.

    Raises:
        ConfigError: when chats would be rendered otherwise without them.
    """
    if not tokenizer.chat_template:
        return
    with refusing("The chat template", ConfigError, verb="cannot be exported"):
        before = prompts(tokenizer)
        tokenizer.chat_template = GENERATION_TAG.sub("", tokenizer.get_chat_template())
        if prompts(tokenizer) != before:
            raise NotReadableError(
                "without its {% generation %} marks it renders chats otherwise. Put the marks "
                "around the assistant's text alone"
            )


def export_hf(
    model: str,
    directory: Path,
    card: Card,
    adapter: str | None = None,
    keep_adapter: bool = False,
    base_name: str | None = None,
) -> Numbers:
    """Write a transformers directory, or a peft adapter; check it and return the numbers.

    Args:
        model: run directory, HF directory or hub id; an adapter directory brings its base.
        directory: appears whole once it has passed its check.
        card: writes the model card.
        adapter: LoRA directory to put on the model.
        keep_adapter: export the adapter alone instead of the merged model.
        base_name: written into the adapter as its base's name.

    Raises:
        ConfigError: when there is no adapter to keep, or another process writes the directory.
        ModelError: when the export does not do what the model does; nothing is kept.
    """
    with atomic_directory(directory) as partial:  # from the start, so that no other export begins
        engine = Engine.load(model, adapter, merged=False, device="cpu")
        base = base_of_adapter(engine, model, adapter) if keep_adapter else None
        expected = observe(engine)
        use_plain_template(engine.tokenizer)
        limit = SAME_WEIGHTS_LIMIT
        if base is not None and engine.adapter is not None:
            save_adapter(engine.adapter, engine.tokenizer, partial)
            if base_name:
                config = json.loads((partial / ADAPTER).read_text())
                write_json(partial / ADAPTER, config | {"base_model_name_or_path": base_name})
        else:
            if engine.adapter is not None:
                engine.model = merge(engine.adapter)
                limit = MERGED_WEIGHTS_LIMIT
            save_model(engine.model, engine.tokenizer, partial)
        write_tokenizer_config(partial, engine)
        del engine  # before it is loaded a second time
        numbers = check_directory(expected, partial, limit, base)
        card.write(partial, numbers, base=base_name or base)
        write_manifest(partial)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors are written for their owner only
    return numbers


def base_of_adapter(engine: Engine, model: str, adapter: str | None) -> str:
    """Return the base of an adapter that is to be exported alone.

    Raises:
        ConfigError: when there is none, or its base's positions were scaled with it.
    """
    if engine.adapter is None:
        raise ConfigError(f"{model} has no adapter to keep. Give --adapter, or a LoRA run.")
    base = str(find_model(model) if adapter else base_of(Path(find_model(model))))
    if getattr(engine.adapter.get_base_model(), "rope_scaling", None) is not None:
        raise ConfigError(
            "The adapter cannot be kept apart: it was trained with rope_scaling, and its base "
            f"{base} without. Export the merged model instead."
        )
    return base


def write_tokenizer_config(directory: Path, engine: Engine) -> None:
    """Write the tokenizer's config as transformers 4, and what is built on it, reads it."""
    file = directory / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config = {k: v for k, v in config.items() if k not in ("backend", "is_local")}
    if isinstance(config.get("extra_special_tokens"), list):  # on which transformers 4 fails
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if (positions := max_positions(engine.model.config)) < sys.maxsize:
        config["model_max_length"] = min(config.get("model_max_length", positions), positions)
    if engine.tokenizer.chat_template:  # beside the file that newer stacks read
        config["chat_template"] = engine.tokenizer.chat_template
    write_json(file, config)


def check_directory(
    expected: Expected, directory: Path, limit: float, base: str | None = None
) -> Numbers:
    """Load an export as a user would, with plain transformers and peft, and compare."""
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(directory))
    numbers = check_texts(
        expected,
        lambda texts: encode(tokenizer, texts),
        lambda chat: render(tokenizer, chat),
        lambda chat: prompt_ids(tokenizer, chat),
    )
    ends = GenerationConfig.from_pretrained(directory).eos_token_id
    numbers |= check_special_ids(expected, document_start(tokenizer), ends)
    loaded: Any = AutoModelForCausalLM.from_pretrained(base or directory, dtype=torch.float32)
    if base is not None:
        if id_count(tokenizer) > embedding_rows(loaded):
            loaded.resize_token_embeddings(id_count(tokenizer))  # as the card says
        loaded = PeftModel.from_pretrained(loaded, str(directory))
    differences = [logits_of(loaded.eval(), p, r) - logits for p, r, logits in expected.cases]
    largest = max(float(difference.abs().max()) for difference in differences)
    numbers |= {"max_logit_difference": largest, "limit": limit}
    require(numbers, "logits differ", largest <= limit)
    return numbers
