"""Export as GGUF, for llama.cpp and Ollama."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.data.chat import turn_end
from minigpt.data.tokenizer import QWEN2_PATTERN
from minigpt.errors import ConfigError, ModelError
from minigpt.export.card import Card
from minigpt.export.check import (
    Numbers,
    check_llamacpp,
    normalized,
    observe,
    prompts,
    render,
    require,
)
from minigpt.export.hf import use_plain_template
from minigpt.files import atomic_directory, atomic_file, write_manifest
from minigpt.infer.engine import Engine
from minigpt.model.architecture import embedding_rows
from minigpt.model.rope import rope_parameters

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

log = logging.getLogger(__name__)

ARCHITECTURES = ("qwen3", "qwen2", "llama")
SCALED = ("linear", "yarn")  # kinds of rotary scaling that llama.cpp computes
BLOCK = 32  # values of a row that share a scale in the types of few bits
# Limits of a weight's error, as a share of its tensor's largest absolute value.
ROUNDING = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.0045}
ROUNDING |= {"Q5_1": 0.033, "Q5_0": 0.063, "Q4_1": 0.068, "Q4_0": 0.126}
# Limits of the differences of log-probabilities, in nats. The largest measured: of SmolLM2-135M
# (30 layers) f16 0.014, q8_0 0.23, q5_1 0.85; of two layers f16 0.003, bf16 0.03, q8_0 0.07,
# q5_1 0.32, q4_1 0.87, q4_0 0.78. As bf16 rounds 8 times as coarsely as f16, 30 layers make 0.11.
LOGPROB_LIMITS = {"f32": 0.01, "f16": 0.05, "bf16": 0.3, "q8_0": 0.3}
LOGPROB_LIMITS |= {"q5_1": 1.5, "q5_0": 1.5, "q4_1": 2.0, "q4_0": 2.0}

LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_QWEN2 = {**_SPLIT, "pattern": {"Regex": QWEN2_PATTERN}}
_LLAMA3 = {**_SPLIT, "pattern": {"Regex": LLAMA3_PATTERN}}
# The pre-tokenizers that llama.cpp computes alike, by its names for them.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "qwen2": [_QWEN2, {**_BYTES, "use_regex": False}],
    "gpt-2": [{**_BYTES, "use_regex": True}],
    "llama-bpe": [_LLAMA3, {**_BYTES, "use_regex": False}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
}
IGNORES_MERGES = ("llama-bpe",)  # a piece that is a token is taken whole
BPE_SETTINGS = (
    "dropout",
    "unk_token",
    "byte_fallback",
    "continuing_subword_prefix",
    "end_of_word_suffix",
)
# Tokens that llama.cpp takes for the end of a reply wherever a vocabulary has them.
ENDS_BY_NAME = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
)
NORMALIZER = {"type": "NFC"}  # which llama.cpp leaves out, and nearly all texts are in
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
# ChatML as MiniGPT's own template renders it, in Ollama's language.
OLLAMA_TEMPLATE = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def export_gguf(
    model: str,
    output: Path,
    card: Card,
    dtype: str = "f16",
    adapter: str | None = None,
    accept: bool = False,
) -> Numbers:
    """Write a GGUF file, check it and return the numbers.

    Args:
        model: run directory, HF directory or hub id; an adapter is merged.
        output: a file that ends in .gguf, or a directory that gets the file, a Modelfile for
            Ollama and a model card. It appears whole once the file has passed its check.
        card: writes the model card.
        dtype: of the matrices; vectors are always f32.
        adapter: LoRA directory to put on the model.
        accept: keep a file by which llama.cpp gives other results, and say so in the card.

    Raises:
        ConfigError: for models and tokenizers that llama.cpp would not compute alike, and when
            another process writes the output.
        ModelError: when the export does not do what the model does; nothing is kept.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("GGUF export needs one more package: pip install 'minigpt[gguf]'")
    is_file = output.suffix == ".gguf"
    atomic: AbstractContextManager[Path] = (
        atomic_file(output, exclusive=True) if is_file else atomic_directory(output)
    )
    with atomic as partial:  # from the start, so that no other export begins
        engine = Engine.load(model, adapter, device="cpu")
        check_config(engine.model.config)
        pre = pre_tokenizer(engine.tokenizer)
        has_llamacpp = importlib.util.find_spec("xllamacpp") is not None
        expected = observe(engine) if has_llamacpp else None
        start = text_start(engine.tokenizer)
        if engine.start != start:
            log.warning(
                "llama.cpp writes BOS before texts and chats alike, and the chat template writes "
                "none: texts get none, either."
            )
        normalizer = engine.tokenizer.backend_tokenizer.normalizer
        if normalizer is not None:
            log.warning("llama.cpp leaves out the tokenizer's normalizer: give it texts in NFC.")
            if expected is not None:
                expected = normalized(expected, engine.tokenizer)
        use_plain_template(engine.tokenizer)
        file = partial if is_file else partial / f"{card.name}-{dtype}.gguf"
        write(engine, file, dtype, pre, card)
        numbers = check_weights(engine, file)
        if normalizer is not None:
            numbers["normalizer"] = "left out: texts are compared in NFC"
        if expected is not None:
            expected = replace(expected, start=start)
            numbers |= check_llamacpp(expected, file, LOGPROB_LIMITS[dtype], accept)
        else:
            numbers["llama.cpp"] = "not run; it needs: pip install 'minigpt[gguf]'"
        if not is_file:
            (partial / "Modelfile").write_text(modelfile(engine, file.name), encoding="utf-8")
            card.write(partial, numbers, gguf=file.name)
            write_manifest(partial)
    return numbers


