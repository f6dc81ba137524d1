"""The token store: a file's rows as token ids on disk, built once and read where they are needed.

A store is a directory named after a digest of what it was made from (the file's content,
the tokenizer, the limits). It is built beside its final path and renamed when complete, so one
that was cut off is never used. It is read by `pread`, not mapped: a file that is cut off or lost
while a run reads it is an error like any other, where touching a mapping would kill the process.

Arrays (N tokens, S samples):
    tokens.bin    [N] uint16 or uint32   ids of all samples, one after the other
    targets.bin   [N] bool               chats only: which tokens the model must say
    samples.bin   [S] SAMPLE             where each sample lies, which row it came from, and that
                                         row's margin or label
    lengths.bin   [S] int32              tokens of each sample; on its own, since it is held in
                                         memory: an epoch's order passes through all of it
    sums.bin      uint32                 CRC-32 of meta.json, then of each block of the others
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import struct
import weakref
import zlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from minigpt.data.batch import Sample
from minigpt.data.chat import ChatCodec, MaskedIds, PlannedTurn, UnitIds, refused_texts
from minigpt.data.formats import (
    BadRows,
    Chat,
    Kind,
    Record,
    Source,
    Text,
    Unpaired,
    changes,
    hash_reads,
    read_records,
    scan_rows,
    suffix_of,
    unused_problem,
)
from minigpt.data.tokenizer import document_end, document_start, id_count, with_start
from minigpt.errors import ConfigError, DataError
from minigpt.files import (
    GONE,
    NEW,
    is_private,
    make_private,
    remove_directory,
    staging,
    sync,
    write_json,
)
from minigpt.files import cache_dir as default_cache
from minigpt.files import digest as file_digest

log = logging.getLogger(__name__)

FORMAT = 9
ROWS_AT_A_TIME = 1024  # bounds memory while all cores tokenise
ARRAYS = ("tokens", "samples", "lengths", "targets")
SUMS = "sums.bin"
BLOCK = 1 << 14  # bytes with one sum: who first reads any of them reads and checks all
DAMAGED = "damaged"  # an empty file in a store in which a run has found damage
ELEMENTS_AT_A_TIME = 1 << 16
# A sample is a prompt and its answers, by their lengths: a text or chat is one answer without a
# prompt; a preference has the prompt, the chosen and the rejected answer; an unpaired row has the
# prompt, the completion, and the one of another prompt that KTO compares with.
SAMPLE = np.dtype(
    [
        ("start", "<i8"),
        ("line", "<i8"),
        ("prompt", "<i4"),
        ("answers", "<i4", (2,)),
        ("margin", "<f4"),
        ("desirable", "?"),
    ]
)
SAMPLE_STRUCT = struct.Struct("<qqiiif?")  # the same as bytes


@dataclass(frozen=True)
class Limits:
    """How rows become samples.

    Args:
        max_length: tokens of a sample (of prompt plus the longer answer for preferences).
            Longer texts are split, chats cut at the end, prompts of preferences cut at the
            start.
        max_prompt_length: tokens of a preference's prompt.
        data_limit: use only the first rows of each file.
        on_bad_row: stop at the first bad row, or skip and count it.
        max_bad_share: share of bad rows above which skipping stops with an error.
        max_too_long_share: share of rows above which leaving out those of which `max_length` leaves
            nothing to learn stops with an error.
        columns: (name in the file, name in MiniGPT) of the rows' keys that differ.
    """

    max_length: int = 512
    max_prompt_length: int | None = None
    data_limit: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    max_bad_share: float = 0.05
    max_too_long_share: float = 0.05
    columns: tuple[tuple[str, str], ...] = ()


@dataclass
class EncodedSample:
    """One sample on its way into the store.

    Attributes:
        prompt: ids of what is only read.
        answers: ids of each answer; a text or chat is a single one.
        targets: for a chat, which ids of the answer are trained on.
        margin: of a preference.
        desirable: whether an unpaired row's completion is.
    """

    prompt: list[int]
    answers: list[list[int]]
    targets: list[bool] | None = None
    margin: float = 0.0
    desirable: bool = False

    @property
    def ids(self) -> list[int]:
        """The prompt and all answers, one after the other."""
        return list(chain(self.prompt, *self.answers))


def damaged(store: Path, source: Path, problem: str) -> DataError:
    """Return the error for a store that is not what was written, and have it built again."""
    try:
        (store / DAMAGED).touch()
        remedy = "It is built again at the next start; go on with --ckpt_path auto."
    except OSError:
        remedy = "Remove it, and go on with --ckpt_path auto."
    problem = f"its token store {store} is damaged: {problem}"
    return DataError(problem, path=source, remedy=remedy, reason="damaged_store")


class StoredArray:
    """A file of a store, of which parts are read; each block is compared with its sum once.

    Args:
        file: in the store's directory.
        source: the data file, for errors.
        dtype: of its elements.
        sums: [blocks] CRC-32 of each block.
    """

    def __init__(self, file: Path, source: Path, dtype: Any, sums: NDArray[np.uint32]) -> None:
        self.file = file
        self.source = source
        self.dtype = np.dtype(dtype)
        self.sums = sums
        self.handle = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self.handle)
        self.size = os.fstat(self.handle).st_size
        self.verified = bytearray(len(sums))  # which blocks are: 0 or 1

    def __reduce__(self) -> tuple[object, ...]:
        """Let worker processes that are not forked open the file again."""
        return type(self), (self.file, self.source, self.dtype, self.sums)

    def __len__(self) -> int:
        return int(self.size // self.dtype.itemsize)

    def __getitem__(self, index: slice) -> NDArray[Any]:
        start, stop, _ = index.indices(len(self))
        width = self.dtype.itemsize
        return np.frombuffer(self.read(start * width, stop * width), self.dtype)

    def portions(self) -> Iterator[NDArray[Any]]:
        """Yield all elements, `ELEMENTS_AT_A_TIME` of them at a time."""
        for start in range(0, len(self), ELEMENTS_AT_A_TIME):
            yield self[start : start + ELEMENTS_AT_A_TIME]

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`.

        Raises:
            DataError: when they are not what was written.
        """
        if not 0 <= start <= stop <= self.size:
            raise self._damaged(f"it refers to bytes {start} to {stop} of {self.file.name}")
        first, last = start // BLOCK, -(-stop // BLOCK)
        if self.verified.find(0, first, last) < 0:
            return self._pread(start, stop)
        offset = first * BLOCK
        data = self._pread(offset, min(last * BLOCK, self.size))
        view = memoryview(data)
        for number in range(first, last):
            at = number * BLOCK - offset
            if zlib.crc32(view[at : at + BLOCK]) != self.sums[number]:
                raise self._damaged(f"block {number} of {self.file.name} is not what was written")
            self.verified[number] = 1
        return data[start - offset : stop - offset]

    def _pread(self, start: int, stop: int) -> bytes:
        try:
            data = os.pread(self.handle, stop - start, start)
        except OSError as error:
            problem = f"its token store cannot be read: {self.file}: {error.strerror}"
            remedy = "Look at the disk, and go on with --ckpt_path auto."
            raise DataError(problem, path=self.source, remedy=remedy) from error
        if len(data) != stop - start:
            raise self._damaged(f"{self.file.name} is shorter than it was")
        return data

    def _damaged(self, problem: str) -> DataError:
        return damaged(self.file.parent, self.source, problem)


