"""Models on disk: find, load and save them, adapters included."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from minigpt.data import tokenizer as tokenizers
from minigpt.data.tables import LFS
from minigpt.data.tokenizer import NEEDS_CODE
from minigpt.errors import ModelError
from minigpt.files import atomic_directory
from minigpt.model.conformance import check_kind, require_conformance
from minigpt.model.generation import generation_config
from minigpt.model.lora import (
    ADAPTER,
    BASE,
    MODEL_FILES,
    load_adapter,
    merge,
    read_config,
    saved_scaling,
)
from minigpt.model.packed_lm import PACKED
from minigpt.model.restore import CHECKPOINTS_DIR, LAST, MODEL_DIR, find_checkpoint, newest_first
from minigpt.model.rope import compute_by_text, max_positions, scale_config
from minigpt.model.score_head import TASK, has_score_head, is_reward_model, with_score_head
from minigpt.reading import (
    MEGABYTE,
    SECONDS,
    NotReadableError,
    check_directory,
    hub_problem,
    may_be_hub_id,
    read_json,
    reason_of,
    refusing,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (
    "Pickled weights (.bin, .pt) can run code when they are read, and are not: where you trust "
    "them, load them with transformers and call save_pretrained, which writes safetensors."
)
STAGES = ("pretrain", "sft", "dpo", "kto", "grpo", "lora", "reward")
BYTES_A_SECOND = 20 * MEGABYTE  # of weights that are loaded, at least
HUB_SECONDS = 3600  # of computing, for models whose size is not known before they are there
# Sizes in a config, which its weights must bear out before a model of them is built: what is built
# takes time and memory for each layer and expert, and for each width.
_DEPTHS = re.compile(r"layers?$|blocks?$|experts$|depth$|codebooks$")
_WIDTHS = re.compile(
    r"vocab_size$|hidden_size$|intermediate_size$|ffn|_dim$|^d_|^n_(embd|inner)$|_heads$|^n_head$"
)
_PROBABILITIES = re.compile(r"dropout|pdrop")
ALWAYS_ALLOWED = 1024  # layers, experts or width that any config may have
HUB_WIDEST = 1 << 20  # assumed for weights that are not downloaded yet
PACKED_VALUES = 16  # that quantized weights may hold in one number, at most


def find_model(source: str | Path) -> Path | str:
    """Return the model directory that a run directory, HF directory or hub id stands for.

    A checkpoint of a run stands for the model as it then was; see `find_checkpoint`.

    Raises:
        ModelError: when a local path holds no model, with the command that makes it.
    """
    path = Path(source)
    name = str(source)
    with refusing(f"The model at {name[:100]}", ModelError, "Check the name."):
        for candidate in (path / "hf", path):
            if (candidate / "config.json").is_file() or (candidate / ADAPTER).is_file():
                return candidate
        if (checkpoint := find_checkpoint(path)) is not None:
            return checkpoint / MODEL_DIR
        if may_be_hub_id(name):
            return name
        is_gguf = path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf")))
        is_unfinished = any((c / MODEL_DIR).is_dir() for c in newest_first(path))
    if is_gguf:
        raise ModelError(
            f"{source} is a GGUF model: only `minigpt generate` and `minigpt chat` take it here. "
            "Give the run that it was exported from."
        )
    if is_unfinished:
        raise ModelError(
            f"The run in {source} has not ended, so it has no {MODEL_DIR}/. Take the model of its "
            f"newest checkpoint: {path / CHECKPOINTS_DIR / LAST}"
        )
    if (recipe := Path("configs", "recipes", f"{path.name}.yaml")).is_file():
        remedy = f"minigpt fit --config {recipe}"
    else:
        stage = next((s for s in STAGES if path.name.startswith(s)), "pretrain")
        remedy = f"minigpt fit --config configs/{stage}.yaml"
        remedy += ", or run the whole road with: make pipeline"
    raise ModelError(f"There is no trained model in {source}. Make it with: {remedy}")


def load_model(
    source: str | Path, attention: str = PACKED, scores: bool = False
) -> PreTrainedModel:
    """Load any causal LM in fp32; an adapter directory is merged into its base.

    Args:
        source: run directory, HF directory or hub id.
        attention: `PACKED` to read batches, anything else only to continue texts. The model gets
            the attention function with which its kind is exact for that.
        scores: allow a reward model, which otherwise is refused.

    Raises:
        ModelError: when it is missing, damaged, no causal LM, or of a kind that would not be
            computed exactly.
    """
    location = find_model(source)
    if isinstance(location, Path) and (location / ADAPTER).is_file():
        base = base_of(location)
        model = load_model(base, attention, scores)
        if scores and read_config(location).get("task_type") == TASK:
            model = with_score_head(model)  # which the adapter brings
        return merge(load_adapter(model, location, base))
    with _refusing(location):
        return _load(location, attention, scores)


def _load(location: Path | str, attention: str, scores: bool) -> PreTrainedModel:
    if isinstance(location, Path):
        _check_files(location)
        _check_config(location)
    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    if isinstance(location, str):
        _check_numbers(config.to_dict(), HUB_WIDEST, 0)
    auto_class: Any = AutoModelForCausalLM
    if is_reward_model(config):
        _check_reward_model(location, config, scores)
        auto_class = AutoModelForSequenceClassification
    check_kind(config, attention == PACKED)
    loaded: object = auto_class.from_pretrained(
        location,
        dtype=torch.float32,
        attn_implementation="eager",  # which all have; the one that fits is set below
        use_safetensors=True,
        trust_remote_code=False,  # unset, transformers asks in a terminal whether to run it
        output_loading_info=True,
    )
    model, report = cast(tuple[PreTrainedModel, dict[str, set[str]]], loaded)
    if missing := sorted(report["missing_keys"]):  # transformers would leave them random
        raise NotReadableError(
            f"{len(missing)} of its weights are missing, such as {missing[0]}. Copy it again, or "
            "give a causal language model"
        )
    compute_by_text(model)
    conformance = require_conformance(model, attention == PACKED)
    model.config._attn_implementation = (
        conformance.training if attention == PACKED else conformance.decoding
    )
    _check_limits(model)
    return model


def _check_reward_model(location: Path | str, config: PreTrainedConfig, scores: bool) -> None:
    """Refuse, with a ModelError, a reward model where text is asked for, or one of more labels."""
    if not scores:
        raise ModelError(
            f"The model at {location} is a reward model: it gives answers scores and writes no "
            "text. Give it as --reward_model of `minigpt generate` or `minigpt evaluate`, and here "
            "the model that it was trained from, or another one."
        )
    if config.num_labels != 1:
        raise ModelError(
            f"The model at {location} gives sequences {config.num_labels} scores, a reward model "
            "one. Train one with: minigpt fit --config configs/reward.yaml"
        )


def _check_limits(model: PreTrainedModel) -> None:
    """Refuse impossible positions and end tokens, which no proof of conformance tries."""
    if max_positions(model.config) < 1:
        raise NotReadableError("its config allows for no positions")
    if not has_score_head(model) and model.generation_config is not None:
        ends = model.generation_config.eos_token_id
        for token in ends if isinstance(ends, list) else [ends]:
            if token is not None and not (isinstance(token, int) and abs(token) < 1 << 31):
                raise NotReadableError(f"{token!r:.40} is no id of a token that ends a reply")


def _check_config(directory: Path) -> None:
    """Refuse a config whose sizes are far above those of the weights, or whose dropout is none."""
    widest, count = 1, 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping)
                count += 1
                widest = max([widest, *weights.get_slice(name).get_shape()])
    if count:
        _check_numbers(read_json(directory / "config.json"), widest, count)


def _check_numbers(config: dict[str, Any], widest: int, count: int) -> None:
    """Refuse more layers than there are weights (`count`), widths far above the widest, and dropout
    that is no probability.
    """
    for name, value in _numbers(config):
        if _PROBABILITIES.search(name) and not 0 <= value <= 1:
            raise NotReadableError(f"its config sets {name} to {value}, which lies not in 0 to 1")
        limit = math.inf
        if _DEPTHS.search(name):
            limit = max(ALWAYS_ALLOWED, count)
        elif _WIDTHS.search(name):
            limit = PACKED_VALUES * max(ALWAYS_ALLOWED, widest)
        if value > limit:
            raise NotReadableError(f"its config sets {name} to {value}, which its weights are not")


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a JSON value with the names they stand under."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int | float):
        yield name, value


def _check_files(directory: Path) -> None:
    """Refuse, with a ModelError, a directory whose weights are not all there, or are pickled."""
    check_directory(directory)
    index = directory / INDEX
    files = {file.name: file for file in directory.glob("*.safetensors")}
    pointers = [name for name, file in files.items() if _is_pointer(file)]
    problem = None
    if not files:
        pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
        problem = f"there is no file of weights ({WEIGHTS}) in it. Copy it again."
        if pickled:
            problem = f"its weights are in {pickled[0].name}. {PICKLED}"
    elif pointers:
        problem = f"{pointers[0]} is a pointer of Git LFS, not the weights. Run: git lfs pull"
    elif WEIGHTS not in files and not index.is_file():
        problem = f"{INDEX}, which names its {len(files)} files of weights, is missing. "
        problem += "Copy it again."
    elif WEIGHTS not in files:
        needed = _named_in(index)
        if missing := sorted(needed - files.keys()):
            problem = (
                f"{len(missing)} of its {len(needed)} files of weights are missing, such as "
                f"{missing[0]}. Copy it again."
            )
    if problem:
        raise ModelError(f"The model at {directory} cannot be loaded: {problem}")


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(LFS)) == LFS


def _named_in(index: Path) -> set[str]:
    try:
        return set(read_json(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged. Copy the model again.") from error


def load_config(source: str | Path) -> PreTrainedConfig:
    """Load the config alone of what `load_model` would load; an adapter brings its base's.

    Raises:
        ModelError: as `load_model` does.
    """
    location = find_model(source)
    if isinstance(location, Path) and (location / ADAPTER).is_file():
        config = load_config(base_of(location))
        if (scaling := saved_scaling(location)) is not None:
            scale_config(config, scaling)
        return config
    with _refusing(location):
        if isinstance(location, Path):
            check_directory(location)
            _check_config(location)
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=False)
        int(loaded.get_text_config(decoder=True).vocab_size)
        max_positions(loaded)
    return loaded


@contextmanager
def _refusing(source: Path | str) -> Iterator[None]:
    """Turn transformers' errors about a model that it cannot load into a ModelError."""
    seconds: float = HUB_SECONDS
    if isinstance(source, Path):
        files = filter(Path.is_file, source.glob("*.safetensors"))
        seconds = SECONDS + sum(file.stat().st_size for file in files) / BYTES_A_SECOND
    with refusing(f"The model at {source}", ModelError, seconds=seconds):
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            problem = NEEDS_CODE if "trust_remote_code" in str(error) else ""
            if "named model.safetensors" in str(error):
                problem = f"{reason_of(error)} {PICKLED}"
            if "ignore_mismatched_sizes" in str(error):
                problem = "its config says other sizes than its weights have. Copy it again."
            if isinstance(source, str):
                problem = problem or hub_problem(error)
            if not problem:
                raise
            raise ModelError(f"The model at {source} cannot be loaded: {problem}") from error


