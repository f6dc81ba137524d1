"""LoRA adapters through peft: add, load, merge, save."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ConfigError, ModelError
from minigpt.files import weights_digest, whole_directory, write_json
from minigpt.model.build import fit_vocabulary

log = logging.getLogger(__name__)

BASE = "base.json"  # beside an adapter: the digest of the weights it was trained on


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter (Hu et al. 2021, arXiv:2106.09685): W + alpha/r · B A.

    Args:
        r: rank of the update.
        alpha: scale of the update, divided by r.
        dropout: on the adapter's input.
        target_modules: names of layers; by default all linear layers except the head.
    """

    r: int = 8
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1:
            raise ConfigError(
                f"lora.r and lora.alpha must be at least 1, but are {self.r} and {self.alpha}."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must lie in [0, 1), but is {self.dropout}.")


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the last names of all linear layers (Conv1D too), the head excluded."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | Conv1D) and layer is not head
        }
    )


def add_adapter(model: PreTrainedModel, options: Lora, base: str) -> PeftModel:
    """Freeze a model and put a fresh adapter on it.

    Args:
        model: changed in place; its linear layers become LoRA layers.
        options: rank, scale, dropout, targets.
        base: written into the adapter as the model it belongs to.

    Raises:
        ConfigError: for unknown target modules, or the head and embedding as targets
            (merging would change the tied weight, and the logits with it).
    """
    known = linear_layers(model)
    targets = options.target_modules or known
    if unknown := sorted(set(targets) - set(known)):
        raise ConfigError(
            f"LoRA cannot be put on {', '.join(unknown)}: it goes on linear layers other than "
            f"the head and the embedding. This model has: {', '.join(known)}."
        )
    model.config._name_or_path = base
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.base_digest = weights_digest(Path(base)) if Path(base).is_dir() else None
    return adapted  # type: ignore[no-any-return]


def load_adapter(model: PreTrainedModel, directory: Path, base: Path | str) -> PeftModel:
    """Put a saved adapter on a model, whose vocabulary grows as it grew in training.

    Args:
        model: changed in place.
        directory: the adapter's.
        base: where the model came from.

    Raises:
        ModelError: when the adapter is missing, damaged, or was trained on another base.
    """
    try:
        _check_fit(model, directory)
        trained_on = _check_base(directory, base)
        if (directory / "tokenizer.json").is_file():
            fit_vocabulary(model, tokenizers.load(directory))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted: Any = PeftModel.from_pretrained(model, str(directory))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UserWarning) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"The adapter at {directory} cannot be loaded: {first}") from error
    adapted.base_digest = trained_on
    return adapted  # type: ignore[no-any-return]


def _check_base(directory: Path, base: Path | str) -> str | None:
    """Return the digest that an adapter keeps of its base; None for plain peft's and hub ids."""
    if not (directory / BASE).is_file():
        return None
    known: str = json.loads((directory / BASE).read_text())["weights"]
    if Path(base).is_dir() and (now := weights_digest(Path(base))) != known:
        raise ModelError(
            f"The adapter at {directory} was trained on other weights than those in {base} (digest "
            f"{known}, now {now}): the base was trained again, or is another one. Train the "
            "adapter again, or put its base back."
        )
    return known


def _check_fit(model: PreTrainedModel, directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(
            f"There is no adapter in {directory}: adapter_model.safetensors is missing. "
            "Give the run directory of a LoRA stage or its hf/ folder."
        )
    layers = dict(model.named_modules())
    with safe_open(file, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118  (safe_open is no dict)
            name = key.removeprefix("base_model.model.").split(".lora_")[0]
            shape = weights.get_slice(key).get_shape()
            weight = getattr(layers.get(name), "weight", None)
            if weight is None or not set(shape) & set(weight.shape):
                raise ModelError(
                    f"The adapter at {directory} was trained on another base: its {name} has "
                    f"shape {tuple(shape)}, and the model has "
                    f"{'no such layer' if weight is None else tuple(weight.shape)}. "
                    "Load it on the model named in its adapter_config.json."
                )


def merge(adapted: PeftModel) -> PreTrainedModel:
    """Return the base model with the adapter's update added to its weights."""
    with_adapter: Any = adapted
    merged: PreTrainedModel = with_adapter.merge_and_unload()
    return merged.requires_grad_(True)  # peft froze it, and the next stage may train it


def save_adapter(
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter directory that plain peft loads; whole or not at all."""
    if weights is not None:
        weights = {f"base_model.model.{name}": value for name, value in weights.items()}
    with whole_directory(directory) as partial:
        adapted.save_pretrained(str(partial), state_dict=weights, save_embedding_layers=False)
        tokenizers.save(tokenizer, partial)
        if known := getattr(adapted, "base_digest", None):
            write_json(partial / BASE, {"weights": known})
        (partial / "README.md").unlink(missing_ok=True)  # peft's empty model card
