"""Several processes: FSDP, which shards a PackedLM, and gathering values from all of them."""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    OptimStateKeyType,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from minigpt.errors import ConfigError
from minigpt.files import atomic_directory, explain_unwritable, write_manifest
from minigpt.lightning_internals import AllProcessesStrategy
from minigpt.model.packed_lm import PackedLM
from minigpt.model.restore import SHARDED, check_fit, check_sharding, load_plain
from minigpt.model.sharded import load_into, saved_shapes

log = logging.getLogger(__name__)

T = TypeVar("T")


class FSDP2(AllProcessesStrategy):
    """Lightning's FSDP2, with sharded checkpoints that are complete or absent."""

    def gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm over the shards of all processes, a scalar."""
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None
    ) -> None:
        """Let all processes write their shards into a directory that appears when it is whole."""
        path = Path(self.broadcast(filepath))
        with explain_unwritable(path), ExitStack() as stack:
            partial = self._partial_directory(path, stack)
            try:
                super().save_checkpoint(checkpoint, partial, storage_options)
            except CheckpointException as error:  # no Exception, and hides what happened
                raise next(iter(error.failures.values()))[0] from error
            self.barrier()
            if self.is_global_zero:
                write_manifest(partial)
        self.barrier()

    def _partial_directory(self, path: Path, stack: ExitStack) -> Path:
        """Return the directory that all processes fill.

        The first process makes it, and renames it to `path` when the stack is closed.
        """
        result: Path | OSError = path
        if self.is_global_zero:
            try:
                result = stack.enter_context(atomic_directory(path))
            except OSError as error:  # raised by all processes, so that none waits for another
                result = error
        result = self.broadcast(result)
        if isinstance(result, OSError):
            raise result
        return result

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Let all processes read their shards; an adapter's checkpoint holds only the adapter.

        Raises:
            ModelError: when it holds more than plain values and tensors, or fits another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        check_sharding(path, sharded=True)
        shapes, prefix = saved_shapes(path), "state_dict."
        saved = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
        assert self.model is not None
        assert self.lightning_module is not None
        weights: dict[str, Any] = get_model_state_dict(self.model)
        expected = {name: weight.shape for name, weight in weights.items()}
        strict = self.lightning_module.strict_loading
        check_fit(path, saved, expected, strict)
        state = {name: weights[name] for name in saved}
        load_into({"state_dict": state}, path)
        self.model.load_state_dict(state, strict=strict)
        for index, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{index}"
            states = {name: get_optimizer_state_dict(self.model, optimizer)}
            load_into(states, path)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, states[name], options=options)
        return load_plain(path / SHARDED)


class FSDP1(FSDPStrategy):
    """Lightning's FSDP1, for fp16, with checkpoints like those of one process.

    It flattens the weights and gives each process a part of them.
    """

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """The types of weights and sums; buffers stay fp32, as rotary frequencies must."""
        config = super().mixed_precision_config
        return None if config is None else replace(config, buffer_dtype=torch.float32)

    def setup(self, trainer: Trainer) -> None:
        """Note each weight's dimensions, which decide about its decay, before it is flattened."""
        for weight in trainer.lightning_module.parameters():
            weight.dimensions = weight.ndim  # type: ignore[attr-defined]
        super().setup(trainer)

    def gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm over the parts of all processes, a scalar."""
        squares = torch.nn.utils.get_total_norm(gradients).square()
        torch.distributed.all_reduce(squares)
        return squares.sqrt()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Let each process take its part of the weights and of the optimizer's state.

        Raises:
            ModelError: when it holds more than plain values and tensors, or fits another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path)
        assert self.model is not None
        assert self.lightning_module is not None
        strict = self.lightning_module.strict_loading
        saved = checkpoint.pop("state_dict")
        shapes = {name: weight.shape for name, weight in saved.items()}
        unflattened = FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            FullOptimStateDictConfig(rank0_only=False),
        )
        with unflattened:
            expected = {name: weight.shape for name, weight in self.model.state_dict().items()}
            check_fit(path, shapes, expected, strict)
            self.model.load_state_dict(saved, strict=strict)
            for optimizer, state in zip(
                self.optimizers, checkpoint["optimizer_states"], strict=True
            ):
                self._load_optimizer(optimizer, state)
        return checkpoint

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        assert self.model is not None
        fsdp = FullyShardedDataParallel
        named = fsdp.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, self.model)
        optimizer.load_state_dict(fsdp.optim_state_dict_to_load(self.model, optimizer, named))


def sharding(precision: object) -> Strategy:
    """Return the strategy that `trainer.strategy: fsdp` stands for in a precision."""
    if precision != "16-mixed":
        log.info("Strategy: FSDP2.")
        return FSDP2()
    log.warning("Strategy: FSDP1, as FSDP2 does not train in 16-mixed. It is untested on GPUs.")
    return FSDP1()


def check_strategy(strategy: Strategy) -> None:
    """Refuse Lightning's own sharded strategies, from whose checkpoints no run resumes.

    Raises:
        ConfigError: for it.
    """
    shards = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    if shards and not isinstance(strategy, FSDP1 | FSDP2):
        raise ConfigError(
            f"trainer.strategy: {type(strategy).__name__} saves checkpoints that a run cannot go "
            "on from. Set trainer.strategy to fsdp."
        )


def shard(lm: PackedLM, mesh: DeviceMesh) -> None:
    """Shard each decoder layer and then the rest (embedding, norm, head) over the mesh.

    Embedding and head stay in one group: they may be one tensor.
    """
    data_mesh = mesh["data_parallel"] if mesh.ndim > 1 else mesh
    layers = [m for m in lm.hf.modules() if type(m).__name__ in (lm.hf._no_split_modules or [])]
    for module in (*layers, lm):
        fully_shard(module, mesh=data_mesh)
    if data_mesh.device_type == "cpu":  # what gloo calls an averaging reduce-scatter is a sum
        for module in lm.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def is_sharded(strategy: Strategy) -> bool:
    """Whether one process alone cannot compute with the model."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def gather_weights(strategy: Strategy, lm: PackedLM) -> dict[str, Tensor] | None:
    """Gather a sharded model's weights by name; None when it is not sharded.

    Every process must call this; only the first one needs what it returns.
    """
    if isinstance(strategy, FSDPStrategy):
        assert isinstance(strategy.model, nn.Module)
        with FullyShardedDataParallel.summon_full_params(strategy.model, writeback=False):
            return {
                name.replace("_fsdp_wrapped_module.", ""): weight.detach().cpu().clone()
                for name, weight in lm.hf.state_dict().items()
            }
    if not any(isinstance(p, DTensor) for p in lm.parameters()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(lm, options=options)
    return {n.removeprefix("hf."): w for n, w in state.items() if isinstance(w, Tensor)}


def gathered(local: list[T]) -> list[T]:
    """Return the items of all processes, one process after the other."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return local
    lists: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(lists, local)
    return [item for items in lists for item in items]


def leave_group() -> None:
    """Leave the group of processes, so that gloo's threads end before the interpreter does.

    Otherwise about every seventh process aborts at its exit, its work done and saved. A model in a
    cycle of references still refers to the group, so garbage is collected before and after.
    """
    distributed = torch.distributed
    joined = distributed.is_available() and distributed.is_initialized()
    if joined and distributed.get_backend() == "gloo":  # Lightning leaves NCCL's at the exit
        gc.collect()
        distributed.destroy_process_group()
        gc.collect()
