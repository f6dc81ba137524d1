"""Train, save and load the tokenizer: byte-level BPE with a chat template.

The pre-tokenizer is a Split on exactly the Qwen2 pattern followed by ByteLevel, and there
is no normalizer: every Unicode string round-trips, and llama.cpp's `qwen2` pre-tokenizer
gives the same ids.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minigpt.data.formats import BadRows, read_records, texts_of
from minigpt.errors import ConfigError, DataError, TokenizerError
from minigpt.reading import (
    LARGEST_CONFIG,
    NotReadableError,
    check_directory,
    hub_problem,
    may_be_hub_id,
    read_text,
    reason_of,
    refusing,
)

log = logging.getLogger(__name__)

END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, TURN_START, TURN_END)
NEEDS_CODE = (
    "it brings code of its own, and code of others is never run here. Give one that transformers "
    "loads by itself."
)
BYTES = 256
LARGEST_ID = 1 << 24  # of a tokenizer; each id below costs memory, even where it is left out
DEMO, DEMO_TEXTS = "outputs/tokenizer", "data/pretrain.jsonl"  # of configs/pretrain.yaml
# Chinese has no spaces, so in repetitive text BPE would join whole sentences into tokens that
# say nothing about a new wording. Four Chinese characters or a long English word still fit.
MAX_TOKEN_BYTES = 12

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML. The generation block marks what the model is trained to say: the answer and the
# token that ends its turn.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{{- '\n' -}}"
    "{%- else -%}{{- message['content'] + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def training_texts(
    files: Sequence[str | Path],
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Yield the texts of data files of any kind of row; at most `limit` rows in all.

    Args:
        files: of any form.
        limit: rows.
        columns: the rows' keys that have other names here.

    Raises:
        DataError: for a file or row that cannot be read.
    """
    for record, _ in read_records(files, None, BadRows(), limit, columns=columns):
        yield from texts_of(record)


