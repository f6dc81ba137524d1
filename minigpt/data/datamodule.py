"""LightningDataModules for JSONL: the same for every stage, but for the kind of record."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from minigpt.data.batch import PackedBatch, Sample, collate
from minigpt.data.formats import BatchKind, Kind, Prompt, expand_files, load_prompts
from minigpt.data.order import FileShare, PackedOrder, histogram, spread_evenly
from minigpt.data.store import Limits, TokenStore, open_store
from minigpt.data.tokenizer import check_ids
from minigpt.errors import ConfigError, DataError

log = logging.getLogger(__name__)

T = TypeVar("T")
PackSamples = Callable[[Sequence[Sample], tuple[int, int]], PackedBatch]
Files = str | list[str] | dict[str, float] | None
TWO_ANSWERS: tuple[Kind, ...] = ("preference", "unpaired")  # to one prompt in each sample
TOKENS_AT_A_TIME = 1 << 22  # tokens of a store that are looked at together
LENGTHS_AT_A_TIME = 1 << 16  # samples whose lengths are looked at together
LOOK_AHEAD = 8  # micro-batches whose sizes are looked at together
MOST_WORKERS = 256  # processes that read ahead
ITEMS_AT_A_TIME = 128  # prompts that are generated together
STEP_TOLERANCE = 0.1  # share by which a step may differ from tokens_per_step without a warning


class ModelLimits(Protocol):
    """What samples must fit: `minigpt.model.source.ModelSource`."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer."""

    def embedding_rows(self) -> int:
        """Return how many token ids the model embeds."""

    def check_length(self, length: int, shares_prompts: bool) -> None:
        """Refuse samples of so many tokens if the model does not read them."""


class StageModule(Protocol):
    """What the data asks of the module that it feeds: `minigpt.stages.base.BaseModule`."""

    source: ModelLimits
    reads_last_tokens: bool  # of answers, though they predict nothing

    def load_exam(self, path: str) -> Sequence[object]:
        """Return the items of an exam file."""


