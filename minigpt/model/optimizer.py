"""Optimizers and schedules: parameter groups, AdamW, Muon with AdamW for the rest."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

from minigpt.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerOptions:
    """Which optimizer, and how fast.

    Args:
        name: adamw (Loshchilov and Hutter 2019, arXiv:1711.05101), or muon: hidden matrices by
            Muon (see `newton_schulz`), everything else by AdamW.
        lr: of AdamW; for muon, of its matrices.
        adamw_lr: for muon only: of the parameters that AdamW takes.
        weight_decay: of matrices; vectors are never decayed.
        betas, eps: AdamW's.
        momentum: Muon's.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    adamw_lr: float = 3e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95

    def __post_init__(self) -> None:
        for name in ("lr", "adamw_lr", "eps"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"optimizer.{name} must be above 0, but is {value}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"optimizer.weight_decay must be at least 0, but is {self.weight_decay}."
            )
        if not all(0 <= rate < 1 for rate in (*self.betas, self.momentum)):
            raise ConfigError(
                "optimizer.betas and optimizer.momentum must lie in [0, 1), but are "
                f"{self.betas} and {self.momentum}."
            )


@dataclass(frozen=True)
class ScheduleOptions:
    """How the learning rate moves, in shares of the run (or in steps, from 1 on).

    Args:
        name: wsd (warm up, stay, decay linearly; Hu et al. 2024, arXiv:2404.06395) or cosine
            (Loshchilov and Hutter 2017, arXiv:1608.03983).
        warmup: share or number of steps that rise from 0.
        decay: share or number of steps at the end that fall (wsd only).
        floor: the last learning rate, as a share of the peak.
    """

    name: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.05
    decay: float = 0.5
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "floor"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"schedule.{name} must be at least 0, but is {value}.")


def learning_rate_factor(options: ScheduleOptions, total: int) -> Callable[[int], float]:
    """Return the factor of the peak learning rate at each optimizer step, 0..total-1.

    Raises:
        ConfigError: when warm-up and decay do not fit into the run.
    """
    warmup = _steps(options.warmup, total)
    decay = _steps(options.decay, total) if options.name == "wsd" else total - warmup
    if warmup + decay > total:
        raise ConfigError(
            f"schedule: {warmup} warm-up and {decay} decay steps do not fit into {total} steps. "
            "Lower schedule.warmup or schedule.decay."
        )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        remaining = min(1.0, max(0, total - step) / decay) if decay else 1.0
        height = remaining
        if options.name == "cosine":
            height = 0.5 * (1 + math.cos(math.pi * (1 - remaining)))
        return options.floor + (1 - options.floor) * height

    return factor


def _steps(amount: float, total: int) -> int:
    return round(amount * total) if amount < 1 else round(amount)


def newton_schulz(update: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return matrices [B, m, n] made nearly orthogonal: their singular values become about 1.

    Each step is x ← a x + (b G + c G²) x with G = x xᵀ (Jordan 2024, "Muon",
    kellerjordan.github.io/posts/muon). torch.optim.Muon takes the steps in bf16, which is some
    hundred times slower than fp32 on CPUs that do not compute it in hardware.
    """
    a, b, c = coefficients
    x = update.to(torch.bfloat16 if fast_bf16(update.device) else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    return bool(torch.backends.cpu.get_cpu_capability() != "DEFAULT" and _cpu_has_bf16())


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with all matrices of one shape orthogonalised together."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices; equal to `torch.optim.Muon.step` up to the precision."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self._update(group, shape, params)

    def _update(self, group: dict[str, Any], shape: torch.Size, params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"])
        full = [u.full_tensor() if hasattr(u, "full_tensor") else u for u in updates]
        directions = newton_schulz(
            torch.stack(full), group["ns_coefficients"], group["ns_steps"]
        ).to(params[0].dtype)
        scale = 0.2 * math.sqrt(max(shape))  # an update as large as AdamW's (arXiv:2502.16982)
        for p, direction in zip(params, directions, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(_shard_like(direction, p), alpha=-group["lr"] * scale)


def _shard_like(full: Tensor, parameter: Tensor) -> Tensor:
    """Shard a full update as its parameter is sharded (FSDP2)."""
    if not hasattr(parameter, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, so that one scheduler and one checkpoint serve both.

    Args:
        matrices: parameter groups for Muon.
        rest: parameter groups for AdamW.
        options: rates and momenta.
        fused: let AdamW update by one kernel.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        rest: list[dict[str, Any]],
        options: OptimizerOptions,
        fused: bool,
    ) -> None:
        self.muon = BatchedMuon(
            matrices, lr=options.lr, momentum=options.momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(
            rest or [{"params": []}],  # LoRA leaves AdamW nothing
            lr=options.adamw_lr,
            betas=options.betas,
            eps=options.eps,
            fused=fused,
        )
        super().__init__([{**g, "by": "muon"} for g in self.muon.param_groups], {})
        for group in self.adamw.param_groups:
            self.add_param_group({**group, "by": "adamw"})
        self._share()

    def _share(self) -> None:
        """Let both halves see this optimizer's groups and state, also after a load."""
        self.muon.state = self.adamw.state = self.state
        self.muon.param_groups = [g for g in self.param_groups if g["by"] == "muon"]
        self.adamw.param_groups = [g for g in self.param_groups if g["by"] == "adamw"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run the closure, if any, then both halves; return the closure's result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        self.muon.step()
        self.adamw.step()
        return loss


def hidden_matrices(model: nn.Module) -> set[int]:
    """Return `id(p)` of all trainable 2-D weights of linear layers other than the head."""
    names = ("lm_head", ".score.", "embed")
    excluded = {id(p) for n, p in model.named_parameters() if any(name in n for name in names)}
    excluded |= {id(e.weight) for e in model.modules() if isinstance(e, nn.Embedding)}
    return {
        id(p)
        for layer in model.modules()
        if isinstance(layer, nn.Linear | Conv1D)
        for p in layer.parameters(recurse=False)
        if p.ndim == 2 and p.requires_grad and id(p) not in excluded
    }


def build_optimizer(model: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Group the trainable parameters and build the optimizer: only matrices are decayed.

    Raises:
        ConfigError: when nothing is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("Nothing to train: every parameter is frozen.")
    if options.name == "muon" and any(hasattr(p, "dimensions") for p in trainable):
        log.warning("FSDP1 flattens matrices, which Muon needs unflattened: AdamW is used.")
        options = OptimizerOptions(name="adamw", lr=options.adamw_lr)
    fused = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in trainable)
    sharded = any(hasattr(p, "device_mesh") for p in trainable)
    hidden = hidden_matrices(model) if options.name == "muon" else set()
    matrices = [p for p in trainable if id(p) in hidden]
    others = [p for p in trainable if id(p) not in hidden]
    rest = _group([p for p in others if _dimensions(p) >= 2], options.weight_decay)
    rest += _group([p for p in others if _dimensions(p) < 2], 0.0)
    if matrices:
        by_muon = _group(matrices, options.weight_decay)
        return MuonAdamW(by_muon, rest, options, fused and not sharded)
    return torch.optim.AdamW(
        rest, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused and not sharded
    )


def _group(params: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": params, "weight_decay": weight_decay}] if params else []


def _dimensions(p: nn.Parameter) -> int:
    return getattr(p, "dimensions", p.ndim)  # as `FSDP1` noted them before it flattened the weight


def build_schedule(
    optimizer: torch.optim.Optimizer, options: ScheduleOptions, total: int
) -> LambdaLR:
    """Return a scheduler to be stepped once per optimizer step."""
    return LambdaLR(optimizer, learning_rate_factor(options, total))
