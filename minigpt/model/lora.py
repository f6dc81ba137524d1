"""LoRA adapters through peft: add, load, merge, save."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ConfigError, ModelError
from minigpt.files import atomic_directory, weights_digest, write_json
from minigpt.model.architecture import embedding_rows, resize_vocabulary
from minigpt.model.generation import generation_config
from minigpt.model.rope import RopeScaling, scale_rope
from minigpt.model.score_head import TASK, has_score_head
from minigpt.reading import NotReadableError, check_directory, read_json, reason_of, refusing

log = logging.getLogger(__name__)

SCALING = "rope_scaling.json"  # beside an adapter: how its base's positions are scaled
BASE = "base.json"  # beside an adapter: the digest of the weights it was trained on
# Names of what models and adapters are saved as, by us and by transformers and peft.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    BASE,
    SCALING,
)
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CAUSAL_LM = "CAUSAL_LM"  # the task type in adapters' configs
# Settings of peft by which an adapter is more than an update of the base's weights.
UNSUPPORTED = ("layer_replication", "alora_invocation_tokens")
# Subclasses of nn.Linear that compute more than x Wᵀ + b, and those whose layers choose experts.
NOT_PLAIN_LINEAR = re.compile(r"Router$|GroupedLinear$")
ROUTER = re.compile(r"Router|MoE\w*Gate$")
# Layers of a Mamba block whose weights go into its fused kernels.
READ_BY_KERNELS = ("x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter (Hu et al. 2021, arXiv:2106.09685): W + alpha/r · B A.

    Args:
        r: rank of the update.
        alpha: scale of the update, divided by r.
        dropout: on the adapter's input.
        target_modules: last names of linear layers; by default those of `default_targets`.
        rslora: scale by alpha / sqrt(r), so that high ranks learn as fast (Kalajdzievski 2023,
            arXiv:2312.03732).
        dora: learn the length of each of W's rows apart (Liu et al. 2024, arXiv:2402.09353).
    """

    r: int = 8
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1:
            raise ConfigError(
                f"lora.r and lora.alpha must be at least 1, but are {self.r} and {self.alpha}."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must lie in [0, 1), but is {self.dropout}.")


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the last names of the linear layers (Conv1D too) that LoRA can be put on.

    The head is none of them, nor is a name that a layer of another kind bears, too, for peft finds
    layers by their last names.
    """
    head = getattr(model, "score", None) or model.get_output_embeddings()
    linear: set[str] = set()
    others: set[str] = set()
    for path, layer in model.named_modules():
        plain = not NOT_PLAIN_LINEAR.search(type(layer).__name__)
        fits = isinstance(layer, nn.Linear | Conv1D) and layer is not head and plain
        names = linear if fits else others
        names.add(path.rpartition(".")[2])
    return sorted(linear - others)


def default_targets(model: PreTrainedModel) -> list[str]:
    """Return the last names of the layers that LoRA is put on where none are chosen.

    They are the linear ones but for those of routers, those whose weights Mamba's kernels read
    past an adapter, and names that peft takes for the stacked experts of a mixture.
    """
    excluded = set()
    for path, layer in model.named_modules():
        parent, _, name = path.rpartition(".")
        block = model.get_submodule(parent)
        in_router = ROUTER.search(type(block).__name__)
        in_mamba = hasattr(block, "A_log") and hasattr(block, "D")
        if isinstance(layer, nn.Linear) and (in_router or (in_mamba and name in READ_BY_KERNELS)):
            excluded.add(name)
    names = set(linear_layers(model)) - excluded
    config = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(config, model, conversions=None)
    return sorted(names & set(config.target_modules or ()))


def add_adapter(model: PreTrainedModel, options: Lora, base: str) -> PeftModel:
    """Freeze a model and put a fresh adapter on it.

    Args:
        model: changed in place; its linear layers become LoRA layers.
        options: rank, scale, dropout, targets.
        base: written into the adapter as the model it belongs to.

    Raises:
        ConfigError: for unknown target modules, for the head and embedding as targets
            (merging would change the tied weight, and the logits with it), and for what peft
            cannot put on this kind of model.
    """
    defaults = default_targets(model)
    if options.target_modules is not None:
        _check_targets(model, options.target_modules)
    model.config._name_or_path = base
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        target_modules=options.target_modules or defaults,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        task_type=TASK if has_score_head(model) else CAUSAL_LM,  # peft trains the score head, too
    )
    adapted = _new_adapter(model, config, defaults)
    adapted.peft_config["default"].base_model_name_or_path = base
    digest = weights_digest(Path(base)) if Path(base).is_dir() else None
    adapted.base_digest = digest  # type: ignore[assignment]
    return adapted


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    layers = linear_layers(model)
    if unknown := sorted(set(targets) - set(layers)):
        raise ConfigError(
            f"LoRA cannot be put on {', '.join(unknown)}: it goes on plain linear layers other "
            f"than the head and the embedding. This model has: {', '.join(layers)}."
        )


def _new_adapter(model: PreTrainedModel, config: LoraConfig, defaults: Sequence[str]) -> PeftModel:
    names = ", ".join(sorted(config.target_modules or ()))
    try:
        return cast(PeftModel, get_peft_model(model, config))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"LoRA cannot be put on {names or 'any layer'} of a {model.config.model_type} model: "
            f"{reason_of(error)}. Choose lora.target_modules from those it is put on by default "
            f"({', '.join(defaults)}), or, to adapt stacked experts, set lora.dropout to 0 and "
            "leave out lora.dora."
        ) from error


def load_adapter(model: PreTrainedModel, directory: Path, base: Path | str) -> PeftModel:
    """Put a saved adapter of any of LoRA's kinds on a model, as plain peft does.

    Args:
        model: changed in place; its vocabulary grows to that of the adapter.
        directory: the adapter's.
        base: where the model came from.

    Raises:
        ModelError: when the adapter is missing, damaged, of another kind than LoRA, or was
            trained on another base.
    """
    if not (directory / ADAPTER).is_file():
        raise _missing(directory, ADAPTER)
    with refusing(f"The adapter at {directory}", ModelError):
        check_directory(directory)
        _check_adapter(directory, TASK if has_score_head(model) else CAUSAL_LM)
        base_digest = _check_base(directory, base)
        _resize_embedding(model, directory, base)
        _check_ranks(directory)
        if (scaling := saved_scaling(directory)) is not None:
            scale_rope(model, scaling)
        adapted = _saved_adapter(model, directory)
    adapted.base_digest = base_digest  # type: ignore[assignment]
    return adapted


def _saved_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied layers, which `merge` sees to
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted: PeftModel = PeftModel.from_pretrained(model, str(directory))
            names = getattr(model, "_checkpoint_conversion_mapping", None)
            loaded = adapted.load_adapter(str(directory), "default", key_mapping=names)
    except (RuntimeError, ValueError) as error:
        lines = map(str.strip, str(error).splitlines())
        mismatch = next((line for line in lines if "size mismatch for" in line), None)
        if mismatch is None:
            raise
        raise _wrong_base(directory, mismatch.rstrip(".")) from error
    if extra := sorted(loaded.unexpected_keys):  # which peft passes over
        raise _wrong_base(directory, f"the model has no layer for its {extra[0]}")
    return adapted


def _check_ranks(directory: Path) -> None:
    """Refuse ranks that no matrix of the adapter has, for which peft would take the memory."""
    with safe_open(directory / WEIGHTS, "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    largest = max((size for shape in shapes for size in shape), default=0)
    config = read_config(directory)
    for rank in (config.get("r", 0), *(config.get("rank_pattern") or {}).values()):
        if not 0 <= rank <= largest:
            raise NotReadableError(f"its {ADAPTER} says that its rank is {rank}")


def _wrong_base(directory: Path, problem: str) -> ModelError:
    return ModelError(
        f"The adapter at {directory} was trained on another base: {problem}. Load it on the model "
        f"named in its {ADAPTER}."
    )


def _check_adapter(directory: Path, right_task: str) -> None:
    """Refuse adapters that are no plain LoRA, are for another task, or have no safe weights."""
    config = read_config(directory)
    kind = config.get("peft_type")
    task = config.get("task_type")
    problem = None
    if kind != "LORA":
        problem = f"of the kind {kind}"
    elif task not in (None, right_task):
        problem = f"made for the task {task}"
    elif setting := next((name for name in UNSUPPORTED if config.get(name)), None):
        problem = f"made with {setting}"
    if problem:
        raise ModelError(
            f"The adapter at {directory} is {problem}. MiniGPT takes LoRA adapters of causal "
            "language models, with rsLoRA and DoRA, and of reward models where one is asked for. "
            "Merge it with peft (merge_and_unload) where it can be, and give the merged model."
        )
    if (directory / WEIGHTS).is_file():
        return
    if (directory / "adapter_model.bin").is_file():
        raise ModelError(
            f"The adapter at {directory} is pickled (adapter_model.bin), which can run code when "
            "it is read. Save it again as safetensors: load it with peft and call save_pretrained."
        )
    raise _missing(directory, WEIGHTS)


def _missing(directory: Path, name: str) -> ModelError:
    return ModelError(
        f"There is no adapter in {directory}: {name} is missing. Give the run directory of a LoRA "
        "stage or its hf/ folder."
    )


def read_config(directory: Path) -> dict[str, Any]:
    """Return an adapter's config.

    Raises:
        ModelError: when it is damaged.
    """
    with refusing(str(directory / ADAPTER), ModelError, "Copy it again.", verb="is damaged"):
        return read_json(directory / ADAPTER)


def saved_scaling(directory: Path) -> RopeScaling | None:
    """Return how the positions of an adapter's base are scaled; None where they are its own."""
    file = directory / SCALING
    if not file.exists():
        return None
    with refusing(str(file), ModelError, "Copy it again.", verb="is damaged"):
        return RopeScaling(**read_json(file))


def _check_base(directory: Path, base: Path | str) -> str | None:
    """Return the digest of an adapter's base, None if it names none; refuse other weights."""
    if not (directory / BASE).is_file():
        return None
    saved: str = read_json(directory / BASE)["weights"]
    if Path(base).is_dir() and (now := weights_digest(Path(base))) != saved:
        raise ModelError(
            f"The adapter at {directory} was trained on other weights than those in {base} (digest "
            f"{saved}, now {now}): the base was trained again, or is another one. Train the "
            "adapter again, or put its base back."
        )
    return saved


def _resize_embedding(model: PreTrainedModel, directory: Path, base: Path | str) -> None:
    """Give a model as many rows as the embedding that was saved with an adapter.

    Raises:
        ModelError: when the adapter was trained with more tokens than the model has rows, and
            the rows of those tokens are not in it.
    """
    layer = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is layer)
    keys = [f"base_model.model.{name}.{end}" for end in ("weight", "base_layer.weight")]
    with safe_open(directory / WEIGHTS, "pt") as weights:
        saved = next((key for key in keys if key in weights.keys()), None)  # noqa: SIM118
        if saved is not None:
            resize_vocabulary(model, int(weights.get_slice(saved).get_shape()[0]))
            return
    rows = embedding_rows(model)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    tokens = tokenizers.id_count(tokenizers.load(directory)) if has_tokenizer else 0
    if tokens > rows and tokens > tokenizers.id_count(tokenizers.load(base)):
        raise ModelError(
            f"The adapter at {directory} was trained with {tokens} tokens, its base {base} has "
            f"{rows}, and the adapter does not hold the rows between, as those of earlier versions "
            "did not. Train it again."
        )


