"""The frozen model that stages compare with, or its log-probs of pairs, computed once."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.data.batch import PackedBatch
from minigpt.data.datamodule import JSONLDataModule, PackedDataset, StoreSubset
from minigpt.data.order import FileShare, PackedOrder
from minigpt.data.store import TokenStore
from minigpt.files import atomic_file, is_private, make_private
from minigpt.model.packed_lm import PackedLM
from minigpt.model.parallel import gathered
from minigpt.stages.base import BaseModule

log = logging.getLogger(__name__)

PairLogprobs = NDArray[np.float32]  # [S, 2] summed log-probs of the chosen and the rejected answers


class ReferenceModule(BaseModule):
    """Base of the stages that compare with a frozen reference model.

    The reference is the model as the run started. Under LoRA it is the model with the
    adapter off, so no copy is needed. (A run that starts from an adapter merges it first, so
    the adapter that is switched off here is always the one that this run trains.)

    Args:
        kwargs: see `BaseModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._frozen: list[PackedLM] = []  # a list hides it from state_dict and optimizer

    @property
    def needs_reference(self) -> bool:
        """Whether this run compares with the reference at all."""
        return True

    @property
    def needs_base(self) -> bool:
        """With a reference, the model that a run starts from takes part to the end."""
        return self.needs_reference or super().needs_base

    def build_model(self) -> PackedLM:
        """Keep a frozen copy of the model, unless an adapter can be switched off instead."""
        lm = super().build_model()
        if self.source is self.start and self.needs_reference and self.lora is None:
            self._frozen.append(copy.deepcopy(lm).requires_grad_(False).eval())
        return lm

    def on_validation_start(self) -> None:
        """Load the reference where a finished run is only validated."""
        if self.source is not self.start and self.needs_reference and not self._frozen:
            self._frozen.append(PackedLM(self.start.build()).requires_grad_(False).eval())

    def on_test_start(self) -> None:
        """Load the reference also where the held-out rows are the test."""
        self.on_validation_start()

    def packed_models(self) -> list[PackedLM]:
        """Return the model and its reference."""
        return [self.model, *(lm.to(self.device) for lm in self._frozen)]

    def reference_logprobs(self, batch: PackedBatch) -> Tensor:
        """Return the reference's summed log-prob of each answer, [A]."""
        return self.by_reference(lambda lm: lm(batch, per_answer=True))

    @torch.no_grad()
    def by_reference(self, compute: Callable[[PackedLM], Tensor]) -> Tensor:
        """Return what a function computes with the reference."""
        if self._frozen:
            return compute(self._frozen[0].to(self.device))
        assert self.adapter is not None
        training = self.model.training
        self.model.eval()
        with self.adapter.disable_adapter():
            result = compute(self.model)
        self.model.train(training)
        return result


def digest_of(lm: PackedLM, precision: str) -> str:
    """Return a digest of all that decides a model's log-probs of given tokens."""
    config = lm.hf.config.to_dict()
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    settings = {"precision": precision, **public}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(lm.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:20]


def pair_logprobs(
    store: TokenStore,
    data: JSONLDataModule,
    model: str,
    logprobs: Callable[[PackedBatch], Tensor],
    broadcast: Callable[[PairLogprobs | None], PairLogprobs | None],
) -> PairLogprobs:
    """Return the log-probs of all pairs of a store, from disk where they were saved before.

    The first process decides and reads; all processes share the computing.

    Args:
        store: the pairs; its name stands for its content, the tokenizer and the limits.
        data: says which process this is, and how much goes into a micro-batch.
        model: the reference's digest.
        logprobs: from a batch to the reference's log-probs [2P].
        broadcast: hands the first process's value to all.
    """
    path = store.path / f"reference-{model}.npz"
    saved = broadcast(_read(path, len(store)) if data.rank == 0 else None)
    if saved is not None:
        log.info("The reference's log-probs are in %s.", path)
        return saved
    share = FileShare(len(store), len(store))
    order = PackedOrder([store.lengths], [share], data.tokens_per_batch, None)
    local: list[tuple[int, list[float]]] = []
    for batch in PackedDataset(order, [StoreSubset(store)], 0, 0, data.rank, data.world_size):
        values = logprobs(batch).view(-1, 2).float().tolist()
        if not batch.is_filler:
            local += zip((line for _, line in batch.sources), values, strict=True)
    by_line = dict(gathered(local))
    pairs = np.array([by_line[line] for line in store.lines().tolist()], np.float32)
    if data.rank == 0:
        _write(path, pairs)
    return pairs


def _read(path: Path, pairs: int) -> PairLogprobs | None:
    if not is_private(path):  # not there, or another user may have written it
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            logprobs: PairLogprobs = arrays[
                "scores"
            ]  # checked against the sum that a zip file holds
    except Exception:  # missing, or damaged, which a zip file tells by any error
        return None
    return logprobs if logprobs.shape == (pairs, 2) and logprobs.dtype == np.float32 else None


def _write(path: Path, logprobs: PairLogprobs) -> None:
    try:
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez(file, scores=logprobs)
            make_private(partial)
    except OSError as error:  # a run can do without: the next one computes them again
        log.warning("The reference's log-probs cannot be saved in %s: %s", path, error.strerror)
