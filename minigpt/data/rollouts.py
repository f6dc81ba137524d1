"""Prompts to answer, and what is learnt from the answers: the data of reinforcement learning.

A micro-batch of prompts comes from the same kind of order as all batches. The stage samples answers
to it, and packs prompts and answers into a `RolloutBatch`, together with the chats that the data
gives it to keep what the model knew.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minigpt.data.batch import PackedBatch, Sample, collate
from minigpt.data.datamodule import Files, JSONLDataModule, PackedDataLoader, is_held_out
from minigpt.data.formats import BadRows, BatchKind, Kind, Prompt, load_prompts, renamed
from minigpt.data.order import FileShare, PackedOrder, histogram, shuffle
from minigpt.data.prompts import PromptCodec
from minigpt.data.store import TokenStore, notes_of_rows, warn_of_rows
from minigpt.data.tokenizer import check_ids
from minigpt.errors import ConfigError, DataError

PROMPTS_AT_A_TIME = 32  # held-out prompts that are answered together
DRAWN_AGAIN = 2**32  # added to a prompt's number for each time that it came before in a rollout


class EncodedPrompt(NamedTuple):
    """A prompt with its token ids.

    Attributes:
        record: the prompt as text or chat, with the row it came from.
        fields: of the row, under their names in MiniGPT (`columns`); rewards read them.
        ids: token ids.
        number: of the prompt among those of all files; the random numbers of its answers depend on
            it, so a prompt that comes again in a rollout has another one there (`DRAWN_AGAIN`).
    """

    record: Prompt
    fields: dict[str, Any]
    ids: list[int]
    number: int

    @property
    def question(self) -> str:
        """The text that is continued, or the last message."""
        content = self.record.content
        return content if isinstance(content, str) else content[-1].content


class PromptBatch:
    """The prompts of one micro-batch. (No dataclass: Lightning would take that apart.)

    Args:
        prompts: to answer.
        rollout: if answers are to be sampled now, the prompts of all micro-batches of this process
            that they are for; otherwise those sampled before are used.
        number: which of these micro-batches this is, from 0.
        resume_at: (epoch, micro-batch) that comes after this one in the whole run.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        rollout: Sequence[Sequence[EncodedPrompt]] = (),
        number: int = 0,
        resume_at: tuple[int, int] = (0, 0),
    ) -> None:
        self.prompts = prompts
        self.rollout = rollout
        self.number = number
        self.resume_at = resume_at


@dataclass
class RolloutBatch(PackedBatch):
    """Prompts with the answers that were sampled, and chats of the replay behind them.

    Attributes:
        advantages: [A] of the answers; 0 for the replay's.
        included: [A] bool, answers that the policy's loss counts; none of the replay's are.
        is_replay: [A] bool, answers of the replay.
        sampled_logprobs: [N] of the targets by the engine that sampled them, in nats; 0 for the
            replay's.
        old_logprobs: [N] of the targets by the weights that sampled them, in the way that training
            computes them; None in an update of these very weights.
        replay_weight: how many terms of the policy's loss a target of the replay weighs.
    """

    advantages: Tensor = field(kw_only=True)
    included: Tensor = field(kw_only=True)
    is_replay: Tensor = field(kw_only=True)
    sampled_logprobs: Tensor = field(kw_only=True)
    old_logprobs: Tensor | None = field(kw_only=True, default=None)
    replay_weight: float = field(kw_only=True, default=0.0)


def collate_rollouts(
    groups: Sequence[Sample],
    sampled_logprobs: Sequence[float],
    advantages: Sequence[float],
    included: Sequence[bool],
    replay: Sequence[Sample] = (),
) -> RolloutBatch:
    """Pack prompts with their answers, and chats, into one batch.

    Args:
        groups: each a prompt with its answers.
        sampled_logprobs: of all tokens of all answers.
        advantages: of the answers of all groups.
        included: which of them the policy's loss counts.
        replay: chats.
    """
    batch = collate([*groups, *replay])
    chats = [False] * len(replay)
    replayed = [0.0] * (len(batch.labels) - len(sampled_logprobs))
    return RolloutBatch(
        **vars(batch),
        advantages=torch.tensor([*advantages, *map(float, chats)]),
        included=torch.tensor([*included, *chats]),
        sampled_logprobs=torch.tensor([*sampled_logprobs, *replayed]),
        is_replay=torch.tensor([False] * len(included) + [True] * len(replay)),
    )