class StoreSubset:
    """Some samples of a store, numbered from 0; all of them when `index` is None."""

    def __init__(self, store: TokenStore, index: NDArray[np.int64] | None = None) -> None:
        self.store = store
        self.index = index

    def __len__(self) -> int:
        return len(self.store) if self.index is None else len(self.index)

    def lengths(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens [K] of the samples numbered `numbers` [K]."""
        return self.store.lengths(numbers if self.index is None else self.index[numbers])

    def tokens(self) -> int:
        """Return the tokens of all samples."""
        return sum(int(self.lengths(block).sum()) for block in self._blocks())

    def _blocks(self) -> Iterator[NDArray[np.int64]]:
        for start in range(0, len(self), LENGTHS_AT_A_TIME):
            yield np.arange(start, min(start + LENGTHS_AT_A_TIME, len(self)))

    def statistics(self) -> dict[str, Any]:
        """Return what the store holds, and how many of the samples have how many tokens."""
        return {
            **self.store.meta,
            "file": str(self.store.source),
            "samples": len(self),
            "lengths": histogram(self.lengths(block) for block in self._blocks()),
        }

    def sample(self, number: int) -> Sample:
        """Read one sample."""
        return self.store.sample(number if self.index is None else int(self.index[number]))


class PackedDataset(IterableDataset[PackedBatch]):
    """One pass over the micro-batches of one process, from a given position on.

    Args:
        order: the micro-batches of all processes.
        subsets: where samples are read.
        epoch, start: the first micro-batch to read, counted over all processes.
        rank, world_size: this process and how many there are. Micro-batch j goes to rank
            j % world_size; at an epoch's end the last ones may get fillers.
        pack_samples: makes a batch, as `collate` does.
    """

    def __init__(
        self,
        order: PackedOrder,
        subsets: Sequence[StoreSubset],
        epoch: int,
        start: int,
        rank: int,
        world_size: int,
        pack_samples: PackSamples = collate,
    ) -> None:
        self.order = order
        self.subsets = subsets
        self.epoch = epoch
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self.pack_samples = pack_samples

    def __iter__(self) -> Iterator[PackedBatch]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        for number, (members, is_filler, resume_at) in enumerate(self._local_micro_batches()):
            if number % workers == worker_id:
                samples = [self.subsets[file].sample(index) for file, index in members]
                batch = self.pack_samples(samples, resume_at)
                yield batch.without_targets() if is_filler else batch

    def _local_micro_batches(self) -> Iterator[tuple[list[tuple[int, int]], bool, tuple[int, int]]]:
        """Yield this process's micro-batches: (file, sample) pairs, `is_filler` and `resume_at`."""
        group: list[list[tuple[int, int]]] = []  # one micro-batch for each process
        done = self.start
        micro_batches = islice(self.order.batches(self.epoch), self.start, None)
        following = next(micro_batches, None)
        while following is not None:
            group.append(following)
            following = next(micro_batches, None)
            if len(group) == self.world_size or following is None:
                done += len(group)
                is_filler = self.rank >= len(group)
                resume_at = (self.epoch, done) if following is not None else (self.epoch + 1, 0)
                yield group[0 if is_filler else self.rank], is_filler, resume_at
                group = []


class ErrorsAsItems(IterableDataset[PackedBatch | DataError]):
    """A dataset whose DataError is its last item.

    Raised in a worker process, it would reach the main process as the text of a traceback.
    """

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[PackedBatch | DataError]:
        try:
            yield from self.dataset
        except DataError as error:
            yield error


class PackedDataLoader:
    """Iterable of one epoch's batches that starts at the DataModule's position."""

    def __init__(self, data: JSONLDataModule, training: bool) -> None:
        self.data = data
        self.training = training

    pack_samples = staticmethod(collate)

    def __iter__(self) -> Iterator[PackedBatch]:
        data = self.data
        if self.training:
            order, subsets = data.order, data.train_subsets
            epoch, start = data.position
        else:
            order, subsets = data.val_order, data.val_subsets
            epoch, start = 0, 0
        assert order is not None
        rank, world_size = data.rank, data.world_size
        pack_samples = partial(self.pack_samples, read_last=data.module.reads_last_tokens)
        dataset = PackedDataset(order, subsets, epoch, start, rank, world_size, pack_samples)
        loader = DataLoader(
            ErrorsAsItems(dataset),
            batch_size=None,
            num_workers=data.worker_count,
            pin_memory=data.on_gpu,
            generator=torch.Generator(),  # not the default one, so that dropout stays the same
            worker_init_fn=ignore_signals if data.worker_count else None,
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class JSONLDataModule(LightningDataModule):
    """Packed batches from JSONL files, with the tokenizer of the module that it feeds.

    Args:
        train: file, list of files, or a mapping of files to weights; a weight of 2 means
            that an epoch holds each of the file's samples twice, 0.5 half of them. A folder or a
            pattern such as `texts/*.jsonl` stands for all data files that it holds.
        val: held-out files. Without them, `val_share` of the training rows are held out.
        val_share: share of rows to hold out when `val` is not given; 0 for none.
        exam: exam items for `minigpt test`: file, list of files, folder or pattern, as in `train`.
        predict: JSONL of prompts or chats, for `minigpt predict`.
        max_length: tokens of a sample.
        tokens_per_batch: tokens of a micro-batch, all samples together.
        tokens_per_step: tokens of an optimizer step, of all processes together; how many
            micro-batches a process accumulates follows from it. By default the trainer's
            `accumulate_grad_batches` says that.
        max_prompt_length: tokens of the prompt of a preference or an unpaired row.
        columns: keys of the rows that have other names in MiniGPT, such as {ask: prompt}.
        max_held_out_tokens: how many tokens `val_share` holds out at most; null for no bound.
        max_val_tokens: how many tokens a validation reads at most. Of larger held-out data it reads
            rows that are spread evenly, the same each time; null reads all.
        data_limit: use only the first rows of each training file.
        on_bad_row: stop at a bad row, or skip and count it.
        max_bad_share: share of skipped rows above which the run stops.
        max_too_long_share: share of rows above which the run stops that are left out because
            `max_length` leaves nothing to learn of them.
        seed: decides the order of samples.
        num_workers: processes that read batches ahead; by default 2 beside a GPU, and none on a
            CPU, whose cores the model needs.
        cache_dir: where token stores live; by default `$MINIGPT_CACHE` or ~/.cache/minigpt.
    """

    kind: ClassVar[Kind]
    loader: ClassVar[type[PackedDataLoader]] = PackedDataLoader

    def __init__(
        self,
        train: Files = None,
        val: Files = None,
        val_share: float = 0.1,
        exam: str | list[str] | None = None,
        predict: str | None = None,
        max_length: int = 512,
        tokens_per_batch: int = 8192,
        max_prompt_length: int | None = None,
        data_limit: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        max_bad_share: float = 0.05,
        seed: int = 0,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        tokens_per_step: int | None = None,
        columns: dict[str, str] | None = None,
        max_too_long_share: float = 0.05,
        max_held_out_tokens: int | None = 200_000,
        max_val_tokens: int | None = 100_000,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.train_weights = _weights(train)
        self.val_files = list(_weights(val))
        self.val_share = val_share
        self.exam = list(_weights(exam))
        self.predict = predict
        self.columns = columns or {}
        self.limits = Limits(
            max_length,
            max_prompt_length,
            data_limit,
            on_bad_row,
            max_bad_share,
            max_too_long_share,
            tuple(self.columns.items()),
        )
        self.tokens_per_batch = tokens_per_batch
        self.tokens_per_step = tokens_per_step
        self.max_held_out_tokens = max_held_out_tokens
        self.max_val_tokens = max_val_tokens
        self.all_held_out_tokens = 0  # of which a validation reads at most `max_val_tokens`
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.position = (0, 0)  # (epoch, micro-batches of all processes) done so far
        self.rank = 0
        self.world_size = 1
        self.on_gpu = False
        self.order: PackedOrder | None = None
        self.val_order: PackedOrder | None = None
        self.train_subsets: list[StoreSubset] = []
        self.val_subsets: list[StoreSubset] = []
        self._check()

    def _check(self) -> None:
        if bad := [path for path, weight in self.train_weights.items() if weight <= 0]:
            raise ConfigError(f"data.train: the weight of {bad[0]} must be above 0.")
        if self.limits.max_length < 2:
            raise ConfigError(
                "data.max_length must be at least 2, one token to predict another, but is "
                f"{self.limits.max_length}."
            )
        optional = {
            "max_prompt_length": self.limits.max_prompt_length,
            "data_limit": self.limits.data_limit,
            "tokens_per_step": self.tokens_per_step,
            "max_held_out_tokens": self.max_held_out_tokens,
            "max_val_tokens": self.max_val_tokens,
        }
        for name, value in optional.items():
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, but is {value}.")
        if not 0 <= self.val_share < 1:
            raise ConfigError(
                f"data.val_share is a share, 0 or more and below 1, but is {self.val_share}."
            )
        for name in ("max_bad_share", "max_too_long_share"):
            if not 0 <= (share := getattr(self.limits, name)) <= 1:
                raise ConfigError(f"data.{name} is a share, 0 to 1, but is {share}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"data.seed must lie in 0 to {2**63 - 1}, but is {self.seed}.")
        if not 0 <= (self.num_workers or 0) <= MOST_WORKERS:
            raise ConfigError(
                f"data.num_workers must lie in 0 to {MOST_WORKERS}, but is {self.num_workers}: "
                "each is a process."
            )
        if self.tokens_per_batch < (longest := self.longest_sample):
            raise ConfigError(
                f"data.tokens_per_batch is {self.tokens_per_batch}, but one sample may have "
                f"{longest} tokens. Set it to at least {longest}, or lower max_length."
            )

    @property
    def module(self) -> StageModule:
        """The module that the data feeds."""
        assert self.trainer is not None
        return cast(StageModule, self.trainer.lightning_module)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the module."""
        return self.module.source.tokenizer

    @property
    def worker_count(self) -> int:
        """How many processes read ahead."""
        return (2 if self.on_gpu else 0) if self.num_workers is None else self.num_workers

    def prepare_data(self) -> None:
        """Build the token stores, in one process only.

        Raises:
            ConfigError: when samples may be longer than the model reads.
            DataError: for a row with a token that the model cannot embed.
        """
        source = self.module.source
        source.check_length(self.limits.max_length, self.shares_prompts)
        embedding_rows = source.embedding_rows()
        for path in self._files():
            check_store(self._open(path), source.tokenizer, embedding_rows)

    def setup(self, stage: str) -> None:
        """Open the stores that the verb needs."""
        assert self.trainer is not None
        self.rank = self.trainer.global_rank
        self.world_size = self.trainer.world_size
        self.on_gpu = self.trainer.strategy.root_device.type == "cuda"
        if stage in ("fit", "validate", "test") and self.order is None and self.val_order is None:
            self._setup_data()

    def _setup_data(self) -> None:
        """Divide the samples into those to train on and those held out, and order both."""
        weights = self.train_weights
        self.train_subsets = [StoreSubset(self._open(path)) for path in weights]
        held_out: list[StoreSubset] = []
        if self.val_files:
            held_out = [StoreSubset(self._open(path)) for path in self.val_files]
        elif self.val_share:
            stores = [subset.store for subset in self.train_subsets]
            shares_held_out = [_held_out(store, self.val_share) for store in stores]
            held_out = bounded_rows(shares_held_out, self.max_held_out_tokens)
            self.train_subsets = list(map(_without, stores, held_out))
        self.all_held_out_tokens = sum(subset.tokens() for subset in held_out)
        self.val_subsets = list(filter(len, bounded_rows(held_out, self.max_val_tokens)))
        shares = [
            _share(path, len(subset), weight)
            for subset, (path, weight) in zip(self.train_subsets, weights.items(), strict=True)
        ]
        if shares:
            self.order = self._ordered(self.train_subsets, shares, self.seed, *self._epoch())
        if self.val_subsets:
            whole_files = [FileShare(len(subset), len(subset)) for subset in self.val_subsets]
            self.val_order = self._ordered(self.val_subsets, whole_files, None)

    def _epoch(self) -> tuple[int | None, bool]:
        """Return how many micro-batches an epoch has, if not all, and whether all are the same."""
        trainer = self.trainer
        assert trainer is not None
        limit = trainer.limit_train_batches
        batches = limit * self.world_size if isinstance(limit, int) and limit > 0 else None
        return batches, trainer.overfit_batches > 0  # type: ignore[attr-defined]

    def _ordered(
        self,
        subsets: list[StoreSubset],
        shares: list[FileShare],
        seed: int | None,
        limit: int | None = None,
        repeat: bool = False,
    ) -> PackedOrder:
        lengths = [subset.lengths for subset in subsets]
        return PackedOrder(lengths, shares, self.tokens_per_batch, seed, limit=limit, repeat=repeat)

    def _files(self) -> list[str]:
        return [*self.train_weights, *self.val_files]

    def _open(self, path: str) -> TokenStore:
        return open_store(path, self.kind, self.tokenizer, self.limits, self.cache_dir)

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Return what the training and the held-out samples of each file are."""
        return {
            "train": [subset.statistics() for subset in self.train_subsets],
            "val": [subset.statistics() for subset in self.val_subsets],
        }

    def epoch_tokens(self) -> int:
        """Return about how many tokens an epoch has, weights and limits of batches included."""
        if self.order is None:
            return 0
        pairs = zip(self.train_subsets, self.order.shares, strict=True)
        tokens = sum(subset.tokens() * share.count // share.size for subset, share in pairs)
        limit = self.order.limit
        return tokens if limit is None else min(tokens, limit * self.tokens_per_batch)

    def epoch_micro_batches(self) -> int:
        """Return how many micro-batches an epoch has; of a large one that is an estimate."""
        if self.order is None:
            return 0
        if self.order.is_quick_to_count:
            return self.order.count()
        return -(-self.epoch_tokens() // self.tokens_per_batch)

    def held_out_tokens(self) -> int:
        """Return about how many tokens a validation reads, limits of batches included."""
        assert self.trainer is not None
        tokens = sum(subset.tokens() for subset in self.val_subsets)
        limit = self.trainer.limit_val_batches
        if not isinstance(limit, int):
            return tokens
        return min(tokens, limit * self.tokens_per_batch * self.world_size)

    def held_out_source(self) -> str:
        """Return in words what the validation's rows are a part of, by which options, if any."""
        text = ""
        if not self.val_files and self.val_subsets:
            text = f" of the training data (val_share {self.val_share:g}"
            if self.max_held_out_tokens is not None:
                text += f", at most {self.max_held_out_tokens:,} tokens: max_held_out_tokens"
            text += ")"
        if self.max_val_tokens is not None and self.all_held_out_tokens > self.max_val_tokens:
            held_out = f"{self.all_held_out_tokens:,} held out"
            text = f" (max_val_tokens) of the {held_out}{text}"
        return text

    def accumulation(self, processes: int) -> int:
        """Return how many micro-batches each process accumulates to fill `tokens_per_step`.

        The step is rounded to the nearest multiple of what all processes compute at a time, which
        is logged where it differs; as a warning where it differs by more than `STEP_TOLERANCE`.
        """
        assert self.tokens_per_step is not None
        at_a_time = self.tokens_per_batch * processes
        count = max(1, round(self.tokens_per_step / at_a_time))
        difference = abs(count * at_a_time - self.tokens_per_step)
        if difference:
            is_far = difference > STEP_TOLERANCE * self.tokens_per_step
            log.log(
                logging.WARNING if is_far else logging.INFO,
                "tokens_per_step: %s instead of %s, as %d micro-batches of %s on %s.",
                f"{count * at_a_time:,}",
                f"{self.tokens_per_step:,}",
                count,
                f"{self.tokens_per_batch:,}",
                "1 process" if processes == 1 else f"{processes} processes",
            )
        return count

    def first_samples(self, tokens: int) -> list[Sample]:
        """Return samples of the next training micro-batch with about so many tokens, or one."""
        assert self.order is not None
        epoch, start = self.position
        following = islice(self.order.batches(epoch), start, None)
        samples: list[Sample] = []
        for file, index in next(following, ()) or next(self.order.batches(epoch + 1)):
            samples.append(self.train_subsets[file].sample(index))
            tokens -= len(samples[-1].ids)
            if tokens <= 0:
                break
        return samples

    def largest_micro_batch(self) -> int:
        """Return the tokens of the largest of the next micro-batches; they differ little."""
        assert self.order is not None
        epoch, start = self.position
        sizes = [0]
        for members in islice(self.order.batches(epoch), start, start + LOOK_AHEAD):
            lengths = (self.train_subsets[file].lengths(np.array([i])) for file, i in members)
            sizes.append(sum(int(length[0]) for length in lengths))
        return max(sizes)

    @property
    def batch_kind(self) -> BatchKind:
        """What its batches hold: rows of its kind."""
        return self.kind

    @property
    def shares_prompts(self) -> bool:
        """Whether samples hold several answers to a prompt."""
        return self.kind in TWO_ANSWERS

    @property
    def longest_sample(self) -> int:
        """Tokens that one sample may have: two answers to a prompt count apart."""
        return self.limits.max_length * (2 if self.kind in TWO_ANSWERS else 1)

    def optimizer_steps(self, epochs: int, accumulate: int) -> int:
        """Return the optimizer steps of some epochs: each epoch ends with a step."""
        assert self.order is not None
        micro_batches = self.world_size * accumulate  # of a step
        return sum(-(-self.order.count(epoch) // micro_batches) for epoch in range(epochs))

    def train_dataloader(self) -> PackedDataLoader:
        """Training batches.

        Raises:
            ConfigError: when no training file is given.
        """
        if self.order is None:
            raise ConfigError("No training data: set data.init_args.train to a JSONL file.")
        return self.loader(self, training=True)

    def val_dataloader(self) -> PackedDataLoader | list[PackedBatch]:
        """Held-out batches, in the files' own order."""
        return self.loader(self, training=False) if self.val_order else []

    def test_dataloader(self) -> DataLoader[list[object]] | PackedDataLoader:
        """The exam's items, which the module reads; without an exam, the held-out batches."""
        if not self.exam:
            if self.val_order is None:
                raise ConfigError("Nothing to test on: set data.init_args.exam or val.")
            return self.loader(self, training=False)
        items = [item for path in self.exam for item in self.module.load_exam(path)]
        return self._deal(items)

    def predict_dataloader(self) -> DataLoader[list[Prompt]]:
        """The prompts to complete.

        Raises:
            ConfigError: when no file of prompts is given.
        """
        if self.predict is None:
            raise ConfigError(
                "Nothing to predict: give --data.init_args.predict FILE, a JSONL of "
                '{"prompt": ...} or {"messages": [...]}.'
            )
        return self._deal(load_prompts(self.predict, self.columns))

    def _deal(self, items: list[T]) -> DataLoader[list[T]]:
        """Give each process its share of the items, a batch at a time."""
        local_items = items[self.rank :: self.world_size]
        return DataLoader(local_items, batch_size=ITEMS_AT_A_TIME, collate_fn=list)  # type: ignore[arg-type]

    def transfer_batch_to_device(
        self, batch: object, device: torch.device, dataloader_idx: int
    ) -> object:
        """Move packed batches, to a GPU while it computes; exam items and prompts stay."""
        if isinstance(batch, PackedBatch):
            return batch.to(device, non_blocking=self.on_gpu)
        return batch

    def stores(self) -> list[TokenStore]:
        """Return the stores of all training and held-out files, each once."""
        stores = [subset.store for subset in (*self.train_subsets, *self.val_subsets)]
        return list({(store.path, store.source): store for store in stores}.values())

    def fingerprint(self) -> str:
        """Return a digest of the training files' contents, limits and weights."""
        stores = [(subset.store.digest, len(subset)) for subset in self.train_subsets]
        text = json.dumps([stores, list(self.train_weights.values())])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def advance(self, position: tuple[int, int]) -> None:
        """Set the position that the next checkpoint saves."""
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the order of training batches."""
        return {"position": list(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        epoch, done = state["position"]
        self.position = (epoch, done)


def _weights(files: Files) -> dict[str, float]:
    """Return the weight of each file; folders and patterns are replaced by what they stand for."""
    if files is None:
        return {}
    if isinstance(files, dict):
        return {file: w for name, w in files.items() for file in expand_files([name])}
    return dict.fromkeys(expand_files([files] if isinstance(files, str) else files), 1.0)


def check_store(store: TokenStore, tokenizer: PreTrainedTokenizerFast, embedding_rows: int) -> None:
    """Refuse, with a DataError, a store with an id that a model of so many rows cannot embed."""
    if store.highest_id < embedding_rows:
        return
    for start in range(0, len(store.tokens), TOKENS_AT_A_TIME):
        ids = store.tokens[start : start + TOKENS_AT_A_TIME]
        if (beyond := np.flatnonzero(ids >= embedding_rows)).size:
            position = start + beyond[0]
            starts = store.samples[:]["start"]
            line = int(store.lines()[np.searchsorted(starts, position, side="right") - 1])
            try:
                check_ids(tokenizer, [int(ids[beyond[0]])], embedding_rows)
            except DataError as error:
                raise error.at(store.source, line) from None


def _share(path: str, samples: int, weight: float) -> FileShare:
    """Return how many of a file's samples an epoch holds."""
    count = round(weight * samples)
    if not count:
        raise ConfigError(
            f"data.train: a weight of {weight:g} leaves none of the {samples} samples of {path}. "
            "Raise it, or leave the file out."
        )
    return FileShare(samples, count)


def is_held_out(lines: NDArray[np.int64], share: float, source: str | Path) -> NDArray[np.bool_]:
    """Return which rows of a file, numbered `lines` [K] from 1, are held out, spread evenly.

    Raises:
        ConfigError: when these are all rows or none.
    """
    held_out = spread_evenly(lines, share)
    if held_out.all() or not held_out.any():
        raise ConfigError(
            f"{source} has too few rows to hold out a share of {share}. "
            "Give data.init_args.val, or set val_share to 0."
        )
    return held_out


def _held_out(store: TokenStore, share: float) -> StoreSubset:
    """Return the samples of the rows of a store that are held out."""
    return StoreSubset(store, np.flatnonzero(is_held_out(store.lines(), share, store.source)))


def _without(store: TokenStore, held_out: StoreSubset) -> StoreSubset:
    """Return the samples of a store that are not held out."""
    assert held_out.index is not None
    is_left = np.ones(len(store), dtype=bool)
    is_left[held_out.index] = False
    return StoreSubset(store, np.flatnonzero(is_left))


def bounded_rows(subsets: list[StoreSubset], bound: int | None) -> list[StoreSubset]:
    """Return of each subset the samples of some rows that together have at most so many tokens.

    The rows are spread evenly over all subsets, always the same, and at least one. Subsets within
    the bound stay as they are.
    """
    total = sum(subset.tokens() for subset in subsets)
    if bound is None or total <= bound:
        return subsets
    indices = [np.arange(len(s)) if s.index is None else s.index for s in subsets]
    rows, lengths = [], []
    n_rows = 0  # rows are numbered through all subsets
    for subset, index in zip(subsets, indices, strict=True):
        _, row = np.unique(subset.store.lines()[index], return_inverse=True)
        rows.append(n_rows + row)
        lengths.append(subset.store.lengths(index))
        n_rows += int(row.max(initial=-1)) + 1
    row_tokens = np.bincount(np.concatenate(rows), np.concatenate(lengths), n_rows)  # [n_rows]
    chosen = spread_evenly(np.arange(1, n_rows + 1), bound / total)
    tokens_left: float = bound
    for number in np.flatnonzero(chosen).tolist():
        chosen[number] = row_tokens[number] <= tokens_left
        if chosen[number]:
            tokens_left -= row_tokens[number]
    if not chosen.any():
        chosen[row_tokens.argmin()] = True
    return [
        StoreSubset(subset.store, index[chosen[row]])
        for subset, index, row in zip(subsets, indices, rows, strict=True)
    ]


class PretrainDataModule(JSONLDataModule):
    """Rows of text."""

    kind: ClassVar[Kind] = "text"


class SFTDataModule(JSONLDataModule):
    """Rows of chats."""

    kind: ClassVar[Kind] = "chat"


class DPODataModule(JSONLDataModule):
    """Rows of preferences: a prompt, a chosen and a rejected answer."""

    kind: ClassVar[Kind] = "preference"


def ignore_signals(_: int) -> None:
    """Leave it to the main process to stop: it still needs this worker for the current step."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # only there a process learns who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_at_sigterm_of, args=(os.getppid(),), daemon=True).start()


def end_at_sigterm_of(main_process: int) -> None:
    """End at a SIGTERM of the main process; others send it to the whole group."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main_process:
        pass
    os._exit(0)
