"""Build, load and save models: native ones, and any causal LM of transformers."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minigpt.data.tokenizer import END_OF_TEXT, TURN_END
from minigpt.errors import ModelError
from minigpt.model.attention import PACKED

log = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
STAGES = ("pretrain", "sft", "dpo", "lora")


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


def build_native(a: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build a native model with random weights for a tokenizer's vocabulary."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=a.hidden_size,
        intermediate_size=a.ffn,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.head_dim,
        max_position_embeddings=a.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta},
        tie_word_embeddings=a.tied,
        attention_dropout=a.dropout,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model: PreTrainedModel = Qwen3ForCausalLM(config)
    with torch.no_grad():  # residual outputs start small, so depth does not grow the stream
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * a.layers) ** -0.5)
    return model


def find_model(place: str | Path) -> Path | str:
    """Return the model directory that a run directory, HF directory or hub id stands for.

    Raises:
        ModelError: when a local path holds no model, with the command that makes it.
    """
    path = Path(place)
    for candidate in (path / "hf", path):
        if (candidate / "config.json").is_file() or (candidate / ADAPTER).is_file():
            return candidate
    is_hub_id = str(place).count("/") <= 1 and not path.exists() and not str(place).startswith(".")
    if is_hub_id and path.parent.name != "outputs":
        return str(place)
    stage = next((s for s in STAGES if path.name.startswith(s)), "pretrain")
    raise ModelError(
        f"There is no trained model in {place}. Make it with: "
        f"minigpt fit --config configs/{stage}.yaml, or run the whole road with: make pipeline"
    )


def load_model(place: str | Path, attention: str = PACKED) -> PreTrainedModel:
    """Load any causal LM in fp32; an adapter directory is merged into its base.

    Raises:
        ModelError: when it is missing, damaged, or no causal LM.
    """
    found = find_model(place)
    if isinstance(found, Path) and (found / ADAPTER).is_file():
        from minigpt.model.lora import load_adapter, merge

        return merge(load_adapter(load_model(base_of(found), attention), found))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            found,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"The model at {found} cannot be loaded: {first}") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers would leave them random
        raise ModelError(
            f"The model at {found} cannot be loaded: {len(missing)} of its weights are missing, "
            f"such as {missing[0]}. Copy it again, or give a causal language model."
        )
    return model


def base_of(adapter: Path) -> Path | str:
    """Return the base model that an adapter directory was trained on.

    Raises:
        ModelError: when the adapter names no base that can be found.
    """
    try:
        name = json.loads((adapter / ADAPTER).read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{adapter / ADAPTER} is damaged: it is no JSON object.") from error
    if not name:
        raise ModelError(f"{adapter / ADAPTER} names no base model; give it with --model_path.")
    for start in (Path(), adapter):
        if (start / name).exists():
            return find_model(start / name)
    return find_model(name)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many token ids the model can embed."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Grow the embeddings to hold the tokens that the chat template added.

    The new rows are the same each time: an adapter is read beside those it was trained with.
    """
    rows = embedding_rows(model)
    if rows < len(tokenizer):
        log.warning("The embeddings grow from %d to %d tokens.", rows, len(tokenizer))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rows)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Compute activations twice instead of keeping them, also below a frozen embedding."""
    new_name = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.2x
    (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.enable_input_require_grads()


def check_vocabulary(model: PreTrainedModel, tokens: int) -> None:
    """Refuse a tokenizer whose ids the model cannot embed.

    Args:
        model: may have more rows than the tokenizer has tokens (padding), never fewer.
        tokens: of the tokenizer, before any were added for the chat template.

    Raises:
        ModelError: when the tokenizer has more tokens than the model has rows.
    """
    rows = embedding_rows(model)
    if tokens > rows:
        raise ModelError(
            f"The tokenizer has {tokens} tokens but the model only {rows}: they do not "
            "belong together. Use the tokenizer that was saved with the model."
        )


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return the config by which any engine knows when an answer ends."""
    backend = tokenizer.backend_tokenizer
    ends = [backend.token_to_id(text) for text in (TURN_END, END_OF_TEXT)]
    stop = {tokenizer.eos_token_id, *ends} - {None}
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        eos_token_id=sorted(stop), pad_token_id=min(stop) if pad is None else pad
    )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an HF directory that loads everywhere; it appears whole or not at all.

    Args:
        model: what to save; its config is written with the names older stacks read.
        tokenizer: saved beside it, with its chat template.
        directory: replaced when it exists.
        weights: a full state dict, where the model's own parameters are sharded.
    """
    with whole_directory(directory) as partial:
        model.generation_config = generation_config(tokenizer)
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        _name_for_older_stacks(partial)


def _name_for_older_stacks(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["torch_dtype"] = config.get("dtype", "float32")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    name_tokenizer_class(directory)


def name_tokenizer_class(directory: Path) -> None:
    """Name the tokenizer class that transformers 4 and 5 both know."""
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


class whole_directory:  # noqa: N801  (used like a function)
    """Context manager: fill a directory beside its place, then put it there in one rename."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> Path:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.directory.name}-"
        self.partial = Path(tempfile.mkdtemp(prefix=prefix, dir=self.directory.parent))
        self.partial.chmod(0o755)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            old = self.partial.with_name(self.partial.name + "-old")
            if self.directory.exists():
                self.directory.rename(old)
            self.partial.rename(self.directory)
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (all, trainable) parameters; tied ones count once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
