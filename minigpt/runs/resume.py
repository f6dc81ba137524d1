"""Exact resume: the same data, tokenizer and base; the same random numbers; the same threads."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast

from minigpt import accel
from minigpt.errors import ConfigError
from minigpt.files import MANIFEST, digest, weights_digest
from minigpt.lightning_internals import (
    batches_started,
    restart_at,
    validate_now,
    validation_follows,
)
from minigpt.model.parallel import gathered
from minigpt.model.pretrained import find_model
from minigpt.runs.checkpoints import saved_state
from minigpt.runs.loggers import JSONLLogger, RunTensorBoard
from minigpt.runs.status import restoring
from minigpt.stages.base import BaseModule

log = logging.getLogger(__name__)

# What may not change at all: the state of one does not fit another.
FIXED = {"stage", "method", "architecture", "vocabulary"}
# What AdamW and Muon keep of a weight.
MOMENTS = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
# Options of a stage that are compared by content or under other names, or do not move the weights.
# A spike's policy may change, so that one can resume after a spike.
NOT_COMPARED = {
    "activation_checkpointing",
    "collapse",
    "compile_layers",
    "init_from",
    "lora",
    "optimizer",
    "reference",
    "sample_prompts",
    "sampling",
    "spike",
    "success",
    "tokenizer",
}


@dataclass
class ResumePoint:
    """The state of a run after an optimizer step, which is what a checkpoint describes.

    Args:
        batches: micro-batches of this process so far.
        validation_due: whether a validation comes before the next batch.
        rng_states: of the generators that dropout draws from, CPU first and then GPU.
        logged: what the step logs, which happens only after its checkpoint is saved.
    """

    batches: int = 0
    validation_due: bool = False
    rng_states: list[Tensor] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)


class SameCheckpoint(Callback):
    """Refuses processes that go on from different checkpoints, such as of machines' own disks.

    Args:
        checkpoint: path of the one that this process goes on from, if any.
    """

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the checkpoints of all processes, before anything is loaded.

        Raises:
            ConfigError: in all processes, when one of them sees another checkpoint, or none.
        """
        start = "from no checkpoint"
        if self.checkpoint is not None:
            path = Path(self.checkpoint)
            start = f"from {path.name} with manifest {digest(path / MANIFEST)[:12]}"
        starts = gathered([start])
        if len(set(starts)) > 1:
            firsts = [f"process {starts.index(start)} {start}" for start in dict.fromkeys(starts)]
            raise ConfigError(
                f"The processes of this run do not start alike: {', '.join(firsts)}. Let all "
                "machines see one run directory, or copy the checkpoint to the same place on each."
            )


