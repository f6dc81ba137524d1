from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minigpt.cli.tokenizer import train_to
from minigpt.data import tokenizer as tokenizers
from minigpt.data.tokenizer import END_OF_TEXT, PAD, SPECIAL_TOKENS, TURN_END
from minigpt.errors import ConfigError, DataError, TokenizerError

TEXTS = st.text() | st.text(alphabet="e\u0301\u200d👩🏽‍🚀🇨🇳 \t\r\n\x00\x1f\u2028０1²a'")


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("size", [300, 340, 350])
def test_trains_a_vocabulary_of_the_size_asked_for(corpus_file: Path, size: int) -> None:
    trained = tokenizers.train([corpus_file], size)
    assert len(trained) == size
    assert len(ids(trained, "the cat sat")) < len("the cat sat")


def test_a_small_text_gives_fewer_tokens_and_says_so(
    write, caplog: pytest.LogCaptureFixture
) -> None:
    trained = tokenizers.train([write([{"text": "ab"}])], 400)
    assert len(trained) == 261
    assert "The text gave 261 tokens, fewer than the 400" in caplog.text


@pytest.mark.parametrize("size", [0, 259])
def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused(corpus_file: Path, size: int) -> None:
    with pytest.raises(TokenizerError, match=f"at least 260 tokens .* vocab_size is {size}"):
        tokenizers.train([corpus_file], size)
    assert len(tokenizers.train([corpus_file], 260)) == 260


def test_that_of_a_run_lies_with_its_model(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "run" / "hf")
    assert tokenizers.load(tmp_path / "run").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(TokenizerError, match=r"There is no tokenizer at .*/empty"):
        tokenizers.load(tmp_path / "run" / "empty")


def test_special_tokens_are_single_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = [ids(tokenizer, text) for text in SPECIAL_TOKENS]
    assert encoded == [[0], [1], [2], [3]]
    assert ids(tokenizer, f"a{TURN_END}b") == [*ids(tokenizer, "a"), 3, *ids(tokenizer, "b")]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (TURN_END, PAD)
    assert tokenizers.special_texts(tokenizer) == sorted(SPECIAL_TOKENS)


@settings(max_examples=100)
@given(TEXTS)
@example("<|im_start|>user\n a <|im_end|>")
@example(" , . ' s n't  ")  # what a clean-up of spaces would change
def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


@settings(max_examples=100)
@given(TEXTS)
def test_token_bytes_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    sizes = tokenizers.token_bytes(tokenizer)
    assert len(sizes) == len(tokenizer)
    assert sum(sizes[i] for i in ids(tokenizer, text)) == len(text.encode())
    assert sizes[:4] == [0, 0, 0, 0]


def test_token_bytes_of_a_sentencepiece_vocabulary() -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "春": 2, "<0x0A>": 3, "▁": 4}
    bpe = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    bpe.decoder = tokenizers.decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    assert tokenizers.token_bytes(tokenizer) == [0, 4, 3, 1, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a2024", ["a", "2", "0", "2", "4"]),
        (" 12", [" ", "1", "2"]),
        ("１2²", ["１", "2", "²"]),
        ("I'LL go", ["I", "'LL", " go"]),
        ("x,\n\n y", ["x", ",\n\n", " y"]),
        ("a   b", ["a", "  ", " b"]),
        ("春眠 不觉", ["春眠", " 不觉"]),
    ],
)
def test_pre_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str, expected: list[str]) -> None:
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == expected


def test_rows_of_every_kind_are_text(write) -> None:
    messages = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]
    rows = [
        {"text": "one", "id": "x"},
        {"messages": messages, "source": "y"},
        {"prompt": "four", "chosen": "five", "rejected": "six"},
    ]
    texts = tokenizers.training_texts([write(rows)])
    assert list(texts) == ["one", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, "abcd"), (3, "abc"), (2, "ab"), (1, "a"), (0, "")]
)
def test_files_are_read_in_turn_up_to_the_limit(write, limit: int | None, expected: str) -> None:
    files = [write([{"text": a}, {"text": b}], f"{a}.jsonl") for a, b in ("ab", "cd")]
    assert "".join(tokenizers.training_texts(files, limit)) == expected


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a\ud800"}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "lone surrogate"),
        ({"n": 1}, "not a chat row"),
        (["text"], "must be a JSON object"),
    ],
)
def test_a_bad_row_is_named(write, row: object, problem: str) -> None:
    path = write([{"text": "fine"}, row])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2:.*{problem}") as caught:
        tokenizers.train([path], 300)
    assert (caught.value.path, caught.value.line) == (path, 2)


def test_the_command_makes_a_directory_that_transformers_loads(
    corpus_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    directory = tmp_path / "new" / "tok"
    ratio = train_to(directory, [str(corpus_file)], 340)
    loaded = AutoTokenizer.from_pretrained(str(directory))
    text = "the cat, 春眠 42<|im_end|>"
    assert ids(loaded, text) == ids(tokenizer, text)
    assert loaded.chat_template == tokenizers.CHAT_TEMPLATE
    assert tokenizers.special_texts(loaded) == sorted(SPECIAL_TOKENS)
    assert (loaded.eos_token, loaded.pad_token) == (TURN_END, PAD)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    texts = list(tokenizers.training_texts([corpus_file]))
    assert ratio == pytest.approx(
        sum(map(len, texts)) / sum(len(ids(loaded, text)) for text in texts)
    )
    assert list(tmp_path.rglob(".*")) == []  # nothing half-made is left


def test_an_existing_tokenizer_is_replaced_only_on_demand(
    corpus_file: Path, tmp_path: Path
) -> None:
    train_to(tmp_path / "tok", [str(corpus_file)], 300)
    with pytest.raises(ConfigError, match="already holds a tokenizer"):
        train_to(tmp_path / "tok", [str(corpus_file)], 320)
    assert len(tokenizers.load(tmp_path / "tok")) == 300
    train_to(tmp_path / "tok", [str(corpus_file)], 320, overwrite=True)
    assert len(tokenizers.load(tmp_path / "tok")) == 320


def test_the_command_reads_no_row_past_the_limit(write, tmp_path: Path) -> None:
    path = write([{"text": "the cat"}, {"n": "not reached"}, ["bad"]])
    assert train_to(tmp_path / "tok", [str(path)], 300, limit=1) > 0


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="minigpt tokenizer train"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize(
    ("end_token", "eos", "expected"),
    [(END_OF_TEXT, None, 1), (END_OF_TEXT, "x", 1), ("</s>", "x", 0), ("</s>", None, None)],
)
def test_document_end(end_token: str, eos: str | None, expected: int | None) -> None:
    bpe = Tokenizer(models.WordLevel({"x": 0, end_token: 1}, unk_token="x"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos)
    if expected is None:
        with pytest.raises(TokenizerError, match="no end-of-text token"):
            tokenizers.document_end(tokenizer)
    else:
        assert tokenizers.document_end(tokenizer) == expected


def test_what_a_tokenizer_writes_before_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizers.document_start(tokenizer) == []
    bos = tiny.with_bos(tokenizer)
    start = tokenizers.document_start(bos)
    assert start == [bos.bos_token_id]
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    assert tokenizers.with_start(plain, start) == bos.encode("the cat")[:-1]
    assert tokenizers.with_start(start + plain, start) == start + plain  # not twice
    assert tokenizers.with_start([], start) == start
    assert tokenizers.with_start(plain, []) == plain