def merge(adapted: PeftModel) -> PreTrainedModel:
    """Return the base model with the adapter's update added to its weights.

    Where layers shared a weight that is no longer the same for all (the embedding and the head, or
    Zamba's blocks), none share theirs any more, and the config says so.

    Raises:
        ModelError: for adapters that have no place in the weights.
    """
    _copy_shared_weights(cast(PreTrainedModel, adapted.get_base_model()))
    try:
        merge_and_unload = cast(Callable[[], PreTrainedModel], adapted.merge_and_unload)
        merged = merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = reason_of(error)
        raise ModelError(f"This adapter cannot be merged into its base: {reason}") from error
    _untie(merged)
    return merged.requires_grad_(True)  # peft froze it, and the next stage may train it


def _copy_shared_weights(base: PreTrainedModel) -> None:
    """Give adapted layers weights of their own, or else an update is added to all that share it."""
    uses = Counter(id(weight) for _, weight in base.named_parameters(remove_duplicate=False))
    for module in base.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer = module.get_base_layer()
        for name, weight in list(layer.named_parameters(recurse=False)):
            if uses[id(weight)] > 1:
                setattr(layer, name, nn.Parameter(weight.detach().clone()))


def _untie(merged: PreTrainedModel) -> None:
    """Copy each tied weight, so that none is shared, where a merge has made some of them differ."""
    ties = merged.get_expanded_tied_weights_keys(all_submodels=True)
    weights = dict(merged.named_parameters(remove_duplicate=False))
    if all(weights.get(name) is weights.get(source) for name, source in ties.items()):
        return
    merged.config.tie_word_embeddings = False  # nor does resizing tie them again
    for name, source in ties.items():
        if name in weights and weights[name] is weights.get(source):
            layer, _, last = name.rpartition(".")
            copy = nn.Parameter(weights[name].detach().clone())
            setattr(merged.get_submodule(layer), last, copy)
    merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)


