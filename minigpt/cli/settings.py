"""Settings of a run: numbers that are refused, and precision by hardware."""

from __future__ import annotations

import logging
import os

import torch
from jsonargparse import Namespace

from minigpt.errors import ConfigError
from minigpt.model.optimizer import fast_bf16

log = logging.getLogger("minigpt")

# A launcher, or a user who starts each machine alone, sets one of these variables.
LAUNCHERS = (
    "TORCHELASTIC_RUN_ID",
    "MASTER_ADDR",
    "NODE_RANK",
    "SLURM_JOB_ID",
    "LSB_JOBID",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "KUBERNETES_PORT",
)


def is_first_process() -> bool:
    """Whether no launcher has given this process a rank above 0."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0")) <= 0 for name in names)


def join_launcher(trainer: Namespace) -> None:
    """Use the processes that `torchrun` or `accelerate launch` has started."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer.devices = local
    trainer.num_nodes = world // local


def check_machines(trainer: Namespace) -> None:
    """Refuse several machines where nothing says which of them this one is.

    Each would take itself for the first, and wait for the others without end.

    Raises:
        ConfigError: for them.
    """
    is_launched = trainer.plugins or any(name in os.environ for name in LAUNCHERS)
    if trainer.num_nodes != 1 and not is_launched:
        raise ConfigError(
            f"trainer.num_nodes is {trainer.num_nodes}, but no launcher has started this process. "
            "Start it on each machine: torchrun --nnodes N --nproc_per_node GPUS --node_rank I "
            "--master_addr FIRST_MACHINE -m minigpt fit --config ..., or by srun."
        )


def choose_precision(requested: object, accelerator: str, strategy: object = "auto") -> str:
    """Return the precision to train in: as requested, or what the hardware multiplies fast.

    A CPU does not train in fp16: 16-mixed becomes bf16-mixed where the CPU has it, and
    fp32 where bf16 would be emulated. FSDP2 does not train in 16-mixed. Logged in one line.

    Args:
        requested: as in the config; None to choose by hardware.
        accelerator: of the Trainer.
        strategy: of the Trainer, as in the config.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if requested is not None:
        named = {"16": "16-mixed", "bf16": "bf16-mixed"}.get(str(requested), str(requested))
        if not (on_cpu and named == "16-mixed"):
            return named
        precision = fast_precision(accelerator, on_cpu)
        if precision == "bf16-mixed":
            log.info("fp16 does not train on a CPU: bf16 is used.")
        else:
            log.info("fp16 does not train on a CPU, nor has this one native bf16: fp32 is used.")
        return precision
    precision = fast_precision(accelerator, on_cpu)
    if precision == "16-mixed" and str(getattr(strategy, "class_path", "")).endswith(".FSDP2"):
        precision = "32-true"
    log.info("Precision: %s (chosen by hardware).", precision)
    return precision


def fast_precision(accelerator: str, on_cpu: bool) -> str:
    """Return the precision that the hardware multiplies fast.

    GPUs before Ampere (compute capability 8.0) emulate bf16; from Volta (7.0) on their tensor
    cores multiply fp16. AMD's compute bf16.
    """
    if on_cpu:
        return "bf16-mixed" if fast_bf16(torch.device("cpu")) else "32-true"
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"  # such as MPS, which is untested
    if fast_bf16(torch.device("cuda")):
        return "bf16-mixed"
    return "16-mixed" if torch.cuda.get_device_capability() >= (7, 0) else "32-true"


def check_numbers(config: Namespace) -> None:
    """Refuse numbers that make no sense, but which Lightning takes, or refuses in a traceback.

    Raises:
        ConfigError: for the first one that is out of range.
    """
    trainer = config.trainer
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    limits = {
        "trainer.max_steps": (trainer.max_steps, trainer.max_steps == -1),
        "trainer.max_epochs": (trainer.max_epochs, trainer.max_epochs in (None, -1)),
        "trainer.accumulate_grad_batches": (trainer.accumulate_grad_batches, False),
        "trainer.log_every_n_steps": (trainer.log_every_n_steps, trainer.log_every_n_steps is None),
        "trainer.val_check_interval": (interval, not isinstance(interval, int)),
        "trainer.check_val_every_n_epoch": (epochs, epochs is None),
        "validate.every": (config.validate.every, config.validate.every in (None, "epoch")),
        "checkpoint.every": (config.checkpoint.every, False),
        "checkpoint.keep": (config.checkpoint.keep, config.checkpoint.keep == "all"),
    }
    for name, (value, unset) in limits.items():
        if not unset and value < 1:
            raise ConfigError(f"{name} must be at least 1, but is {value}.")
    for name in ("limit_train_batches", "limit_val_batches", "overfit_batches"):
        value = getattr(trainer, name)
        if isinstance(value, float) and 0 < value < 1:
            raise ConfigError(
                f"trainer.{name} must be a whole number of batches, but is {value}: how many there "
                "are is known only when they are packed."
            )
    if isinstance(interval, float) and (interval != 1 or epochs is None):
        raise ConfigError(
            "trainer.val_check_interval must be a whole number of batches between validations, "
            f"but is {interval}. For one at the end of each epoch leave it out and set "
            "trainer.check_val_every_n_epoch to 1."
        )
    if config.validate.every is not None and interval is not None:
        raise ConfigError(
            f"validate.every is {config.validate.every} and trainer.val_check_interval {interval}: "
            "give one of them."
        )
    step_tokens = config.data.init_args.get("tokens_per_step")  # GRPO's data has none
    if trainer.accumulate_grad_batches != 1 and step_tokens is not None:
        raise ConfigError(
            "data.tokens_per_step decides how many micro-batches make a step: leave out "
            f"trainer.accumulate_grad_batches, which is {trainer.accumulate_grad_batches}."
        )
    endless = all(limits[f"trainer.max_{unit}"][1] for unit in ("steps", "epochs"))
    if endless and not trainer.fast_dev_run:
        raise ConfigError("The run has no end: set trainer.max_steps or trainer.max_epochs.")


def check_seed(seed: int) -> None:
    """Refuse, with a ConfigError, a seed that numpy's generators do not take."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything must lie in 0 to {2**32 - 1}, but is {seed}.")


def check_weights(precision: object) -> None:
    """Refuse to train weights in fp16, and say what weights in bf16 lose.

    Raises:
        ConfigError: for 16-true.
    """
    if precision == "16-true":
        raise ConfigError(
            "trainer.precision 16-true keeps weights and the optimizer's moments in fp16, in which "
            "the squares of small gradients are 0. Train in 16-mixed, bf16-mixed or bf16-true."
        )
    if precision == "bf16-true":
        log.warning(
            "bf16-true keeps the weights in 8 bits of precision: an update of less than 1/512 of "
            "a weight is lost. bf16-mixed keeps them in fp32."
        )
