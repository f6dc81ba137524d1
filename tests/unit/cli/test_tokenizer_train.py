from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

Minigpt = Callable[..., Any]
TEXTS = ["the cat sat on the mat", "春眠不觉晓", "a🙂b\u0000c"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "{"the cat sat on the mat " * n}"}}\n' for n in (1, 2, 3)))
    return file


def train(minigpt: Minigpt, file: Path, output_dir: Path, *more: object) -> Any:
    return minigpt("tokenizer", "train", "--data_file", file, "--output_dir", output_dir, *more)


def test_train(minigpt: Minigpt, texts: Path, tmp_path: Path) -> None:
    outcome = train(minigpt, texts, tmp_path / "new" / "tok", "--vocab_size", 270)
    assert outcome.status == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "tok")
    assert len(tokenizer) == 270
    assert "endgeneration" in tokenizer.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert "270 tokens, " in outcome.err
    assert outcome.err.rstrip().endswith(f"characters per token: {tmp_path / 'new' / 'tok'}")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tok"]


def test_several_files_and_a_limit(minigpt: Minigpt, texts: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text('{"prompt": "zzzz zzzz zzzz", "completion": "zzzz"}\n' * 9)
    files = ("--data_file", texts, more)
    for name, limit in (("all", 12), ("first", 3)):
        output = ("--output_dir", tmp_path / name)
        assert minigpt("tokenizer", "train", *files, *output, "--data_limit", limit).status == 0
    merged = [AutoTokenizer.from_pretrained(tmp_path / n).get_vocab() for n in ("all", "first")]
    assert ["zzzz" in vocabulary for vocabulary in merged] == [True, False]


def test_keys_of_other_names(minigpt: Minigpt, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"ask": "zzzz zzzz zzzz", "reply": "zzzz"}\n' * 9)
    columns = ("--columns", "ask=question", "reply=answer")
    assert train(minigpt, file, tmp_path / "tok", *columns).status == 0
    assert "zzzz" in AutoTokenizer.from_pretrained(tmp_path / "tok").get_vocab()


def test_small_text_is_said(minigpt: Minigpt, texts: Path, tmp_path: Path) -> None:
    outcome = train(minigpt, texts, tmp_path / "tok")
    assert outcome.status == 0
    assert "fewer than the 6400 asked for" in outcome.err


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        (b"{oops", ":4: invalid JSON"),
        (b'{"n": 5}', ":4: not a chat row: its keys are ['n']"),
        (b'{"text": "\\ud800"}', ":4:text: character 1 is a lone surrogate"),
        (b'{"text": "\xff"}', ":4: byte 11 of the line is neither UTF-8"),
    ],
)
def test_bad_rows(minigpt: Minigpt, texts: Path, tmp_path: Path, row: bytes, fragment: str) -> None:
    texts.write_bytes(texts.read_bytes() + row + b"\n")
    outcome = train(minigpt, texts, tmp_path / "tok")
    assert outcome.status == 2
    assert outcome.err.startswith(f"minigpt: {texts}{fragment}")
    assert outcome.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"--data_file": "none.jsonl"}, "none.jsonl: cannot be read: No such file"),
        ({"--vocab_size": 259}, "needs at least 260 tokens"),
        ({"--vocab_size": "many"}, "invalid int value: 'many'"),
        ({"--data_limit": 0}, "must be a whole number of at least 1, but is '0'"),
        ({"--output_dir": "texts.jsonl/tok"}, "Cannot write to texts.jsonl/tok"),
        ({"--output_dir": "texts.jsonl"}, "no place for a tokenizer: it holds texts.jsonl"),
        ({"--output_dir": "."}, "no place for a tokenizer: it holds texts.jsonl"),
    ],
)
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_bad_options(
    minigpt: Minigpt,
    monkeypatch: pytest.MonkeyPatch,
    texts: Path,
    options: dict[str, object],
    fragment: str,
    overwrite: tuple[str, ...],
) -> None:
    monkeypatch.chdir(texts.parent)
    before = texts.read_bytes()
    arguments = {"--data_file": "texts.jsonl", "--output_dir": "tok", **options}
    outcome = minigpt(
        "tokenizer", "train", *(x for pair in arguments.items() for x in pair), *overwrite
    )
    assert outcome.status == 2
    assert fragment in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    assert [path.name for path in texts.parent.iterdir()] == ["texts.jsonl"]
    assert texts.read_bytes() == before


@pytest.mark.parametrize("args", [(), ("train",)], ids=["tokenizer", "train"])
def test_missing_arguments(minigpt: Minigpt, args: tuple[str, ...]) -> None:
    outcome = minigpt("tokenizer", *args)
    assert outcome.status == 2
    assert "arguments are required: " in outcome.err
    assert outcome.err.endswith(f"See: minigpt {' '.join(('tokenizer', *args))} --help\n")


def test_a_tokenizer_is_replaced_only_when_asked(
    minigpt: Minigpt, texts: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "tok"
    assert train(minigpt, texts, output_dir, "--vocab_size", 265).status == 0
    outcome = train(minigpt, texts, output_dir, "--vocab_size", 270)
    assert outcome.status == 2
    assert "already holds a tokenizer" in outcome.err
    assert "--overwrite" in outcome.err
    assert len(AutoTokenizer.from_pretrained(output_dir)) == 265
    assert train(minigpt, texts, output_dir, "--vocab_size", 270, "--overwrite").status == 0
    assert len(AutoTokenizer.from_pretrained(output_dir)) == 270