def check_config(config: PreTrainedConfig) -> None:
    """Raise a ConfigError for a model with parts that are not written to GGUF here."""
    unsupported = [config.model_type] if config.model_type not in ARCHITECTURES else []
    rope = rope_parameters(config)
    if (config.model_type, rope.get("rope_type")) != ("llama", "llama3"):  # see `tensors`
        unsupported += unsupported_rope(rope)
    settings = ("attention_bias", "mlp_bias", "use_sliding_window")
    unsupported += [name for name in settings if getattr(config, name, False)]
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        unsupported.append(f"hidden_act {activation}")
    if unsupported:
        raise ConfigError(
            f"GGUF export does not support {', '.join(unsupported)}: it is for plain Qwen3, Qwen2 "
            "and Llama models. Use `minigpt export hf`, and llama.cpp's convert_hf_to_gguf.py on "
            "that."
        )


def unsupported_rope(rope: dict[str, Any]) -> list[str]:
    """Return in words the rotary parameters that llama.cpp does not read from the file."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *SCALED):
        reason = " (its angles follow a text's length)" if kind == "dynamic" else ""
        return [f"rope_type {kind}{reason}"]
    supported = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")
    return [
        f"{kind} with {name}" for name in rope if name not in supported and rope[name] is not None
    ]


def pre_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return llama.cpp's name of the pre-tokenizer that gives the same ids.

    Raises:
        ConfigError: when it has none.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = spec["model"]
    pre = spec["pre_tokenizer"] or {}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in pre.get("pretokenizers", [pre])
    ]
    name = next((name for name, its_steps in PRE_TOKENIZERS.items() if its_steps == steps), None)
    unsupported = ["its pre-tokenizer"] if name is None else []
    unsupported += ["its normalizer"] if spec["normalizer"] not in (None, NORMALIZER) else []
    same_merges = bool(bpe.get("ignore_merges")) == (name in IGNORES_MERGES)
    if bpe["type"] != "BPE" or not same_merges or any(bpe.get(setting) for setting in BPE_SETTINGS):
        unsupported.append("its model")
    if any(token.get(flag) for token in spec["added_tokens"] for flag in TOKEN_FLAGS):
        unsupported.append("an added token that takes in what is beside it")
    if unsupported or name is None:
        raise ConfigError(
            "This tokenizer cannot be exported to GGUF: llama.cpp would give other token ids, "
            f"because of {' and '.join(unsupported)}. Those of `minigpt tokenizer train` can be."
        )
    return name


def head_size(config: PreTrainedConfig) -> int:
    """Return the width of an attention head."""
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or config.hidden_size // config.num_attention_heads)


def text_start(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that llama.cpp shall write before texts, and so before chats."""
    start = tokenizers.document_start(tokenizer)
    text = "".join(tokenizer.convert_ids_to_tokens(start))
    return start if all(chat.startswith(text) for _, chat in prompts(tokenizer)) else []


