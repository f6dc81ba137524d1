"""Fetch named public corpora as JSONL: licence first, resumed, verified, converted.

Hub files come through `huggingface_hub`, which honours HF_ENDPOINT; others through plain
HTTPS. Files are verified against the checksum that the host states. Raw GitHub files have
none: the SHA-256 of the download is written down beside the rows.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from minigpt import progress
from minigpt.data.formats import Kind, iter_rows, lines_of, open_data, parse_row
from minigpt.data.tables import LARGEST_ROW
from minigpt.data.tokenizer import SPECIAL_TOKENS
from minigpt.errors import ConfigError, DataError
from minigpt.files import atomic_file, follow_no_link, is_disk_error, write_json
from minigpt.reading import reason_of

Rows = Iterator[dict[str, Any]]

HUB, MODELSCOPE = "https://huggingface.co", "https://modelscope.cn"
GITHUB = "https://raw.githubusercontent.com"
_TIMEOUT = 30  # seconds without a byte
_BLOCK = 1 << 20  # bytes that are read at once
_LARGEST = 1 << 36  # bytes of a file whose host does not say how long it is
_MARKS = re.compile(r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>|</?s>")


def _as_is(path: Path) -> Rows:
    for _, row in iter_rows(path):
        yield row if isinstance(row, dict) else {}


def _marked(path: Path) -> Rows:
    """Texts with another tokenizer's control tokens, of which line breaks are made."""
    for row in _as_is(path):
        pieces = map(str.strip, _MARKS.split(str(row.get("text", ""))))
        yield {"text": "\n".join(filter(None, pieces))}


def _stories(path: Path) -> Rows:
    """Plain text whose documents end with a line <|endoftext|>."""
    lines: list[str] = []
    size = 0
    with open_data(path) as file:
        for line in lines_of(file):
            if line.strip() == b"<|endoftext|>":
                yield {"text": "".join(lines).strip()}
                lines, size = [], 0
                continue
            text = line.decode("utf-8", "replace")
            lines.append(text.replace("\r\n", "\n").replace("\r", "\n"))
            size += len(line)
            if size > LARGEST_ROW:
                raise DataError(f"a document of more than {LARGEST_ROW:,} bytes", path=path)
    yield {"text": "".join(lines).strip()}


def _poems(path: Path) -> Rows:
    """Poems as title (of a ci, its tune), author and lines."""
    for row in _as_is(path):
        head = (row.get("title") or row.get("rhythmic"), row.get("author"))
        lines = row.get("paragraphs")
        parts = (*head, *(lines if isinstance(lines, list) else ()))
        yield {"text": "\n".join(str(part) for part in parts if part)}


def _instructions(path: Path) -> Rows:
    for row in _as_is(path):
        yield {key: row.get(key, "") for key in ("instruction", "input", "output")}


class Download(NamedTuple):
    """A file that has been fetched, and the checksum that the host states; "" if it states none."""

    url: str
    path: Path
    revision: str
    checksum: str


class Repository(NamedTuple):
    """A repository of corpora on the hub or GitHub, and its licence as stated."""

    name: str
    licence: str
    github: bool = False
    modelscope: str = ""  # its name there, if it has one

    @property
    def page(self) -> str:
        """The address of the repository's page."""
        return ("https://github.com/" if self.github else f"{HUB}/datasets/") + self.name


class Corpus(NamedTuple):
    """A public corpus: what it is, the kind of its rows, its files, and how they become rows."""

    about: str
    kind: Kind
    repository: Repository
    files: tuple[str, ...]
    convert: Callable[[Path], Rows] = _as_is


_MINIMIND = Repository(
    "jingyaogong/minimind_dataset",
    "Apache-2.0 and CC-BY-NC-2.0; gathered from other sets, whose terms apply as well",
    modelscope="gongjy/minimind_dataset",
)
_STORIES = Repository("roneneldan/TinyStories", "CDLA-Sharing-1.0")
_POETRY = Repository(
    "chinese-poetry/chinese-poetry", "MIT; the poems are in the public domain", True
)
_MEDICAL = Repository("shibing624/medical", "Apache-2.0; meant for research, not medical advice")
_TANG = tuple(f"全唐诗/poet.tang.{number}.json" for number in range(0, 58_000, 1000))
_CI = tuple(f"宋词/ci.song.{number}.json" for number in range(0, 22_000, 1000))
_TRAIN, _VAL = "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"
_ZH, _ZH_VAL = "finetune/train_zh_0.json", "finetune/valid_zh_0.json"