def base_of(adapter: Path) -> Path | str:
    """Return the base model that an adapter directory was trained on.

    Raises:
        ModelError: when the adapter names no base that can be found.
    """
    base = _named_base(adapter)
    seen = [adapter.resolve()]
    ancestor = base  # an adapter's base may be another adapter
    while isinstance(ancestor, Path) and (ancestor / ADAPTER).is_file():
        if ancestor.resolve() in seen:
            raise ModelError(
                f"The adapter at {adapter} has no base: {ancestor} is named as a base of itself. "
                f"Write the model that it was trained on into its {ADAPTER}."
            )
        seen.append(ancestor.resolve())
        ancestor = _named_base(ancestor)
    return base


def _named_base(adapter: Path) -> Path | str:
    name = read_config(adapter).get("base_model_name_or_path")
    remedy = f"name it: --model BASE --adapter {adapter}."
    if not name:
        raise ModelError(f"{adapter / ADAPTER} names no base model; {remedy}")
    with refusing(f"The base of the adapter at {adapter}", ModelError):
        for start in (Path(), adapter):
            if (start / name).exists():
                return find_model(start / name)
        if (moved := _moved_base(adapter, Path(name))) is not None:
            return moved
        if Path(name).is_absolute():
            raise ModelError(
                f"The base of the adapter at {adapter} is not at {name} any more. Put it back, or "
                f"{remedy}"
            )
        return find_model(name)


