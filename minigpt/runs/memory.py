"""How much memory a run will take, from its parts, two of which are measured before training.

    peak = before + gradients + optimizer + max(activations, update) + overhead
    activations = fixed + tokens of the largest micro-batch x bytes a token

- before: what is in memory before training, measured: on a GPU the process's tensors, on a CPU
  all of the process.
- gradients: one value for each trained weight, in the weight's type.
- optimizer: two such values with AdamW, one with Muon (for the matrices that it trains).
- activations: what the forward pass of a micro-batch keeps for the backward pass. It is measured
  twice, on some samples of the first micro-batch and on every second one of them; the difference
  gives the bytes a token.
- update: what Muon computes with, five times the largest group of matrices of one shape.
- overhead: on a CPU, what lies free between tensors whose sizes change from step to step:
  `FREE_SHARE` of the activations, `MOST_FREE` bytes at most (glibc gives back what is above 32 MB).
  More stays free on texts, whose micro-batches are full. In bf16 also the kernels that oneDNN makes
  for each new size, `KERNELS`: fewer where micro-batches are full of targets, more where their
  number changes, twice as many with an adapter, which has more matrices.
  All as measured: docs/log.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigpt.data.batch import PackedBatch, Sample
from minigpt.data.formats import Kind
from minigpt.machine import memory_in_use
from minigpt.model.optimizer import BatchedMuon, MuonAdamW
from minigpt.stages.base import BaseModule

PROBE_TOKENS = 1024  # of the samples that are read to measure activations
FREE_SHARE = 2.5
MOST_FREE: dict[Kind, int] = {
    "text": 2_300_000_000,
    "chat": 700_000_000,
    "preference": 700_000_000,
    "unpaired": 700_000_000,
}
KERNELS: dict[Kind, int] = {
    "text": 300_000_000,
    "chat": 500_000_000,
    "preference": 500_000_000,
    "unpaired": 500_000_000,
}
UPDATE_COPIES = 5  # of a group of matrices: updates, stacked, and three of Newton-Schulz


@dataclass(frozen=True)
class ExpectedMemory:
    """The parts of a run's peak memory, in bytes, as this file's beginning describes them."""

    before: int
    gradients: int
    optimizer: int
    activations: int
    update: int
    overhead: int

    @property
    def peak(self) -> int:
        """The most that the run has in memory at once."""
        computed = max(self.activations, self.update)
        return self.before + self.gradients + self.optimizer + computed + self.overhead

    def __str__(self) -> str:
        parts = {
            "before training": self.before,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "overhead of allocator and kernels": self.overhead,
        }
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
        return f"about {gigabytes(self.peak)} at the peak ({listed})"


def gigabytes(size: float) -> str:
    """Return bytes as text, in GB with two digits."""
    return f"{size / 1e9:.2f} GB"


def expected_memory(module: BaseModule) -> ExpectedMemory | None:
    """Return what a run will take of the memory of its device; None for a sharded model.

    Called on one process, before the layers are compiled; no random number is drawn.
    """
    trained = [p for p in module.model.parameters() if p.requires_grad]
    if any(hasattr(p, "device_mesh") or hasattr(p, "dimensions") for p in trained):
        return None
    activations = activation_bytes(module)
    on_cpu, precision = module.device.type == "cpu", str(module.trainer.precision)
    # After the forward passes above, in which kernels are made that stay in memory.
    before = memory_in_use(module.device.type)
    state, update = optimizer_bytes(module.trainer.optimizers[0])
    return ExpectedMemory(
        before=before,
        gradients=sum(map(_bytes_of, trained)),
        optimizer=state,
        activations=activations,
        update=update,
        overhead=cpu_overhead(activations, precision, module) if on_cpu else 0,
    )


def cpu_overhead(activations: int, precision: str, module: BaseModule) -> int:
    """Return the bytes that a run on a CPU keeps beyond what it computes with."""
    kind = module.data.kind
    kernels = KERNELS[kind] if precision.startswith("bf16") else 0
    kernels *= 1 if module.adapter is None else 2
    return min(MOST_FREE[kind], round(FREE_SHARE * activations)) + kernels


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Return the bytes of an optimizer's state, and of what an update computes with."""
    if not isinstance(optimizer, MuonAdamW):
        return 2 * sum(map(_bytes_of, _parameters(optimizer))), 0
    adamw, muon = _parameters(optimizer.adamw), list(_parameters(optimizer.muon))
    by_shape = Counter[torch.Size]()
    for matrix in muon:
        by_shape[matrix.shape] += _bytes_of(matrix)
    largest = max(by_shape.values(), default=0)
    return 2 * sum(map(_bytes_of, adamw)) + sum(map(_bytes_of, muon)), UPDATE_COPIES * largest


def _parameters(optimizer: torch.optim.Optimizer | BatchedMuon) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def activation_bytes(module: BaseModule) -> int:
    """Return the bytes that the forward pass of a full micro-batch keeps for the backward pass."""
    samples = module.data.first_samples(PROBE_TOKENS)
    tokens, retained = _measure_forward(module, samples)
    per_token, fixed = retained / tokens, 0.0
    if len(samples) > 1:
        fewer_tokens, fewer_retained = _measure_forward(module, samples[::2])
        per_token = max(0.0, (retained - fewer_retained) / (tokens - fewer_tokens))
        fixed = max(0.0, retained - per_token * tokens)
    return round(fixed + per_token * max(tokens, module.data.largest_micro_batch()))


def _measure_forward(module: BaseModule, samples: list[Sample]) -> tuple[int, int]:
    """Return the tokens of some samples, and the bytes that their forward pass keeps."""
    batch = module.data.loader.pack_samples(samples).to(module.device)
    per_answer = module.data.shares_prompts
    live = LiveTensors([*module.parameters(), *module.buffers(), *_tensors(batch)])
    with _preserved_rng(module.device), live:
        with module.trainer.precision_plugin.forward_context():
            loss = module.model(batch, per_answer=per_answer)
        retained = live.bytes()
    del loss
    return sum(len(sample.ids) for sample in samples), retained


def _tensors(batch: PackedBatch) -> Iterable[Tensor]:
    return (value for value in vars(batch).values() if isinstance(value, Tensor))


@contextmanager
def _preserved_rng(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


class LiveTensors(TorchDispatchMode):
    """Context manager that counts the memory of tensors that are computed in it and still alive.

    Args:
        others: tensors that do not count; neither do their views.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute, and note the storages of the results."""
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._others:
                    weak = StorageWeakRef(storage)
                    self._storages[storage._cdata] = (weak, storage.nbytes())
        return out

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Forget the storages."""
        super().__exit__(kind, error, traceback)
        self._storages.clear()

    def bytes(self) -> int:
        """Return the memory of the storages that are still alive."""
        return sum(size for weak, size in self._storages.values() if not weak.expired())
