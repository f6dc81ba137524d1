"""Files with everything wrong with them, and a stub of the hosts that corpora come from."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from minigpt.data import tokenizer as tokenizers

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows (values, or bytes as they are) as a JSONL file of the test's own."""

    def write_here(rows: Iterable[object], name: str = "rows.jsonl") -> Path:
        lines = (
            row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()
            for row in rows
        )
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return tmp_path / name

    return write_here


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    rows = [{"text": text} for text in ("the cat sat on the mat", "春眠不觉晓，处处闻啼鸟。") * 4]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizers.save(tokenizers.train([root / "rows.jsonl"], 290), root / "tokenizer")
    return root / "tokenizer"


class Stub(ThreadingHTTPServer):
    """Serves files by path as the hub, ModelScope and GitHub do.

    Attributes:
        files: path to content; `etags` may state another checksum for a path.
        breaks: how many answers are to break off half-way.
        asked: (method, path, Range header) of each request.
        secrets: what requests bring that only their user has.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.breaks = 0
        self.asked: list[tuple[str, str, str | None]] = []
        self.secrets: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet about the connections that tests break."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def do_GET(self) -> None:
        path, wanted = unquote(self.path), self.headers.get("Range")
        self.server.asked.append((self.command, path, wanted))
        self.server.secrets += self.headers.get_all("Authorization", [])
        content = self.server.files.get(path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = self.server.etags.get(path, f'"{hashlib.sha256(content).hexdigest()}"')
        same = self.headers.get("If-Range", etag) == etag
        start = int(wanted.split("=")[1].split("-")[0]) if wanted and same else 0
        if wanted and same and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if wanted and same else 200)
        if wanted and same:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command == "GET" and self.server.breaks:
            self.server.breaks -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
