"""Batches for KTO: completions that are desirable or not, and what they are compared with.

A row's sample has two answers: its completion, and one of another row, which was given to another
prompt (`minigpt.data.store.with_mismatched`). They are packed apart, since only the first one is
trained on. How likely the model has made the others decides what a completion is compared with, in
all micro-batches of an optimizer step alike: `Window`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minigpt.data.batch import PackedBatch, Sample, collate
from minigpt.data.datamodule import JSONLDataModule, PackedDataLoader
from minigpt.data.formats import Kind

log = logging.getLogger(__name__)


class Window:
    """Micro-batches of this process that share a KL baseline.

    These are the ones of an optimizer step, or all that are held out.

    Attributes:
        mismatched: their prompts with the completions of other rows.
        baseline: scalar; set by the module at the first of them.
    """

    def __init__(self, mismatched: Sequence[PackedBatch]) -> None:
        self.mismatched = mismatched
        self.baseline: Tensor | None = None


@dataclass(eq=False)
class UnpairedBatch(PackedBatch):
    """Prompts, each with its completion.

    Attributes:
        desirable: [S] bool, which completions are.
        mismatched: the same prompts with the completions of other rows; stays on the CPU.
        window: which micro-batches share its KL baseline.
    """

    desirable: Tensor = field(kw_only=True)
    mismatched: PackedBatch = field(kw_only=True)
    window: Window | None = field(kw_only=True, default=None)

    def without_targets(self) -> PackedBatch:
        """Return the batch as a filler, of which nothing goes into the baseline either."""
        without_baseline = replace(self, mismatched=self.mismatched.without_targets())
        return super(UnpairedBatch, without_baseline).without_targets()


def _with_answer(sample: Sample, number: int) -> Sample:
    """Return a sample with one of its answers alone."""
    start = sample.prompt + sum(sample.answers[:number])
    answer = sample.ids[start : start + sample.answers[number]]
    ids = np.concatenate([sample.ids[: sample.prompt], answer])
    return replace(sample, ids=ids, answers=(len(answer),))


class WindowDataLoader(PackedDataLoader):
    """Reads all micro-batches of an optimizer step ahead; those that are held out, all of them.

    Positions stay those of the batches that were trained on.
    """

    @staticmethod
    def pack_samples(
        samples: Sequence[Sample], resume_at: tuple[int, int] = (0, 0), read_last: bool = False
    ) -> UnpairedBatch:
        """Pack samples of two answers: the first ones as the batch, the second ones apart."""
        batch, mismatched = (
            collate([_with_answer(sample, number) for sample in samples], resume_at, read_last)
            for number in range(2)
        )
        desirable = torch.tensor([sample.desirable for sample in samples])
        return UnpairedBatch(**vars(batch), desirable=desirable, mismatched=mismatched)

    def __iter__(self) -> Iterator[PackedBatch]:
        trainer = self.data.trainer
        assert trainer is not None
        size: int | float | None = trainer.accumulate_grad_batches
        if not self.training:
            size = trainer.limit_val_batches
        batches = (batch for batch in super().__iter__() if isinstance(batch, UnpairedBatch))
        while group := list(islice(batches, size if isinstance(size, int) else None)):
            window = Window([batch.mismatched for batch in group])
            for batch in group:
                yield replace(batch, window=window)


class KTODataModule(JSONLDataModule):
    """Rows of a prompt, a completion, and whether it is desirable.

    Its `tokens_per_batch` hold the completions that rows are compared with, too.
    """

    kind: ClassVar[Kind] = "unpaired"
    loader: ClassVar[type[PackedDataLoader]] = WindowDataLoader

    def prepare_data(self) -> None:
        """Build the token stores, in one process only, and warn when all rows have one label."""
        super().prepare_data()
        shares = [float(self._open(path).desirable().mean()) for path in self.train_weights]
        if shares and (all(share == 1 for share in shares) or not any(shares)):
            log.warning(
                "%s: all completions are %s. KTO learns from both kinds: add some of the other.",
                ", ".join(self.train_weights),
                "desirable" if shares[0] else "undesirable",
            )