def group_sample(prompt: EncodedPrompt, answers: Sequence[Sequence[int]]) -> Sample:
    """Return a prompt with its group of answers as a sample; all their tokens are targets.

    Args:
        prompt: what they answer.
        answers: token ids of each; at least one token.
    """
    ids = np.array([*prompt.ids, *(token for answer in answers for token in answer)])
    lengths = tuple(len(answer) for answer in answers)
    return Sample(ids, len(prompt.ids), lengths, None, prompt.record.source)


def targets_of(chat: Sample) -> int:
    """Return how many tokens of a chat are trained on."""
    assert chat.targets is not None
    return int(np.count_nonzero(chat.targets))


class PromptOrder(PackedOrder):
    """Micro-batches of a number of prompts each; those that an epoch cannot fill wait for the next.

    Its `budget` counts prompts.
    """

    def _packed(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        total = int(self.starts[-1])
        for start in range(0, total - self.budget + 1, self.budget):
            drawn = np.arange(start, start + self.budget, dtype=np.int64)
            if self.seed is not None:
                drawn = shuffle(drawn, total, self._seed(epoch, 0))
            file, sample = self._locate(drawn, epoch)
            yield list(zip(file.tolist(), sample.tolist(), strict=True))


class PromptLoader:
    """Iterable of one epoch's micro-batches of prompts that starts at the DataModule's position."""

    def __init__(self, data: GRPODataModule) -> None:
        self.data = data

    def __iter__(self) -> Iterator[PromptBatch]:
        data = self.data
        assert data.order is not None
        # Positions count the micro-batches of all processes, each as often as it is learnt from.
        epoch, done = data.position
        size = data.rollout_size
        positions = size * data.passes  # of a rollout
        rollouts = data.order.count(epoch) // size
        first = done // positions
        micro_batches = islice(data.order.batches(epoch), first * size, None)
        for rollout in range(first, rollouts):
            prompts = self._prompts(islice(micro_batches, size))[data.rank :: data.world_size]
            for number in range(len(prompts) * data.passes):
                following = rollout * positions + (number + 1) * data.world_size
                if following <= done:  # learnt from before the run was resumed
                    continue
                ends_epoch = following == rollouts * positions
                yield PromptBatch(
                    prompts[number % len(prompts)],
                    () if number else prompts,
                    number,
                    (epoch + 1, 0) if ends_epoch else (epoch, following),
                )

    def _prompts(
        self, micro_batches: Iterable[Sequence[tuple[int, int]]]
    ) -> list[list[EncodedPrompt]]:
        """Return the prompts of a rollout's micro-batches, those of all processes."""
        times: Counter[int] = Counter()
        prompts: list[list[EncodedPrompt]] = []
        for members in micro_batches:
            prompts.append([])
            for file, i in members:
                prompt = self.data.train_prompts[file][i]
                again = DRAWN_AGAIN * times[prompt.number]  # a file with a weight of 2 comes twice
                prompts[-1].append(prompt._replace(number=prompt.number + again))
                times[prompt.number] += 1
        return prompts


class GRPODataModule(JSONLDataModule):
    """Rows of prompts: text or chat, and any further fields, which rewards may read.

    An optimizer step learns from `prompts_per_batch` prompts of each micro-batch, times
    `accumulate_grad_batches`, times the processes.

    Args:
        prompts_per_batch: prompts of a micro-batch.
        num_generations: answers that are sampled to each prompt.
        max_completion_length: tokens of the longest answer; longer ones are cut off.
        minibatches: optimizer steps whose prompts are answered together, before the first of them.
        passes: how often these steps are made from the same answers.
        replay: files of chats to keep what the model knew, each with its share of an optimizer
            step's targets: {data/sft.jsonl: 0.2}.
        kwargs: see `JSONLDataModule`.
    """

    kind: ClassVar[Kind] = "chat"  # of the replay's rows

    def __init__(
        self,
        train: Files = None,
        val: Files = None,
        prompts_per_batch: int = 16,
        num_generations: int = 8,
        max_completion_length: int = 64,
        minibatches: int = 1,
        passes: int = 1,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        replay: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.prompts_per_batch = prompts_per_batch
        self.num_generations = num_generations
        self.max_completion_length = max_completion_length
        self.minibatches = minibatches
        self.passes = passes
        self.replay = replay or {}
        for name in ("prompts_per_batch", "num_generations", "minibatches", "passes"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"data.{name} must be at least 1, but is {value}.")
        if not 1 <= max_completion_length < max_length:
            raise ConfigError(
                "data.max_completion_length must lie in 1 to max_length - 1, which leaves room "
                f"for a prompt, but is {max_completion_length} with a max_length of {max_length}."
            )
        shares = self.replay.values()
        if not all(share > 0 for share in shares) or not sum(shares) < 1:  # NaN is no share
            raise ConfigError(
                "data.replay: shares of a step's targets are above 0, and below 1 together."
            )
        longest_prompt = max_length - max_completion_length
        self.longest_prompt = min(max_prompt_length or longest_prompt, longest_prompt)
        super().__init__(
            train=train,
            val=val,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            tokens_per_batch=prompts_per_batch * self.longest_sample_of(max_length),
            tokens_per_step=None,
            num_workers=0,
            **kwargs,
        )
        self._loaded: dict[str, list[EncodedPrompt]] = {}  # of each file
        self.train_prompts: list[list[EncodedPrompt]] = []  # of each file
        self.val_prompts: list[EncodedPrompt] = []
        self._count = 0  # prompts that were read
        self.replay_stores: list[TokenStore] = []

    def longest_sample_of(self, max_length: int) -> int:
        """Return the tokens that a prompt may have together with all of its answers."""
        return max_length + (self.num_generations - 1) * self.max_completion_length

    @property
    def longest_sample(self) -> int:
        """Tokens that a prompt may have together with all of its answers."""
        return self.longest_sample_of(self.limits.max_length)

    @property
    def batch_kind(self) -> BatchKind:
        """Prompts."""
        return "prompt"

    @property
    def shares_prompts(self) -> bool:
        """Whether samples hold several answers to a prompt."""
        return True

    def prepare_data(self) -> None:
        """Build the stores of the replay and read the prompts, in one process only."""
        super().prepare_data()
        self.all_prompts()

    def all_prompts(self) -> list[EncodedPrompt]:
        """Return the prompts of all files, those for training first."""
        files = [*self.train_weights, *self.val_files]
        return [prompt for path in files for prompt in self._load(path)]

    def _files(self) -> list[str]:
        """Return the files that have token stores."""
        return list(self.replay)

    def _setup_data(self) -> None:
        self.train_prompts = [self._load(path) for path in self.train_weights]
        if self.val_files:
            held_out = [prompt for path in self.val_files for prompt in self._load(path)]
        else:
            held_out = self._hold_out() if self.val_share else []
        self.val_prompts = self._bounded(held_out, self.max_val_tokens)
        self.all_held_out_tokens = sum(map(self._tokens, held_out))
        self.replay_stores = [self._open(path) for path in self.replay]
        shares = [
            FileShare(len(prompts), max(1, round(weight * len(prompts))))
            for prompts, weight in zip(self.train_prompts, self.train_weights.values(), strict=True)
        ]
        if shares:
            limit, repeat = self._epoch()
            self.order = PromptOrder(
                [], shares, self.prompts_per_batch, self.seed, limit=limit, repeat=repeat
            )
            self._check_rollouts()

    def _check_rollouts(self) -> None:
        assert self.order is not None
        if self.order.count() < self.rollout_size:
            needed = self.rollout_size * self.prompts_per_batch
            raise ConfigError(
                f"data.train has {sum(map(len, self.train_prompts))} prompts in an epoch, but "
                f"{needed} are answered before the first update (prompts_per_batch, times "
                "accumulate_grad_batches, minibatches and processes). Lower one of them, or give "
                "the file a weight: {FILE: 2} takes each prompt twice in an epoch."
            )

    def _load(self, path: str) -> list[EncodedPrompt]:
        """Read and encode the prompts of a file, once.

        Files are read in the same order in every process, by which prompts are numbered.
        """
        if path not in self._loaded:
            self._loaded[path] = self._read(path)
        return self._loaded[path]

    def _read(self, path: str) -> list[EncodedPrompt]:
        limits, source = self.limits, self.module.source
        bad = BadRows(limits.on_bad_row, limits.max_bad_share, limits.max_too_long_share)
        codec, embedding_rows = PromptCodec(self.tokenizer), source.embedding_rows()
        prompts: list[EncodedPrompt] = []
        for prompt in load_prompts(path, self.columns, bad, limits.data_limit):
            try:
                ids = codec.encode(prompt.content)
                check_ids(self.tokenizer, ids, embedding_rows)
            except DataError as error:
                bad.handle(error.at(*prompt.source))
                continue
            if len(ids) > self.longest_prompt:
                bad.leave_out(
                    DataError(
                        f"the prompt has {len(ids)} tokens, but {self.longest_prompt} are left "
                        "beside the longest answer",
                        path=prompt.source[0],
                        line=prompt.source[1],
                        remedy="Raise max_length, lower max_completion_length, or leave it out.",
                        reason="too_long",
                    )
                )
                continue
            fields = renamed(prompt.row, self.columns)
            assert isinstance(fields, dict)
            prompts.append(EncodedPrompt(prompt, fields, ids, self._count))
            self._count += 1
        bad.check(bad.seen)
        bad.check_too_long(bad.seen)
        warn_of_rows(Path(path), tuple(notes_of_rows(Path(path), bad)))
        if not prompts:
            raise DataError("no prompt can be used", path=path, reason="no_rows")
        return prompts

    def _hold_out(self) -> list[EncodedPrompt]:
        """Take a share of the training prompts of each file, spread evenly, and return them."""
        held_out: list[EncodedPrompt] = []
        for file, prompts in enumerate(self.train_prompts):
            numbers = np.arange(1, len(prompts) + 1)
            chosen = is_held_out(numbers, self.val_share, prompts[0].record.source[0])
            held_out += [prompts[number] for number in np.flatnonzero(chosen)]
            self.train_prompts[file] = [prompts[number] for number in np.flatnonzero(~chosen)]
        return self._bounded(held_out, self.max_held_out_tokens)

    def _bounded(self, prompts: list[EncodedPrompt], bound: int | None) -> list[EncodedPrompt]:
        """Return prompts, spread evenly, that fit the bound with an answer each; at least one."""
        total = sum(map(self._tokens, prompts))
        if bound is None or total <= bound:
            return prompts
        count = max(1, len(prompts) * bound // total)
        return [prompts[number * len(prompts) // count] for number in range(count)]

    # Sizes

    @property
    def rollout_size(self) -> int:
        """Micro-batches of all processes whose prompts are answered together."""
        assert self.trainer is not None
        return self.minibatches * self.trainer.accumulate_grad_batches * self.world_size

    def _tokens(self, prompt: EncodedPrompt) -> int:
        """Return the tokens of a prompt with one answer of the longest length."""
        return len(prompt.ids) + self.max_completion_length

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Return what the training and the held-out prompts of each file are."""
        return {
            "train": [_statistics(prompts) for prompts in self.train_prompts],
            "val": [_statistics(self.val_prompts)] if self.val_prompts else [],
        }

    def epoch_tokens(self) -> int:
        """Return how many tokens an epoch has if all answers are of the longest length."""
        if self.order is None:
            return 0
        answers = self.num_generations * self.max_completion_length
        prompts = [len(p.ids) for of_file in self.train_prompts for p in of_file]
        mean = sum(prompts) / max(1, len(prompts)) + answers
        return round(self.epoch_micro_batches() * self.prompts_per_batch * mean)

    def epoch_micro_batches(self) -> int:
        """Return how many micro-batches an epoch has, each as often as it is learnt from."""
        if self.order is None:
            return 0
        return self.order.count() // self.rollout_size * self.rollout_size * self.passes

    def optimizer_steps(self, epochs: int, accumulate: int) -> int:
        """Return the optimizer steps of some epochs: whole rollouts only."""
        return epochs * self.epoch_micro_batches() // (accumulate * self.world_size)

    def held_out_tokens(self) -> int:
        """Return how many tokens a validation reads if its answers are of the longest length."""
        answers = 1 + self.num_generations
        return sum(len(p.ids) + answers * self.max_completion_length for p in self.val_prompts)

    def first_samples(self, tokens: int) -> list[Sample]:
        """Return prompts with answers of the longest length that have about so many tokens."""
        samples: list[Sample] = []
        for prompt in (p for of_file in self.train_prompts for p in of_file):
            answer = (prompt.ids * self.max_completion_length)[: self.max_completion_length]
            samples.append(group_sample(prompt, [answer] * self.num_generations))
            tokens -= len(samples[-1].ids)
            if tokens <= 0:
                break
        return samples

    def largest_micro_batch(self) -> int:
        """Return how many tokens a micro-batch can have."""
        return self.tokens_per_batch

    # Batches

    def train_dataloader(self) -> PromptLoader:  # type: ignore[override]
        """Micro-batches of prompts.

        Raises:
            ConfigError: when no training file is given.
        """
        if self.order is None:
            raise ConfigError("No training data: set data.init_args.train to a JSONL file.")
        return PromptLoader(self)

    def val_dataloader(self) -> DataLoader[PromptBatch] | list[PromptBatch]:  # type: ignore[override]
        """This process's held-out prompts."""
        prompts = self.val_prompts[self.rank :: self.world_size]
        if not prompts:
            return []
        return DataLoader(prompts, batch_size=PROMPTS_AT_A_TIME, collate_fn=PromptBatch)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[list[object]] | PackedDataLoader:
        """The exam's items, which the module reads.

        Raises:
            ConfigError: without an exam.
        """
        if not self.exam:
            raise ConfigError(
                "Nothing to test on: set data.init_args.exam, or answer the held-out prompts with "
                "minigpt validate."
            )
        return super().test_dataloader()

    def replay_samples(self, step: int, targets: int) -> list[Sample]:
        """Return the chats that a step learns from beside its answers, in all processes.

        Args:
            step: number of the optimizer step; decides the chats, together with the seed.
            targets: of the step's answers, in all processes.
        """
        share_of_answers = 1 - sum(self.replay.values())
        chosen: list[Sample] = []
        for file, (store, share) in enumerate(
            zip(self.replay_stores, self.replay.values(), strict=True)
        ):
            needed = share / share_of_answers * targets
            random = np.random.default_rng([self.seed, step, file])
            while needed > 0:  # each chat once before any comes again
                for index in random.permutation(len(store)).tolist():
                    chosen.append(store.sample(index))
                    needed -= targets_of(chosen[-1])
                    if needed <= 0:
                        break
        return chosen

    def fingerprint(self) -> str:
        """Return a digest of the prompts, their fields and weights, and of the replay."""
        digest = hashlib.sha256()
        for prompts, weight in zip(self.train_prompts, self.train_weights.values(), strict=True):
            digest.update(json.dumps(weight).encode())
            for prompt in prompts:
                digest.update(json.dumps([prompt.ids, prompt.fields], default=str).encode())
        replayed = [store.digest for store in self.replay_stores]
        sizes = [self.num_generations, self.max_completion_length, self.prompts_per_batch]
        sizes += [self.minibatches, self.passes]
        digest.update(json.dumps([replayed, list(self.replay.values()), sizes]).encode())
        return digest.hexdigest()[:12]


def _statistics(prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    return {
        "file": prompts[0].record.source[0],
        "rows": len(prompts),
        "samples": len(prompts),
        "tokens": int(lengths.sum()),
        "lengths": histogram([lengths]),
    }
