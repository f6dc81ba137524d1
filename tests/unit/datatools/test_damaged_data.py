"""The tools on damaged data, and damaged answers of hosts: read, or refused in one paragraph."""

from __future__ import annotations

import gzip
import json
import lzma
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import damage
import pytest
from hypothesis import strategies as st

from minigpt.data import tokenizer as tokenizers
from minigpt.datatools import fetch
from minigpt.datatools.check import Checker, Findings
from minigpt.datatools.show import plain, segments
from minigpt.datatools.stats import measure, section, terminal
from minigpt.errors import MiniGPTError

CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
ROWS: list[dict[str, Any]] = [
    {"text": "the cat sat"},
    {"messages": CHAT},
    {"prompt": "the", "chosen": "cat", "rejected": "mat"},
    {"instruction": "the", "input": "", "output": "cat"},
]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@damage.counts
def test_damaged_data(tokenizer_dir: Path, tmp_path: Path, count: int) -> None:
    tokenizer = tokenizers.load(tokenizer_dir)
    file = tmp_path / "rows.jsonl"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        with suppress(MiniGPTError):
            report = measure(file, None, tokenizer, 64, 256, None)
            terminal(report)
            section(report)
        with suppress(MiniGPTError):
            list(map(plain, segments(file, tokenizer)))
        checker = Checker(Findings(), None, [], [], tokenizer, 64, 0.8)
        checker.check(file)
        checker.finish()
        (tmp_path / "fixed.jsonl").unlink(missing_ok=True)
        checker.write_fixed(file, tmp_path / "fixed.jsonl")

    rows = st.one_of(*map(damage.damaged_json, ROWS)).map(lambda row: LINES + row + b"\n")
    packed = [damage.damaged_bytes(pack(LINES)) for pack in (gzip.compress, lzma.compress)]
    damage.assert_read_or_refused(
        count, st.one_of(rows, damage.damaged_bytes(LINES), *packed), read
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_row_without_end_is_an_error_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minigpt: Any, encoding: str
) -> None:
    monkeypatch.setattr("minigpt.data.formats.LARGEST_ROW", 2000)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        ('{"text": "a"}\n{"text": "' + "xxxxxxxxx\0\0\0" * 400 + '"}\n').encode(encoding)
    )
    outcome = minigpt("data", "check", file, "--fix", tmp_path / "fixed.jsonl")
    assert outcome.status == 2
    assert f"{file}:2: the row has more than 2,000 bytes" in outcome.out
    assert not (tmp_path / "fixed.jsonl").exists()


@damage.counts
def test_damaged_rows_of_corpora(tmp_path: Path, count: int) -> None:
    rows = [{"title": "a", "author": "b", "paragraphs": ["c", "d"]}, *ROWS]

    def usable(corpus: fetch.Corpus) -> None:
        converted = corpus.convert(tmp_path / "rows")
        b"".join(fetch._usable(converted, corpus.kind, fetch.Counter()))

    def read(content: bytes) -> None:
        (tmp_path / "rows").write_bytes(content)
        for name, corpus in fetch.CORPORA.items():
            if name in ("tang-poems", "minimind-pretrain", "tinystories", "medical-zh"):
                with suppress(MiniGPTError):
                    damage.assert_one_paragraph(partial(usable, corpus))

    damaged = st.one_of(*map(damage.damaged_json, rows), damage.damaged_bytes(LINES))
    damage.assert_read_or_refused(count, damaged, read)


@contextmanager
def answering(answers: list[bytes]) -> Iterator[str]:
    """Serve whatever is the last of the answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    with connection, suppress(OSError):
                        connection.recv(1 << 16)
                        connection.sendall(answers[-1])

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@damage.counts
def test_damaged_answers_of_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    head = (
        f'HTTP/1.1 200 OK\r\nETag: "{"0" * 40}"\r\nContent-Length: {len(LINES)}\r\n'
        "Connection: close\r\n\r\n"
    ).encode()
    answers = [b""]
    with answering(answers) as url:
        monkeypatch.setattr(fetch, "MODELSCOPE", url)
        monkeypatch.setattr(fetch, "_TIMEOUT", 5)

        def read(content: bytes) -> None:
            answers.append(content)
            for left in (tmp_path / "public").rglob("*"):
                if left.is_file():
                    left.unlink()
            fetch.fetch("minimind-medical", tmp_path / "public", modelscope=True)

        damage.assert_read_or_refused(count, damage.damaged_bytes(head + LINES), read)