def tensors(engine: Engine) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the weights under their GGUF names, with llama.cpp's order of rows."""
    import gguf

    config = engine.model.config
    arch = gguf.MODEL_ARCH[config.model_type.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in engine.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = weight.detach().float().numpy()
        layer = name.split(".")[-2]
        if config.model_type == "llama" and layer in ("q_proj", "k_proj"):
            # A head's halves are rotated by transformers, its neighbouring pairs by llama.cpp.
            is_key = layer == "k_proj"
            heads = config.num_key_value_heads if is_key else config.num_attention_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        gguf_name = names.get_name(name, (".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(f"llama.cpp has no tensor for the model's {name}.")
        yield gguf_name, value
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":  # llama.cpp divides the plain frequencies by factors
        width = head_size(config)
        plain = rope["rope_theta"] ** -(np.arange(0, width, 2) / width)
        scaled: Any = engine.model.base_model.rotary_emb.inv_freq  # type: ignore[union-attr]
        yield "rope_freqs.weight", (plain / scaled.double().numpy()).astype(np.float32)


def storage(name: str, value: NDArray[np.float32], dtype: str) -> GGMLQuantizationType:
    """Return how a weight is stored: vectors and odd rows more finely than as `dtype`."""
    from gguf import GGMLQuantizationType as Kind

    if value.ndim == 1:
        return Kind.F32
    if dtype.startswith("q") and value.shape[-1] % BLOCK:
        return Kind.F16  # its rows cannot be cut into blocks
    if dtype[:2] in ("q4", "q5") and name in ("token_embd.weight", "output.weight"):
        return Kind.Q8_0
    return Kind[dtype.upper()]


def write(engine: Engine, file: Path, dtype: str, pre: str, card: Card) -> None:
    """Write the GGUF file."""
    import gguf

    writer = gguf.GGUFWriter(file, engine.model.config.model_type)
    writer.add_name(card.name)
    if card.license:
        writer.add_license(card.license)
    file_type = ("ALL_" if dtype == "f32" else "MOSTLY_") + dtype.upper()
    writer.add_file_type(gguf.LlamaFileType[file_type])
    rows = embedding_rows(engine.model)
    add_sizes(writer, engine.model.config, rows)
    add_tokenizer(writer, engine.tokenizer, pre, rows)
    add_ends(writer, engine)
    exceptions = []
    for name, value in tensors(engine):
        kind = storage(name, value, dtype)
        if value.ndim > 1 and kind.name != dtype.upper():
            exceptions.append(f"{name} {kind.name}")
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    if exceptions:
        others = f" and {len(exceptions) - 1} more" if len(exceptions) > 1 else ""
        log.warning("Not stored as %s: %s%s.", dtype, exceptions[0], others)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: GGUFWriter, config: PreTrainedConfig, rows: int) -> None:
    """Write the sizes of the model."""
    import gguf

    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_size(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if (kind := rope["rope_type"]) in SCALED:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        factor = float(rope["factor"])
        writer.add_rope_scaling_factor(factor)
        original = rope.get("original_max_position_embeddings")
        original = original or round(config.max_position_embeddings / factor)
        writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, pre: str, rows: int
) -> None:
    """Write the tokenizer, with a text and a type for each row of the embedding."""
    from gguf import TokenType

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    added = tokenizer.added_tokens_decoder
    texts: list[str] = []
    types: list[int] = []
    for index in range(rows):
        text: str | None = tokenizer.backend_tokenizer.id_to_token(index)
        kind = TokenType.UNUSED if text is None else TokenType.NORMAL
        if index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        texts.append(f"[UNUSED{index}]" if text is None else text)
        types.append(int(kind))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    start = text_start(tokenizer)
    bos = start[0] if start else tokenizer.bos_token_id
    if bos is None:  # without any, llama.cpp takes token 11
        bos = tokenizers.document_end(tokenizer)
    writer.add_bos_token_id(bos)
    writer.add_add_bos_token(bool(start))
    writer.add_add_eos_token(False)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def add_ends(writer: GGUFWriter, engine: Engine) -> None:
    """Write the tokens that end a reply: eos, the turn's end, and one that is neither.

    GGUF has a field for each of these three. llama.cpp finds some others by name.
    """
    tokenizer = engine.tokenizer
    eos = tokenizer.eos_token_id
    eos = tokenizers.document_end(tokenizer) if eos is None else eos
    ids_by_token = tokenizer.backend_tokenizer.token_to_id
    turn_token = turn_end(tokenizer) or tokenizer.eos_token
    turn = None if turn_token is None else ids_by_token(str(turn_token))
    writer.add_eos_token_id(eos)
    if turn is not None:
        writer.add_eot_token_id(turn)
    named = {ids_by_token(name) for name in ENDS_BY_NAME}
    if others := sorted(engine.ends - {eos, turn} - named):
        writer.add_eom_token_id(others[0])


def check_weights(engine: Engine, file: Path) -> Numbers:
    """Read a GGUF file again and compare each weight with the model's.

    Raises:
        ModelError: when one is missing or further off than its storage rounds.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    largest: dict[str, float] = {}
    count = 0
    for name, value in tensors(engine):
        kind = stored[name].tensor_type
        read = gguf.quants.dequantize(stored[name].data, kind).reshape(value.shape)
        error = float(np.abs(read - value).max()) / (float(np.abs(value).max()) or 1.0)
        numbers = {"tensor": name, "stored_as": kind.name, "error": error}
        require(numbers, "weights differ", error <= ROUNDING[kind.name])
        largest[kind.name] = max(largest.get(kind.name, 0.0), error)
        count += 1
    require({"tensors": count}, f"the file has {len(stored)} tensors", count == len(stored))
    return {"tensors": count} | {f"max_error_{kind}": error for kind, error in largest.items()}


def modelfile(engine: Engine, name: str) -> str:
    """Return the text of an Ollama Modelfile."""
    tokenizer = engine.tokenizer
    lines = [f"FROM ./{name}"]
    if not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif is_chatml(tokenizer):
        lines.append(f'TEMPLATE """{OLLAMA_TEMPLATE}"""')
    else:
        log.warning("The chat template is not ChatML: Ollama makes what it can of the GGUF's.")
    for end in tokenizer.convert_ids_to_tokens(sorted(engine.ends)):
        if end.isprintable() and '"' not in end:
            lines.append(f'PARAMETER stop "{end}"')
        else:  # which would begin another instruction
            log.warning("The Modelfile leaves out the stop text %r: it cannot hold it.", end)
    lines.append(f"PARAMETER num_ctx {min(engine.model.config.max_position_embeddings, 4096)}")
    return "\n".join(lines) + "\n"


def is_chatml(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether chats are rendered as MiniGPT's own template renders them."""
    chat = [{"role": r, "content": f"{r} 1\n"} for r in ("system", "user", "assistant", "user")]
    turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat]
    return render(tokenizer, chat) == "".join(turns) + "<|im_start|>assistant\n"