def _moved_base(adapter: Path, base: Path) -> Path | None:
    """Return where a base lies that was moved in one folder with its adapter; None without it.

    The base then lies where it lay beside the adapter, such as `sft/hf` beside `lora/hf`. It is
    looked for only where the adapter has its digest, with which the weights are compared later.
    """
    if not (adapter / BASE).is_file():
        return None
    for ancestor in adapter.absolute().parents:
        for size in range(len(base.parts) - 1, 0, -1):
            candidate = ancestor.joinpath(*base.parts[-size:])
            if (candidate / "config.json").is_file():
                return candidate
    return None


def tokenizer_source(model: str | Path, base: str | Path | None = None) -> Path | str:
    """Return where a model's tokenizer lies: plain peft leaves an adapter's with the base.

    Args:
        model: run directory, HF directory, adapter directory or hub id.
        base: that an adapter is put on; by default the one that it names.
    """
    location = find_model(model)
    if not isinstance(location, Path) or (location / "tokenizer.json").is_file():
        return location
    if not (location / ADAPTER).is_file():
        return location
    return tokenizer_source(base_of(location) if base is None else base)


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
        directory: replaced when it exists; what others have put there stays.
        weights: a full state dict, where the model's own parameters are sharded.
    """
    with atomic_directory(directory, MODEL_FILES) as partial:
        if not has_score_head(model):
            model.generation_config = generation_config(model, tokenizer)
        if weights is not None:  # what is gathered no longer shares its memory: leave it out
            weights = {n: w for n, w in weights.items() if n not in model.all_tied_weights_keys}
        model.save_pretrained(partial, state_dict=weights)
        tokenizers.save(tokenizer, partial)
        _name_for_older_stacks(partial)


def _name_for_older_stacks(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["torch_dtype"] = config.get("dtype", "float32")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