def save_adapter(
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter directory that plain peft loads; whole or not at all.

    Where the vocabulary grew, the embedding and an untied head are saved with it, and
    ``AutoPeftModelForCausalLM`` gives the base as many rows as the tokenizer has tokens. Where the
    tokens' ids have gaps these are too few, which is logged.

    Args:
        adapted: the model with its adapter.
        tokenizer: saved beside it.
        directory: replaced when it exists.
        weights: a full state dict, where the model's own parameters are sharded.
    """
    base = cast(PreTrainedModel, adapted.get_base_model())
    resized = bool(getattr(base, "resized", False))
    if resized and len(tokenizer) < embedding_rows(base):
        log.warning(
            "AutoPeftModelForCausalLM cannot load this adapter: it gives the base a row for each "
            "of the %d tokens, whose ids leave some out and take %d. Call "
            "resize_token_embeddings(%d) on the base, and PeftModel.from_pretrained.",
            len(tokenizer),
            embedding_rows(base),
            embedding_rows(base),
        )
    if weights is not None:
        weights = {f"base_model.model.{name}": value for name, value in weights.items()}
    elif resized:
        weights = adapted.state_dict()
    if weights is not None:
        tied = {f"base_model.model.{name}" for name in base.all_tied_weights_keys}
        weights = {name: value for name, value in weights.items() if name not in tied}
    with atomic_directory(directory, MODEL_FILES) as partial:
        adapted.save_pretrained(str(partial), state_dict=weights, save_embedding_layers=resized)
        tokenizers.save(tokenizer, partial)
        if not has_score_head(base):
            generation_config(base, tokenizer).save_pretrained(partial)
        if digest := getattr(adapted, "base_digest", None):
            write_json(partial / BASE, {"weights": digest})
        if scaling := getattr(adapted.get_base_model(), "rope_scaling", None):
            write_json(partial / SCALING, asdict(scaling))
        (partial / "README.md").unlink(missing_ok=True)  # peft's empty model card