CORPORA = {
    "minimind-pretrain": Corpus(
        "Chinese texts, 1.2 GB", "text", _MINIMIND, ("pretrain_t2t_mini.jsonl",), _marked
    ),
    "minimind-sft": Corpus("Chinese chats, 1.7 GB", "chat", _MINIMIND, ("sft_t2t_mini.jsonl",)),
    "minimind-dpo": Corpus("preference pairs, 54 MB", "preference", _MINIMIND, ("dpo.jsonl",)),
    "minimind-medical": Corpus(
        "Chinese medical chats, 34 MB", "chat", _MINIMIND, ("lora_medical.jsonl",)
    ),
    "tinystories": Corpus(
        "stories in simple English, 2.2 GB", "text", _STORIES, (_TRAIN,), _stories
    ),
    "tinystories-val": Corpus("the same, held out, 22 MB", "text", _STORIES, (_VAL,), _stories),
    "tang-poems": Corpus("57,000 poems, traditional characters", "text", _POETRY, _TANG, _poems),
    "song-ci": Corpus("21,000 ci", "text", _POETRY, _CI, _poems),
    "medical-zh": Corpus("1.95 million Chinese questions", "chat", _MEDICAL, (_ZH,), _instructions),
    "medical-zh-val": Corpus(
        "the same, held out, 500 rows", "chat", _MEDICAL, (_ZH_VAL,), _instructions
    ),
}


def fetch(
    name: str,
    directory: Path,
    modelscope: bool = False,
    limit: int | None = None,
    files: tuple[str, ...] = (),
) -> tuple[Path, int, Counter[str]]:
    """Fetch a corpus; return the JSONL file, its rows, and rows left out by reason.

    Args:
        name: a key of `CORPORA`.
        directory: gets NAME.jsonl, NAME.source.json and the downloads.
        modelscope: take the files from ModelScope instead of the hub.
        limit: stop after so many rows.
        files: other files of the same repository.

    Raises:
        ConfigError: when the corpus is there already, another process fetches it, or a file cannot
            be fetched.
        DataError: when a file is not what the host's checksum or the format says.
    """
    corpus = CORPORA[name]
    out = directory / f"{name}.jsonl"
    if modelscope and not corpus.repository.modelscope:
        raise ConfigError(f"{name} is not on ModelScope. Leave out --source modelscope.")
    if out.exists():
        raise ConfigError(f"{out} exists already. Remove it, or choose another --output_dir.")
    sources: dict[str, dict[str, str]] = {}
    skipped: Counter[str] = Counter()

    def converted() -> Rows:
        for file in files or corpus.files:
            path, sources[file] = _download(
                corpus.repository, file, directory / ".downloads", modelscope
            )
            with progress.shown(f"converting {file}"):
                yield from corpus.convert(path)

    written = 0
    with atomic_file(out, exclusive=True) as partial:  # downloads are appended to, too
        with partial.open("wb") as lines:
            for line in islice(_usable(converted(), corpus.kind, skipped), limit):
                lines.write(line)
                written += 1
        if not written:
            raise DataError(f"no row of {name} can be used: {dict(skipped)}. Has its form changed?")
        origin = {"licence": corpus.repository.licence, "page": corpus.repository.page}
        counts = {"rows": written, "skipped": skipped}
        write_json(directory / f"{name}.source.json", origin | {"files": sources} | counts)
    return out, written, skipped


def _usable(rows: Rows, kind: Kind, skipped: Counter[str]) -> Iterator[bytes]:
    """Yield the rows that training can use, as lines, and count the others by reason."""
    for row in rows:
        try:
            parse_row(row, kind, SPECIAL_TOKENS)
            yield (json.dumps(row, ensure_ascii=False) + "\n").encode()
        except DataError as error:
            skipped[error.reason] += 1
        except UnicodeEncodeError:
            skipped["lone_surrogate"] += 1