def train(
    files: Sequence[str | Path], vocab_size: int, limit: int | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on JSONL files of any accepted kind of row; see `train_on`.

    Raises:
        TokenizerError: when `vocab_size` cannot hold the bytes and the special tokens.
        DataError: for unreadable files or rows.
    """
    return train_on(training_texts(files, limit), vocab_size)


def train_on(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens on a stream of texts.

    Args:
        texts: documents and messages; only counts of their words stay in memory.
        vocab_size: tokens in all, the 256 bytes and the special tokens included.

    Raises:
        TokenizerError: when `vocab_size` cannot hold the bytes and the special tokens.
    """
    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise TokenizerError(
            f"A byte-level vocabulary needs at least {smallest} tokens (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens), but vocab_size is {vocab_size}. "
            "Give a larger one, such as 6400."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        max_token_length=MAX_TOKEN_BYTES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        log.warning(
            "The text gave %d tokens, fewer than the %d asked for: it is small.",
            bpe.get_vocab_size(),
            vocab_size,
        )
    return wrap(bpe)


def wrap(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a trained BPE as a transformers tokenizer with our template and special tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, TURN_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load(path: str | Path, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a directory, a run or a hub id.

    Args:
        path: a tokenizer or model directory, a run directory, `RUN/checkpoints/step=N` or a hub id.
        chat_template: file of a chat template to give it, or the name of one of its own; by
            default the only one it has, or of several the one called ``default``.

    Raises:
        TokenizerError: when there is none, with the command that makes one.
        ConfigError: when there is no such chat template.
    """
    remedy = f"Copy it again. {_how_to_train(path)}"
    with refusing(f"The tokenizer at {path}", TokenizerError, remedy):
        tokenizer = _loaded(_directory(Path(path)))
        tokenizer.backend_tokenizer.no_truncation()  # which some files ask for
        tokenizer.backend_tokenizer.no_padding()
        _try_out(tokenizer)
    _choose_template(tokenizer, chat_template)
    return tokenizer


def _how_to_train(path: str | Path) -> str:
    texts = DEMO_TEXTS if str(path) == DEMO else "TEXTS"
    command = f"minigpt tokenizer train --data_file {texts} --output_dir {path}"
    return f"Make one with: {command}"


def _directory(path: Path) -> Path:
    """Return where the tokenizer of a path lies: that of a run or checkpoint is with its model."""
    has_none = path.is_dir() and not any(path.glob("tokenizer*"))
    return path / "hf" if has_none and any(path.glob("hf/tokenizer*")) else path


def _loaded(path: Path) -> PreTrainedTokenizerFast:
    has_files = path.is_dir() and any(path.glob("tokenizer*"))
    missing = f"There is no tokenizer at {path}. {_how_to_train(path)}"
    if not path.exists() and not may_be_hub_id(path):
        raise TokenizerError(missing)
    try:
        if path.is_dir():
            check_directory(path)
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise TokenizerError(
                f"The tokenizer at {path} cannot be loaded: {NEEDS_CODE}"
            ) from error
        if has_files:
            raise
        if not path.exists() and (problem := hub_problem(error)):
            raise TokenizerError(f"The tokenizer at {path} cannot be loaded: {problem}") from error
        raise TokenizerError(missing) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TokenizerError(f"The tokenizer at {path} has no fast version, which MiniGPT needs.")
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """Do with a tokenizer what is done with it later, so that a damaged one is refused now."""
    if (ids := id_count(tokenizer)) > LARGEST_ID:
        raise NotReadableError(f"one of its tokens has the id {ids - 1:,}")
    for name, token in tokenizer.special_tokens_map.items():
        if not isinstance(token, str | list):
            raise NotReadableError(f"its {name} is no text")
    template: object = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        if not isinstance(text, str) or len(text) > LARGEST_CONFIG:
            raise NotReadableError("its chat template is no text, or a very long one")
    _ = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.backend_tokenizer.decode(tokenizer.backend_tokenizer.encode("a b\n").ids)
    document_start(tokenizer)


def _choose_template(tokenizer: PreTrainedTokenizerFast, wanted: str | None) -> None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        named: dict[str, str] = template
    else:
        named = {"default": template} if template else {}
    if wanted is None or wanted in named:
        tokenizer.chat_template = named.get(wanted or "default", template)
        return
    try:
        tokenizer.chat_template = read_text(Path(wanted), LARGEST_CONFIG)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template: {wanted} is neither a file that can be read "
            f"({reason_of(error)}) nor the name of a template of the tokenizer, which has: "
            f"{', '.join(named) or 'none'}."
        ) from error


def save(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Save a tokenizer, its template and its special tokens as a transformers directory."""
    tokenizer.save_pretrained(str(directory))
    file = Path(directory) / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 lacks
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def document_end(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that ends a document in pretraining: `<|endoftext|>` or the EOS token.

    Raises:
        TokenizerError: when the tokenizer has neither.
    """
    end = tokenizer.backend_tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        end = tokenizer.eos_token_id
    if end is None:
        raise TokenizerError("The tokenizer has no end-of-text token; set its eos_token.")
    return int(end)


def document_start(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that the tokenizer writes before each text: BOS, or none as ours does."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    mask = encoding.special_tokens_mask
    return list(encoding.ids[: mask.index(0)]) if 0 in mask else []


def with_start(ids: list[int], start: list[int]) -> list[int]:
    """Return a text's ids behind its `document_start`, which is not written twice."""
    return ids if ids[: len(start)] == start else start + ids


def id_count(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the tokenizer's largest id plus 1; there may be fewer tokens, with holes between."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_ids(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int], embedding_rows: int) -> None:
    """Refuse, with a DataError, ids that a model with so many rows cannot embed.

    Some tokenizers have a token more than their model has rows, which texts never hold.
    """
    if (largest := max(ids, default=0)) >= embedding_rows:
        raise DataError(
            f"the token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, and the "
            f"model embeds {embedding_rows} tokens",
            remedy="Take it out of the text.",
            reason="not_embedded",
        )


def special_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the texts that the tokenizer reads as control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted(token.content for token in added if token.special)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the UTF-8 bytes that each id stands for; 0 for special tokens.

    Byte-level vocabularies write each byte as one character. Others (SentencePiece) write
    a byte as ``<0xNN>`` and a space as ``▁``.
    """
    byte_level = "ByteLevel" in str(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }

    def size(index: int, token: str | None) -> int:
        if token is None or index in special:
            return 0
        if byte_level:
            return len(token)
        if token.startswith("<0x") and token.endswith(">"):
            return 1
        return len(token.replace("▁", " ").encode())

    ids = list(range(id_count(tokenizer)))
    return [size(index, token) for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids))]
