"""Export as GGUF, for llama.cpp and Ollama."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.data.tokenizer import QWEN2_PATTERN
from minigpt.errors import ConfigError
from minigpt.export.card import Card
from minigpt.export.check import Numbers, check_llamacpp, has_llamacpp, hold, observe, render
from minigpt.export.place import use_plain_template
from minigpt.files import whole_directory, whole_file
from minigpt.infer.engine import Engine
from minigpt.model.build import embedding_rows
from minigpt.model.saved import generation_config

log = logging.getLogger(__name__)

ARCHITECTURES = ("qwen3", "llama")
DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
BLOCK = 32  # values of a row that share a scale in q8_0 and q4_0
# A weight's error, as a share of its tensor's largest value.
ROUNDING = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.0045, "Q4_0": 0.126}
LOGPROBS = {"f32": 0.01, "f16": 0.01, "bf16": 0.15, "q8_0": 0.15, "q4_0": 2.0}

_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_QWEN2 = {
    "type": "Split",
    "pattern": {"Regex": QWEN2_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}
# The pre-tokenizers that llama.cpp computes alike, by its names for them.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "qwen2": [_QWEN2, {**_BYTES, "use_regex": False}],
    "gpt-2": [{**_BYTES, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
}
# ChatML as MiniGPT's own template renders it, in Ollama's language.
OLLAMA_TEMPLATE = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def export_gguf(
    model: str,
    place: Path,
    card: Card,
    dtype: str = "f16",
    adapter: str | None = None,
) -> Numbers:
    """Write a GGUF file and check it.

    Args:
        model: run directory, HF directory or hub id; an adapter is merged.
        place: a file that ends in .gguf, or a directory that gets the file, a Modelfile for
            Ollama and a model card. It appears whole once the file has passed its check.
        card: of the model.
        dtype: of the matrices; vectors are always f32.
        adapter: LoRA directory to put on the model.

    Returns:
        The numbers of the parity check.

    Raises:
        ConfigError: for models and tokenizers that llama.cpp would not compute alike.
        ModelError: when the export does not do what the model does; nothing is kept.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("GGUF needs one more package: pip install 'minigpt[gguf]'")
    engine = Engine.load(model, adapter)
    check_config(engine.model.config)
    pre = pre_tokenizer(engine.tokenizer)
    expected = observe(engine) if has_llamacpp() else None
    use_plain_template(engine.tokenizer)
    alone = place.suffix == ".gguf"
    beside: AbstractContextManager[Path] = whole_file(place) if alone else whole_directory(place)
    with beside as partial:
        file = partial if alone else partial / f"{card.name}-{dtype}.gguf"
        write(engine, file, dtype, pre, card)
        numbers = check_weights(engine, file)
        if expected is not None:
            numbers |= check_llamacpp(expected, file, LOGPROBS[dtype])
        else:
            numbers["llama.cpp"] = "not run; it needs: pip install 'minigpt[gguf]'"
        if not alone:
            (partial / "Modelfile").write_text(modelfile(engine, file.name), encoding="utf-8")
            card.write(partial, numbers, gguf=file.name)
    return numbers


def check_config(config: Any) -> None:
    """Refuse models of which GGUF, as written here, would hold only a part.

    Raises:
        ConfigError: for another architecture, or a setting of it.
    """
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"GGUF export knows the architectures {' and '.join(ARCHITECTURES)}, and this model "
            f"is {config.model_type}. Use llama.cpp's convert_hf_to_gguf.py on `export hf`."
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    odd = {
        "rope_type": rope if rope != "default" else None,
        "attention_bias": config.attention_bias,
        "mlp_bias": getattr(config, "mlp_bias", False),
        "use_sliding_window": getattr(config, "use_sliding_window", False),
        "hidden_act": config.hidden_act if config.hidden_act != "silu" else None,
    }
    if given := [f"{name} {value}" for name, value in odd.items() if value]:
        raise ConfigError(
            f"GGUF export does not know {config.model_type} with {', '.join(given)}. Use "
            "llama.cpp's convert_hf_to_gguf.py on `export hf`."
        )


def pre_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return llama.cpp's name of the pre-tokenizer that gives the same ids.

    Raises:
        ConfigError: when it has none.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, pre = spec["model"], spec["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    steps = [{key: v for key, v in step.items() if key != "trim_offsets"} for step in steps]
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)
    odd = [] if name else ["its pre-tokenizer"]
    odd += ["its normalizer"] if spec["normalizer"] else []
    settings = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    settings += ("byte_fallback", "ignore_merges")
    if bpe["type"] != "BPE" or any(bpe.get(setting) for setting in settings):
        odd.append("its model")
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    if any(token.get(flag) for token in spec["added_tokens"] for flag in flags):
        odd.append("an added token that takes in what is beside it")
    if odd or name is None:
        raise ConfigError(
            "This tokenizer cannot be exported: llama.cpp would give other token ids, because of "
            f"{' and '.join(odd)}. Tokenizers of `minigpt tokenizer train` can be."
        )
    return name


def vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int) -> tuple[list[str], list[int]]:
    """Return the text and GGUF type of each of the model's rows."""
    from gguf import TokenType

    added = tokenizer.added_tokens_decoder
    names: Any = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    names += [None] * (rows - len(names))
    types = [TokenType.UNUSED if name is None else TokenType.NORMAL for name in names]
    for index, token in added.items():
        types[index] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    texts = [f"[UNUSED{i}]" if name is None else name for i, name in enumerate(names)]
    return texts, [int(kind) for kind in types]


def tensors(engine: Engine) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the weights under their GGUF names, in llama.cpp's order of rows."""
    import gguf

    config = engine.model.config
    arch = gguf.MODEL_ARCH[config.model_type.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in engine.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = weight.detach().float().numpy()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            query = name.endswith("q_proj.weight")
            heads = config.num_attention_heads if query else config.num_key_value_heads
            value = interleaved(value, heads)
        yield names.get_name(name, (".weight",)), value


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder a head's rows from halves, as transformers rotates them, to neighbouring pairs."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def storage(name: str, value: NDArray[np.float32], dtype: str) -> Any:
    """Return how a weight is stored: vectors exactly, odd rows as f16, 4-bit embeddings as q8_0."""
    from gguf import GGMLQuantizationType as Kind

    if value.ndim == 1:
        return Kind.F32
    if dtype.startswith("q") and value.shape[-1] % BLOCK:
        return Kind.F16
    if dtype == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return Kind.Q8_0
    return Kind[dtype.upper()]


def write(engine: Engine, file: Path, dtype: str, pre: str, card: Card) -> None:
    """Write the GGUF file."""
    import gguf

    config = engine.model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_name(card.name)
    if card.license:
        writer.add_license(card.license)
    kind = ("ALL_" if dtype == "f32" else "MOSTLY_") + dtype.upper()
    writer.add_file_type(gguf.LlamaFileType[kind])
    add_sizes(writer, config, embedding_rows(engine.model))
    add_tokenizer(writer, engine.tokenizer, pre, embedding_rows(engine.model))
    odd = []
    for name, value in tensors(engine):
        kind = storage(name, value, dtype)
        odd += [name] if value.ndim > 1 and kind.name != dtype.upper() else []
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    if odd:
        log.warning("%d matrices are not stored as %s, such as %s.", len(odd), dtype, odd[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: Any, config: Any, rows: int) -> None:
    """Write the sizes of the model."""
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, pre: str, rows: int) -> None:
    """Write the tokenizer and its chat template."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    texts, types = vocabulary(tokenizer, rows)
    end = tokenizers.document_end(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    # llama.cpp takes token 11 when none is named. It is never put before a text.
    writer.add_bos_token_id(end if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(end if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def check_weights(engine: Engine, file: Path) -> Numbers:
    """Read a GGUF file again and compare each weight with the model's.

    Raises:
        ModelError: when one is missing or further off than its storage rounds.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    worst, kinds, count = 0.0, set(), 0
    for name, value in tensors(engine):
        kind = stored[name].tensor_type
        read = gguf.quants.dequantize(stored[name].data, kind).reshape(value.shape)
        largest = float(np.abs(value).max()) or 1.0
        error = float(np.abs(read - value).max()) / largest
        numbers = {"tensor": name, "stored_as": kind.name, "error": error}
        hold(numbers, "weights differ", error <= ROUNDING[kind.name])
        worst, count = max(worst, error), count + 1
        kinds.add(kind.name)
    numbers = {"tensors": f"{count} of {len(stored)}", "stored_as": "+".join(sorted(kinds))}
    hold(numbers, "it holds other tensors", count == len(stored))
    return numbers | {"max_weight_error": worst}


def modelfile(engine: Engine, name: str) -> str:
    """Return the text of an Ollama Modelfile."""
    tokenizer = engine.tokenizer
    lines = [f"FROM ./{name}"]
    if not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif is_chatml(tokenizer):
        lines.append(f'TEMPLATE """{OLLAMA_TEMPLATE}"""')
    else:
        log.warning("The chat template is not ChatML: Ollama takes what it makes of the GGUF's.")
    ends: Any = generation_config(tokenizer).eos_token_id
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(end)}"' for end in ends]
    lines.append(f"PARAMETER num_ctx {min(engine.model.config.max_position_embeddings, 4096)}")
    return "\n".join(lines) + "\n"


def is_chatml(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether chats are rendered as MiniGPT's own template renders them."""
    roles = ("system", "user", "assistant", "user")
    chat = [{"role": role, "content": f"{role} 1\n"} for role in roles]
    turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat]
    return render(tokenizer, chat) == "".join(turns) + "<|im_start|>assistant\n"