def _download(
    repository: Repository, file: str, directory: Path, modelscope: bool
) -> tuple[Path, dict[str, str]]:
    """Return a verified file and where it came from.

    All of the corpora are public: the user's HF_TOKEN is not sent, to the hub or to a mirror.
    """
    quoted = urllib.parse.quote(file)
    try:
        if modelscope:
            url = f"{MODELSCOPE}/datasets/{repository.modelscope}/resolve/master/{quoted}"
            download = _from_web(url, directory / repository.modelscope / file)
        elif repository.github:
            url = f"{GITHUB}/{repository.name}/master/{quoted}"
            download = _from_web(url, directory / repository.name / file)
        else:
            download = _from_hub(repository.name, file, directory / repository.name)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if is_disk_error(error) or (isinstance(error, PermissionError) and error.filename):
            raise  # it is this machine that cannot take the file
        raise ConfigError(
            f"Cannot fetch {file} of {repository.name}: {reason_of(error)}. Run the command again "
            "to go on where it stopped, set HF_ENDPOINT to a mirror of the hub, or fetch the file "
            "by hand. If it is there no more, name another with --file: they are listed at "
            f"{repository.page}."
        ) from error
    path = download.path
    sha256, git_sha1 = _checksums(path)
    if download.checksum not in ("", sha256, git_sha1):
        path.unlink()
        problem = f"its checksum is {sha256}, but the host says {download.checksum}"
        raise DataError(problem, path=path, remedy="It was removed; run the command again.")
    return path, {"url": download.url, "revision": download.revision, "sha256": sha256}


def _checksums(path: Path) -> tuple[str, str]:
    """Return a file's SHA-256 and, as hosts state it for small files, git's SHA-1 of it."""
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            git.update(block)
    return sha256.hexdigest(), git.hexdigest()


def _from_hub(repository: str, file: str, directory: Path) -> Download:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(repository, file, repo_type="dataset")
    try:
        metadata = get_hf_file_metadata(url, token=False)
        revision = metadata.commit_hash or "main"
        path = hf_hub_download(
            repository,
            file,
            repo_type="dataset",
            revision=revision,
            local_dir=directory,
            token=False,
        )
    except Exception as error:  # of whichever HTTP library the hub's client is built on
        raise ConnectionError(f"{url}: {error}") from error
    etag = metadata.etag or ""
    return Download(url, Path(path), revision, etag if len(etag) in (40, 64) else "")


def _from_web(url: str, path: Path) -> Download:
    """Download a file; an earlier attempt is resumed if the host still has the same version."""
    part = path.with_name(path.name + ".part")
    tag = path.with_name(path.name + ".etag")
    part.parent.mkdir(parents=True, exist_ok=True)
    etag = tag.read_text() if tag.exists() else ""
    if path.exists() and tag.exists():
        return Download(url, path, "master", _sha256(etag))
    headers = {"User-Agent": "minigpt", "Accept-Encoding": "identity"}
    if etag and part.exists():
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": etag}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or "Range" not in headers:
            raise
        part.unlink()  # it was complete already, or is longer than the file
        return _from_web(url, path)
    with response:
        etag = response.headers.get("ETag") or ""
        length = response.headers.get("Content-Length")
        with open(tag, "w", opener=follow_no_link) as file:
            file.write(etag)
        received = 0
        with (
            open(part, "ab" if response.status == 206 else "wb", opener=follow_no_link) as file,
            progress.shown(f"fetching {path.name}"),
        ):
            while block := response.read(_BLOCK):
                received += file.write(block)
                if received > _LARGEST:
                    raise ConnectionError(f"the file is longer than {_LARGEST:,} bytes")
                progress.report(received, int(length or 0))
    if length not in (None, str(received)):
        raise ConnectionError(f"the connection broke after {received} of {length} bytes")
    part.replace(path)
    return Download(url, path, "master", _sha256(etag))


def _sha256(etag: str) -> str:
    """Return the SHA-256 that an ETag states, or "" if it is of another kind."""
    return etag.strip('"') if re.fullmatch('"?[0-9a-f]{64}"?', etag) else ""