class TokenStore:
    """A finished store.

    Attributes:
        tokens: [N] ids.
        targets: [N] which tokens the model must say, for chats; else None.
        samples: [S] structured array of dtype `SAMPLE`.
        meta: counts of rows, samples, tokens, cut and dropped rows.

    Raises:
        OSError: when a file of it is missing or cannot be read.
        ValueError: when it is incomplete, damaged or of an earlier version.
        DataError: when its lengths are damaged.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self.source = source
        self.meta: dict[str, Any]
        self.meta, sums = _read_meta(path)
        dtypes = {"tokens": self.meta["dtype"], "samples": SAMPLE, "lengths": "<i4"}
        arrays: dict[str, StoredArray] = {}
        for name, count in _block_counts(path).items():
            file, dtype = path / f"{name}.bin", dtypes.get(name, np.bool_)
            arrays[name] = StoredArray(file, source, dtype, sums[:count])
            sums = sums[count:]
        self.tokens, self.samples = arrays["tokens"], arrays["samples"]
        self.targets = arrays.get("targets")
        self.highest_id: int = self.meta["highest_id"]
        self._lengths: NDArray[np.int32] = np.concatenate(list(arrays["lengths"].portions()))

    def sample(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            DataError: when it is not what was written.
        """
        size = SAMPLE_STRUCT.size
        fields = SAMPLE_STRUCT.unpack(self.samples.read(index * size, (index + 1) * size))
        start, line, prompt, *lengths, margin, desirable = fields
        answers = tuple(length for length in lengths if length)
        end = start + prompt + sum(answers)
        ids = self.tokens[start:end]
        if not 0 < len(ids) == end - start or ids.max() > self.highest_id:
            raise damaged(self.path, self.source, f"sample {index} is not what was written")
        return Sample(
            ids=ids,
            prompt=prompt,
            answers=answers,
            targets=None if self.targets is None else self.targets[start:end],
            source=(str(self.source), line),
            margin=margin,
            desirable=desirable,
        )

    @property
    def digest(self) -> str:
        """The digest of what it was made from, with which its name ends."""
        return self.path.name.rsplit("-", 1)[-1]

    def lengths(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens [K] of the samples numbered `index` [K]."""
        return self._lengths[index].astype(np.int64)

    def lines(self) -> NDArray[np.int64]:
        """Return the row [S] that each sample came from."""
        return np.concatenate([samples["line"].copy() for samples in self.samples.portions()])

    def desirable(self) -> NDArray[np.bool_]:
        """Return which samples [S] are desirable."""
        return np.concatenate([samples["desirable"].copy() for samples in self.samples.portions()])

    def __len__(self) -> int:
        return len(self.samples)


def _read_meta(path: Path) -> tuple[dict[str, Any], NDArray[np.uint32]]:
    """Return what a store's meta.json says, and the sums of its arrays.

    Raises:
        ValueError: when these do not fit each other and the sizes of the arrays.
    """
    data = (path / "meta.json").read_bytes()
    sums = np.fromfile(path / SUMS, "<u4")
    blocks = sum(_block_counts(path).values())
    if len(sums) != 1 + blocks or zlib.crc32(data) != sums[0] or (path / DAMAGED).exists():
        raise ValueError(f"{path} is incomplete, damaged or of an earlier version")
    meta: dict[str, Any] = json.loads(data)
    tokens, samples = meta["tokens"], meta["samples"]
    sizes = {"tokens": tokens * np.dtype(meta["dtype"]).itemsize, "targets": tokens}
    sizes |= {"samples": samples * SAMPLE.itemsize, "lengths": samples * 4}
    for name in _block_counts(path):
        if (path / f"{name}.bin").stat().st_size != sizes[name]:
            raise ValueError(f"{name}.bin has not the size that meta.json speaks of")
    return meta, sums[1:]


def _block_counts(path: Path) -> dict[str, int]:
    """Return how many blocks each array has; only chats have targets."""
    files = {name: path / f"{name}.bin" for name in ARRAYS}
    if not files["targets"].exists():
        del files["targets"]
    return {name: -(-file.stat().st_size // BLOCK) for name, file in files.items()}


def write_sums(path: Path) -> None:
    """Write the sums of a store whose other files are complete."""
    sums = array("L", [zlib.crc32((path / "meta.json").read_bytes())])
    for name in _block_counts(path):
        with (path / f"{name}.bin").open("rb") as file:
            while block := file.read(BLOCK):
                sums.append(zlib.crc32(block))
    np.asarray(sums, "<u4").tofile(path / SUMS)
    sync(path / SUMS)


def open_store(
    source: str | Path,
    kind: Kind,
    tokenizer: PreTrainedTokenizerFast,
    limits: Limits,
    cache_dir: str | Path | None = None,
) -> TokenStore:
    """Return the store of `source`, building it when it does not exist yet.

    Raises:
        DataError: for an unreadable file, a bad row, a file that leaves no sample, or one that
            changes while it is read.
    """
    source = Path(source)
    root = Path(cache_dir) if cache_dir else default_cache() / "tokens"
    content = _content_digest(source)
    digest = _store_digest(content, suffix_of(source), kind, tokenizer, limits)
    path = root / f"{source.stem}-{digest}"
    store = _opened(path, source)
    if store is None:
        if path.exists():
            log.warning("%s: built again.", _problem(path))
        _build(source, content, kind, tokenizer, limits, path)
        store = TokenStore(path, source)
    elif suffix_of(source) == ".txt":
        next(scan_rows(source))  # says what a document is, as building did
    warn_of_rows(source, tuple(store.meta["notes"]))
    return store


def _problem(path: Path) -> str:
    """Say why a store cannot be used."""
    if is_private(path):
        return f"The token store {path} is damaged, or of an earlier version"
    return f"The token store {path} is another user's, or others may write to it"


def _opened(path: Path, source: Path) -> TokenStore | None:
    """Return a store; None when it is missing, damaged, of an earlier version or another user's.

    Raises:
        DataError: when it may be whole, but cannot be read.
    """
    try:
        return TokenStore(path, source) if is_private(path) else None
    except (ValueError, KeyError, TypeError, DataError):
        return None
    except OSError as error:
        if error.errno in GONE:
            return None
        problem = f"its token store cannot be read: {error.filename or path}: {error.strerror}"
        remedy = "Make it readable, or give another directory with data.init_args.cache_dir."
        raise DataError(problem, path=source, remedy=remedy) from error


def _content_digest(source: Path) -> str:
    """Return a digest of a file's bytes.

    Raises:
        DataError: when the file is missing.
    """
    if not source.is_file():
        raise DataError("no such file", path=source, remedy="Check the path.", reason="missing")
    return file_digest(source)


def _store_digest(
    content: str, suffix: str, kind: Kind, tokenizer: PreTrainedTokenizerFast, limits: Limits
) -> str:
    """Return a digest of all that decides a store's content."""
    key = {
        "format": FORMAT,
        "kind": kind,
        "limits": asdict(limits),
        "content": content,
        "suffix": suffix,  # by which it is read
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "template": str(tokenizer.chat_template) if kind != "text" else "",
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


class _Writer:
    """Appends samples to the arrays of a store, keeping only counts in memory."""

    def __init__(self, directory: Path, dtype: str, kind: Kind) -> None:
        self.dtype = np.dtype(dtype)
        self.code = self.dtype.char  # of an array, which takes short lists faster than numpy does
        names = ["tokens", "samples", "lengths"]
        if kind == "chat":
            names.append("targets")
        self.files: dict[str, BinaryIO] = {
            name: (directory / f"{name}.bin").open("wb") for name in names
        }
        self.kind = kind
        self.tokens = self.samples = self.targets = self.highest_id = 0

    def add(self, sample: EncodedSample, line: int) -> None:
        ids = sample.ids
        lengths = [len(answer) for answer in sample.answers]
        lengths += [0] * (2 - len(lengths))
        numbers = (self.tokens, line, len(sample.prompt), *lengths)
        fields = SAMPLE_STRUCT.pack(*numbers, sample.margin, sample.desirable)
        self.files["tokens"].write(array(self.code, ids))
        self.files["samples"].write(fields)
        self.files["lengths"].write(struct.pack("<i", len(ids)))
        if sample.targets is not None:
            self.files["targets"].write(np.asarray(sample.targets, np.bool_).tobytes())
            self.targets += sum(sample.targets[1:])
        elif self.kind == "unpaired":  # whose second answer is only compared with
            self.targets += lengths[0]
        else:  # nothing predicts the first token of a text
            self.targets += len(ids) - (len(sample.prompt) or 1)
        self.highest_id = max(self.highest_id, *ids)
        self.tokens += len(ids)
        self.samples += 1

    def sync(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _build(
    source: Path,
    content: str,
    kind: Kind,
    tokenizer: PreTrainedTokenizerFast,
    limits: Limits,
    path: Path,
) -> None:
    with staging(path) as private:
        partial = private / NEW
        partial.mkdir()
        dtype = "uint16" if id_count(tokenizer) <= 1 << 16 else "uint32"
        writer = _Writer(partial, dtype, kind)
        bad = BadRows(limits.on_bad_row, limits.max_bad_share, limits.max_too_long_share)
        encoder = Encoder(kind, tokenizer, limits)
        refused = refused_texts(tokenizer, kind)
        columns = dict(limits.columns)
        records = read_records([source], kind, bad, limits.data_limit, refused, columns)
        if kind == "unpaired":
            records = with_mismatched(records)
        with closing(writer), _rare_garbage_collection(), hash_reads() as read_hash:
            for sample, origin in encoder.encode(records, bad):
                writer.add(sample, origin.line)
            writer.sync()
        if read_hash.with_rest_of(source) != content:
            raise DataError(
                "the file changed while it was read",
                path=source,
                remedy="Start again when nothing writes to it any more.",
                reason="changed",
            )
        bad.check_too_long(bad.seen)
        if not writer.samples:
            raise DataError(
                f"none of the {encoder.rows} rows leaves a token to train on",
                path=source,
                remedy="Check max_length and the chat template.",
                reason="no_targets",
            )
        bad.check(bad.seen)  # rows that the encoder left out count, too
        meta = {
            "dtype": str(writer.dtype),
            "rows": encoder.rows,
            "samples": writer.samples,
            "tokens": writer.tokens,
            "targets": writer.targets,
            "highest_id": writer.highest_id,
            "cut": encoder.cut,
            "skipped": dict(bad.counts),
            "too_long": bad.too_long,
            "notes": notes_of_rows(source, bad),
        }
        write_json(partial / "meta.json", meta)
        write_sums(partial)
        make_private(partial)
        sync(partial)
        _publish(partial, path)
    _report(source, meta)


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Look for unreachable cycles seldom: rows make none, and looking takes a fifth of the time."""
    thresholds = gc.get_threshold()
    gc.set_threshold(200_000, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _publish(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)
    except OSError:
        if _opened(path, path) is not None:  # another process built the same store
            return
        remove_directory(path)
        if path.exists():
            raise ConfigError(
                f"{_problem(path)}, and cannot be replaced. Remove it, or set MINIGPT_CACHE or "
                "data.cache_dir to a directory of your own."
            ) from None
        partial.rename(path)
    sync(path.parent)


def _report(source: Path, meta: dict[str, Any]) -> None:
    log.info(
        "%s: %d rows, %d samples, %d tokens, %d targets, %d rows cut to the maximum length",
        source,
        *(meta[name] for name in ("rows", "samples", "tokens", "targets", "cut")),
    )


def notes_of_rows(source: Path, bad: BadRows) -> list[str]:
    """Return which rows of a file were left out, or changed so that they could be read."""
    notes = [bad.summary()] if bad.counts else []
    if first := bad.first_too_long:
        lines = f"{bad.too_long} of {bad.seen} rows, the first in line {first.line}"
        notes.append(f"left out, because {first.problem}: {lines}")
    notes += [change for _, _, change in changes(bad.notes[source])]
    if bad.unused:
        notes.append(unused_problem(bad.unused))
    return notes


@cache
def warn_of_rows(source: Path, notes: tuple[str, ...]) -> None:
    """Log the notes on a file's rows, once in a process, which opens a store more than once."""
    for note in notes:
        log.warning("%s: %s", source, note)


def with_mismatched(
    records: Iterable[tuple[Record, Source]],
) -> Iterator[tuple[Record, Source]]:
    """Give each unpaired record the completion of a record with another prompt.

    Which one depends on the file alone: a block of rows is sorted by prompt, and a row's partner is
    half a block further. So each completion is used once, unless more than half of a block's rows
    have the same prompt.

    Raises:
        DataError: when a block has no other prompt.
    """
    records = iter(records)
    earlier: list[tuple[Unpaired, Source]] = []
    while block := cast(list[tuple[Unpaired, Source]], list(islice(records, ROWS_AT_A_TIME))):
        order = sorted(range(len(block)), key=lambda number: block[number][0].prompt)
        half = len(order) // 2
        partners = dict(zip(order, order[half:] + order[:half], strict=True))
        for number, (record, source) in enumerate(block):
            candidates = chain([block[partners[number]]], block, earlier)
            others = (other for other, _ in candidates if other.prompt != record.prompt)
            if (other := next(others, None)) is None:
                raise DataError(
                    f"{len(block)} rows up to line {block[-1][1].line} have one prompt, but KTO "
                    "compares each completion with one of another prompt",
                    path=source.path,
                    line=source.line,
                    remedy="Add rows of other prompts, or shuffle the file.",
                    reason="one_prompt",
                )
            yield record._replace(mismatched=other.completion), source
        earlier = block


Rendered = list[tuple[Record, Source, list[PlannedTurn]]]


class Encoder:
    """Turns records into samples of at most `limits.max_length` tokens.

    Attributes:
        rows: number of rows read.
        cut: number of their samples that lost tokens to the maximum length.
    """

    def __init__(self, kind: Kind, tokenizer: PreTrainedTokenizerFast, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.codec = ChatCodec(tokenizer) if kind != "text" else None
        self.start = document_start(tokenizer) if kind == "text" else []
        self.end = document_end(tokenizer) if kind == "text" else -1
        self.rows = self.cut = 0

    def encode(
        self, records: Iterable[tuple[Record, Source]], bad: BadRows
    ) -> Iterator[tuple[EncodedSample, Source]]:
        """Yield the samples of all records, in order; `bad` counts rows that leave none.

        While the tokenizer's threads encode one block of rows, the next is read.

        Args:
            records: with where each comes from.
            bad: raises or counts rows that cannot be used.
        """
        pending: tuple[Rendered, Future[UnitIds]] | None = None
        records = iter(records)
        with ThreadPoolExecutor(1) as pool:
            while block := list(islice(records, ROWS_AT_A_TIME)):
                self.rows += len(block)
                rendered = self._render(block, bad)
                unit_ids = pool.submit(self._tokenise, _distinct_units(rendered))
                if pending:
                    yield from self._join(*pending, bad)
                pending = (rendered, unit_ids)
            if pending:
                yield from self._join(*pending, bad)

    def _render(self, block: list[tuple[Record, Source]], bad: BadRows) -> Rendered:
        """Render chats as text; a row that the template refuses goes to `bad`."""
        rendered: Rendered = []
        for record, source in block:
            try:
                rendered.append((record, source, self._plan(record)))
            except DataError as error:
                bad.handle(error.at(source.path, source.line))
        return rendered

    def _join(
        self, rendered: Rendered, unit_ids: Future[UnitIds], bad: BadRows
    ) -> Iterator[tuple[EncodedSample, Source]]:
        """Join the ids of rows, and cut them to the limits."""
        ids = unit_ids.result()
        for record, source, turns in rendered:
            samples = list(self._samples(record, turns, ids))
            if not samples:
                problem = f"no target token is left after cutting to {self.limits.max_length}"
                error = DataError(problem, path=source.path, line=source.line, reason="too_long")
                bad.leave_out(error)
            for sample in samples:
                yield sample, source

    def _tokenise(self, units: list[str]) -> UnitIds:
        if self.codec:
            return self.codec.encode_units(units)
        backend = self.tokenizer.backend_tokenizer
        encodings = backend.encode_batch_fast(units, add_special_tokens=False)
        return {text: encoding.ids for text, encoding in zip(units, encodings, strict=True)}

    def _plan(self, record: Record) -> list[PlannedTurn]:
        if isinstance(record, Text):
            return []
        assert self.codec is not None
        if isinstance(record, Chat):
            return self.codec.plan_chat(record.messages)
        if isinstance(record, Unpaired):
            answers = [record.completion]
            if record.mismatched is not None:
                answers.append(record.mismatched)
            return self.codec.plan_answers(record.prompt, answers)
        return self.codec.plan_answers(record.prompt, (record.chosen, record.rejected))

    def _samples(
        self, record: Record, turns: list[PlannedTurn], ids: UnitIds
    ) -> Iterable[EncodedSample]:
        if isinstance(record, Text):
            return self._cut_text([*with_start(ids[record.text], self.start), self.end])
        assert self.codec is not None
        if isinstance(record, Chat):
            return self._cut_chat(self.codec.chat_samples(turns, ids))
        prompts, answers = zip(*(self.codec.turn_ids(turn, ids) for turn in turns), strict=True)
        sample = self._cut_answers(prompts[0], [answer.ids for answer in answers])
        if isinstance(record, Unpaired):
            sample.desirable = record.desirable
            return [sample]
        sample.margin = record.margin
        return [sample] if sample.answers[0] != sample.answers[1] else []  # nothing to prefer

    def _cut_text(self, ids: list[int]) -> Iterator[EncodedSample]:
        """Cut a document into samples that overlap by one token: each token is learnt once."""
        step = self.limits.max_length - 1
        for start in range(0, max(1, len(ids) - 1), step):
            yield EncodedSample([], [ids[start : start + step + 1]])

    def _cut_chat(self, samples: list[MaskedIds]) -> Iterator[EncodedSample]:
        limit = self.limits.max_length
        for ids, targets in samples:
            self.cut += len(ids) > limit
            if any(targets[1:limit]):
                yield EncodedSample([], [ids[:limit]], targets[:limit])

    def _cut_answers(self, prompt: list[int], answers: list[list[int]]) -> EncodedSample:
        prompt_limit = self.limits.max_prompt_length or self.limits.max_length - 1
        prompt_limit = min(prompt_limit, self.limits.max_length - 1)
        answer_limit = self.limits.max_length - min(len(prompt), prompt_limit)
        self.cut += len(prompt) > prompt_limit or max(map(len, answers)) > answer_limit
        return EncodedSample(prompt[-prompt_limit:], [ids[:answer_limit] for ids in answers])


def _distinct_units(rendered: Rendered) -> list[str]:
    """Return what is to be tokenised: whole texts, and the units of chats, each once."""
    units: dict[str, None] = {}
    for record, _, turns in rendered:
        if isinstance(record, Text):
            units[record.text] = None
        for turn in turns:
            units |= dict.fromkeys(chain(*turn.units))
    return list(units)
