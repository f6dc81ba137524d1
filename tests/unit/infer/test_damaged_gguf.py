"""Damaged GGUF files: their header is read, or refused in one paragraph."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import damage
import pytest
import tiny

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ModelError
from minigpt.export import gguf
from minigpt.export.card import Card
from minigpt.infer import gguf as backend
from minigpt.infer.engine import Engine
from minigpt.infer.gguf import Gguf, LlamaCpp, read_fields, tokenizer_of

HEAD = b"GGUF" + struct.pack("<I", 3)
TEXT, ARRAY, UINT8, UINT32 = 8, 9, 0, 4


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("gguf")
    tokenizer = tokenizers.load(tiny.tokenizer(root / "tokenizer"))
    file = root / "tiny.gguf"
    gguf.write(Engine(tiny.model("qwen3"), tokenizer), file, "f16", "qwen2", Card("tiny", "tiny"))
    return file.read_bytes()


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*fields: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    return (
        HEAD
        + struct.pack("<QQ", tensors, len(fields) if count is None else count)
        + b"".join(fields)
    )


IMPOSSIBLE = {
    "fields": header(count=2**60),
    "tensors": header(tensors=2**60),
    "key": header(struct.pack("<Q", 2**62)),
    "text": header(text(b"a") + struct.pack("<IQ", TEXT, 2**61)),
    "array": header(text(b"a") + struct.pack("<IIQ", ARRAY, UINT8, 2**61)),
    "dimensions": header(text(b"a") + struct.pack("<I", 2**31), tensors=1, count=0),
    "tensor": header(text(b"a") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0), tensors=1, count=0),
    "offset": header(text(b"a") + struct.pack("<IQIQ", 1, 32, 0, 2**62), tensors=1, count=0),
    "type": header(text(b"a") + struct.pack("<I", 99)),
    "magic": b"GGML" + header()[4:],
    "empty": b"",
}


@pytest.mark.parametrize("content", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_sizes_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.gguf is no complete GGUF file: "):
        damage.assert_one_paragraph(lambda: read_fields(file))


def test_a_header_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "MAX_READS", 1000)
    file = tmp_path / "a.gguf"
    file.write_bytes(header(text(b"a") + struct.pack("<IIQ", ARRAY, UINT8, 2000) + bytes(2000)))
    with pytest.raises(ModelError, match="its header does not end"):
        read_fields(file)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="no regular file"):
        read_fields(tmp_path / "a.gguf")


@pytest.mark.parametrize("context", [0, -5, "x", [1]])
def test_a_context_that_no_model_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: Any
) -> None:
    fields = {"general.architecture": "qwen3", "qwen3.context_length": context}
    monkeypatch.setattr(backend, "read_fields", lambda _: fields)
    with pytest.raises(ModelError, match=r"a\.gguf cannot be used: "):
        Gguf(tmp_path / "a.gguf")


@damage.counts
def test_damaged_headers(sound: bytes, tmp_path: Path, count: int) -> None:
    size = sound.index(b"token_embd.weight")

    def read(content: bytes) -> None:
        file = tmp_path / "a.gguf"
        file.write_bytes(content)
        fields = read_fields(file)
        with backend.refusing(str(file), ModelError):
            tokenizer_of(fields)

    damage.assert_read_or_refused(count, damage.damaged_bytes(sound, size), read)


def test_a_file_by_which_llamacpp_aborts_ends_its_own_process(sound: bytes, tmp_path: Path) -> None:
    """Read by our reader, but by llama.cpp divided by."""
    key = text(b"qwen3.attention.head_count") + struct.pack("<I", UINT32)
    at = sound.index(key) + len(key)
    file = tmp_path / "a.gguf"
    for heads in (0, 2**31):
        file.write_bytes(sound[:at] + struct.pack("<I", heads) + sound[at + 4 :])
        assert read_fields(file)["qwen3.attention.head_count"] == heads
        with pytest.raises(ModelError, match=r"llama.cpp cannot (load|use) a.gguf: it is damaged"):
            damage.assert_one_paragraph(lambda: Gguf(file))


def test_requests_after_its_end_are_refused(sound: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(sound)
    llama = LlamaCpp(file, 64)
    llama.process.kill()
    llama.process.wait()
    with pytest.raises(ModelError, match=r"llama.cpp cannot use a.gguf.*SIGKILL"):
        llama.ask("/tokenize", content="a")
    with pytest.raises(ModelError, match=r"llama\.cpp cannot use a\.gguf"):
        list(llama.complete(prompt=[1]))