class ExactResume(Callback):
    """Saves in each checkpoint what identifies its run, and compares before a run goes on from it.

    Args:
        allow_changes: resume with other data, tokenizer, base or options, and only warn.
        options: the stage's, as in the config.
        checkpoint: its path, when the run resumes from one.
    """

    def __init__(
        self, allow_changes: bool, options: Mapping[str, object], checkpoint: str | None
    ) -> None:
        self.allow_changes = allow_changes
        self.options = options
        self.checkpoint = checkpoint
        self.identity: dict[str, str] = {}
        self.changed: list[str] = []
        self.configured_groups: list[dict[str, Any]] = []
        self.rng_states_to_restore: list[Tensor] = []
        self.resumed = False
        self.step = -1
        self.last_step = 0
        self.point = ResumePoint()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the run with the checkpoint's, before a model is built and weights are loaded.

        Raises:
            ConfigError: when the run is not the one that the checkpoint belongs to.
        """
        assert isinstance(pl_module, BaseModule)
        self.identity = run_identity(trainer, pl_module, self.options)
        check_alike(gathered([self.identity]))
        if self.checkpoint is not None:
            with restoring(Path(self.checkpoint)):
                saved = dict(saved_state(Path(self.checkpoint)).get("run", {}))
                if "stage" in saved:
                    saved["stage"] = stage_name(saved["stage"])
                self._compare(saved, self.identity)

    def _compare(self, saved: dict[str, str], now: dict[str, str]) -> None:
        names = saved.keys() | now.keys()
        unset = as_text(None)  # an option that is newer than the checkpoint, and left out
        self.changed = sorted(n for n in names if saved.get(n, unset) != now.get(n, unset))
        if not self.changed:
            return
        changes = "; ".join(f"{k} was {saved.get(k)}, is {now.get(k)}" for k in self.changed)
        fixed = FIXED.intersection(self.changed)
        if fixed or not self.allow_changes:
            override = "" if fixed else ", or go on all the same with --allow_changes true"
            raise ConfigError(
                f"This is not the run that the checkpoint belongs to: {changes}. Put it back, "
                f"or start a new run{override}."
            )
        log.warning("Going on although this is another run: %s.", changes)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the optimizer's options before a checkpoint's replace them."""
        groups = trainer.optimizers[0].param_groups
        self.configured_groups = [
            {name: value for name, value in group.items() if name != "params"} for group in groups
        ]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Note the state of the run after an optimizer step."""
        if trainer.global_step != self.step:
            is_last = trainer.global_step >= self.last_step and trainer.enable_validation
            self._note(trainer, pl_module, validation_follows(trainer) or is_last)

    def _note(self, trainer: Trainer, pl_module: LightningModule, validation_due: bool) -> None:
        self.step = trainer.global_step
        states = rng_states(pl_module.device)
        self.point = ResumePoint(batches_started(trainer), validation_due, states)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation after the last step is done."""
        self.point.validation_due = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the run's identity, its numeric environment, and the state after its last step."""
        assert isinstance(pl_module, BaseModule)
        checkpoint["run"] = self.identity
        checkpoint["machine"] = numeric_environment(trainer, pl_module)
        checkpoint["boundary"] = {
            "batches": self.point.batches,
            "validation_due": self.point.validation_due,
            "chance": gathered([self.point.rng_states]),
            "logged": step_row(trainer, pl_module),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the number of threads and whether layers are compiled; read the resume point."""
        if trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, BaseModule)
        machine = checkpoint.get("machine", {})
        if pl_module.compiled is None:
            pl_module.compiled = machine.get("compiled")
        restore_environment(machine, numeric_environment(trainer, pl_module))
        check_types(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict(), "fit_loop")
        saved = checkpoint["boundary"]
        states, rank = saved["chance"], trainer.global_rank
        self.point = ResumePoint(
            int(saved["batches"]),
            bool(saved["validation_due"]),
            checked_states(states[rank] if rank < len(states) else []),
            {name: float(value) for name, value in saved.get("logged", {}).items()},
        )
        self.resumed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where the checkpoint was saved."""
        assert isinstance(pl_module, BaseModule)
        self.last_step = pl_module.total_steps()
        if not self.resumed:
            self._note(trainer, pl_module, False)
            return
        assert self.checkpoint is not None
        with restoring(Path(self.checkpoint)):
            check_moments(trainer)
            self._restore_rates(trainer)
        self.step = trainer.global_step
        self.rng_states_to_restore = self.point.rng_states
        self._restore_logs(trainer)
        epoch, _ = pl_module.data.position
        restart_at(trainer, epoch, self.point.batches)
        if self.point.validation_due:
            validate_now(trainer)

    def _restore_logs(self, trainer: Trainer) -> None:
        """Take out what was logged after the checkpoint; put in what its step could not log.

        The latter only in the directory of the checkpoint: a run in another one has its own log.
        """
        steps = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, JSONLLogger | RunTensorBoard):
                logger.rewind(steps, self.point.validation_due)
        assert self.checkpoint is not None
        run_dir = Path(self.checkpoint).resolve().parent.parent
        files = [logger for logger in trainer.loggers if isinstance(logger, JSONLLogger)]
        in_run_dir = [file for file in files if file.path.resolve().parent == run_dir]
        lost = trainer.is_global_zero and any(file.lacks_step(steps - 1) for file in in_run_dir)
        if lost and self.point.logged:
            for logger in trainer.loggers:
                logger.log_metrics(self.point.logged, steps - 1)

    def _restore_rates(self, trainer: Trainer) -> None:
        """Put the config's options in force, and the rate that the run's length gives this step.

        A checkpoint holds the rate of the length that the run had then.
        """
        schedule = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, LambdaLR)
        groups = trainer.optimizers[0].param_groups
        schedule.base_lrs = [group["initial_lr"] for group in self.configured_groups]
        for group, configured in zip(groups, self.configured_groups, strict=True):
            group.update(configured)
        rates = zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, peak, factor in rates:
            group["lr"] = peak * factor(schedule.last_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Restore the states of the random generators before the first batch."""
        if self.rng_states_to_restore:
            torch.set_rng_state(self.rng_states_to_restore[0])
            if pl_module.device.type == "cuda" and len(self.rng_states_to_restore) > 1:
                torch.cuda.set_rng_state(self.rng_states_to_restore[1], pl_module.device)
            self.rng_states_to_restore = []


def step_row(trainer: Trainer, module: BaseModule) -> dict[str, float]:
    """Return what is logged of the last step, but for its speed; {} if nothing is."""
    if trainer.global_step % module.log_every:
        return {}
    metrics = trainer.logged_metrics.items()
    return {k: float(v) for k, v in metrics if k != "tokens_per_s" and not k.startswith("val/")}


def rng_states(device: torch.device) -> list[Tensor]:
    """Return the states of this process's generators."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def checked_states(states: list[Tensor]) -> list[Tensor]:
    """Return the saved states of generators, CPU first; raises PyTorch's error for a bad one."""
    if states:
        torch.Generator().set_state(states[0])
    return states


def check_types(saved: object, current: object, name: str) -> None:
    """Check that saved counters of Lightning's loops have the types of the current ones.

    Raises:
        ValueError: for the first one that has another type.
    """
    if not isinstance(saved, type(current)):
        raise ValueError(f"{name} is of type {type(saved).__name__}")
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in current.keys() & saved.keys():
            check_types(saved[key], current[key], f"{name}.{key}")


def check_moments(trainer: Trainer) -> None:
    """Check that the optimizer's restored moments are complete and have the shapes of the weights.

    PyTorch does not, and a fused step would read beyond the memory of smaller moments.

    Raises:
        ValueError: for the first one that is missing or does not fit.
    """
    for weight, state in trainer.optimizers[0].state.items():
        if state and set(state) not in MOMENTS:
            raise ValueError(f"a weight has the moments {', '.join(map(str, state))}")
        shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
        for name, shape in shapes.items():
            if shape != (torch.Size() if name == "step" else weight.shape):
                raise ValueError(f"{name} does not fit its weight of shape {list(weight.shape)}")


def restore_environment(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Use as many threads as the checkpoint's run, and warn of what else differs."""
    if saved.get("threads", now["threads"]) != now["threads"]:
        torch.set_num_threads(saved["threads"])  # sums depend on how many threads share them
        log.info("Threads: %d, as before.", saved["threads"])
    for name in ("processes", "precision", "torch", "compiled", "attention"):
        before = saved.get(name, now[name])
        if before != now[name]:
            log.warning(
                "%s: %s before, %s now. The order of data is the same; numbers agree up to "
                "rounding.",
                name,
                before,
                now[name],
            )


def run_identity(
    trainer: Trainer, module: BaseModule, options: Mapping[str, object]
) -> dict[str, str]:
    """Return what makes a run this run, as short texts that can be compared and read."""
    data = module.data
    rates = asdict(module.optimizer_options)
    compared = {name: value for name, value in options.items() if name not in NOT_COMPARED}
    architecture = compared.get("architecture")
    if isinstance(architecture, Mapping):
        sizes = dict(architecture)
        compared["dropout"] = sizes.pop("dropout")  # fits any weights
        compared["architecture"] = sizes
    identity = {
        "stage": stage_name(type(module).__name__),
        "method": f"{rates.pop('name')}, {module.lora or 'all weights'}",
        "optimizer": as_text(rates),
        "tokenizer": tokenizer_digest(module.tokenizer),
        "vocabulary": str(len(module.tokenizer)),
        "data": data.fingerprint(),
        "seed": str(data.seed),
        "tokens_per_batch": str(data.tokens_per_batch),
        "batches_per_step": str(trainer.accumulate_grad_batches * trainer.world_size),
        "gradient_clip_val": clipping(trainer),
        **{name: as_text(value) for name, value in compared.items()},
        **epoch_limits(trainer),
    }
    if module.needs_base:
        assert module.start.init_from is not None
        identity["base"] = model_digest(module.start.init_from)
    return identity


def check_alike(identities: list[dict[str, str]]) -> None:
    """Check that all processes train the same run, on the same data.

    Raises:
        ConfigError: with the first difference.
    """
    first = identities[0]
    for rank, identity in enumerate(identities):
        for name in sorted(first.keys() | identity.keys()):
            if identity.get(name) != first.get(name):
                raise ConfigError(
                    f"The processes of this run do not train alike: {name} is {first.get(name)} "
                    f"in process 0 and {identity.get(name)} in process {rank}. Give all of them "
                    "the same config and the same files."
                )


def stage_name(module_class: str) -> str:
    """Return the stage of a module's class: `LoRAModule` is `SFTModule` with an adapter."""
    return "SFTModule" if module_class == "LoRAModule" else module_class


def epoch_limits(trainer: Trainer) -> dict[str, str]:
    """Return what makes an epoch shorter than the data."""
    defaults = {"limit_train_batches": 1.0, "overfit_batches": 0.0}
    values = {name: getattr(trainer, name) for name in defaults}
    return {name: str(value) for name, value in values.items() if value != defaults[name]}


def clipping(trainer: Trainer) -> str:
    """Return how gradients are clipped."""
    by = " by value" if trainer.gradient_clip_algorithm == "value" else ""
    return f"{trainer.gradient_clip_val}{by}"


def as_text(value: object) -> str:
    """Return an option as a short text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def numeric_environment(trainer: Trainer, module: BaseModule) -> dict[str, Any]:
    """Return what may change the last bits of a sum: hardware, software, number of processes."""
    cpu_bf16 = str(trainer.precision).startswith("bf16") and module.device.type == "cpu"
    return {
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "torch": str(torch.__version__),
        "compiled": module.compiled,
        "attention": accel.attention_name(cpu_bf16),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a digest of a tokenizer's vocabulary and template."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def model_digest(location: str) -> str:
    """Return a digest of a model's weight files; of its name, for one on a hub."""
    model = find_model(location)
    return weights_digest(model) if isinstance(model, Path) else model
