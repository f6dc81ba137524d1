"""MiniGPTCLI: fit, validate, test and predict for every stage, from configs.

Beyond LightningCLI: the run directory with its loggers, checkpoints and export; precision
by hardware; errors as one paragraph.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from transformers.utils.logging import disable_progress_bar

import minigpt.stages  # noqa: F401  (makes the short class names known)
from minigpt.cli.parser import OptionError, Parser, check_configs, explained
from minigpt.data.datamodule import JSONLDataModule
from minigpt.errors import ConfigError, MiniGPTError, ModelError, RunExistsError, chain
from minigpt.model.optimizer import fast_bf16
from minigpt.model.parallel import FSDP2, check_strategy, sharding
from minigpt.runs.checkpoints import Checkpoints, WholeCheckpointIO, newest_checkpoint, verify
from minigpt.runs.loggers import JSONLLogger, RunTensorBoard
from minigpt.runs.progress import StepProgress, Throughput
from minigpt.runs.results import MakeRoom, PredictionWriter, RunRecorder, SampleText
from minigpt.runs.resume import FitLoop, SameRun
from minigpt.runs.stopping import (
    RunStatus,
    Stopping,
    locked,
    observe,
    own_words,
    signals_given_back,
)
from minigpt.stages.base import BaseModule

log = logging.getLogger("minigpt")

HELP = """Run a stage from a config; later configs and options on the command line win.

Options of the stage are model.init_args.* and data.init_args.*. They are listed by
  minigpt {verb} --model.help SFTModule        (or PretrainModule, DPOModule, LoRAModule)
  minigpt {verb} --data.help SFTDataModule     (or PretrainDataModule, DPODataModule)
"""
EXAMPLES = """examples:
  minigpt fit --config configs/sft.yaml
  minigpt fit --config configs/sft.yaml --config configs/hardware/ddp.yaml
  minigpt fit --config configs/sft.yaml --run_dir outputs/mine --trainer.max_steps 100
  minigpt fit --config configs/sft.yaml --ckpt_path auto
  minigpt validate --config configs/sft.yaml
  minigpt test --config configs/sft.yaml
  minigpt predict --config configs/sft.yaml --data.init_args.predict prompts.jsonl
"""


@dataclass(frozen=True)
class CheckpointOptions:
    """When checkpoints are saved.

    Args:
        every: optimizer steps between two.
        keep: how many are kept.
    """

    every: int = 500
    keep: int = 2


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config into the run directory when training starts.

    For `fit` only: testing a run does not change what made it.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Nothing: the run may still be refused, and the directory hold another's config."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Save it."""
        super().setup(trainer, pl_module, "fit")


class MiniGPTCLI(LightningCLI):
    """The verbs that need a Trainer.

    Args:
        args: the command line after `minigpt`; the first word is the verb.
    """

    def __init__(self, args: list[str]) -> None:
        self.verb = args[0]
        self.throughput = Throughput()
        self.status: RunStatus | None = None  # of a `fit` that holds its run directory
        with self._ended_in_order(), warnings.catch_warnings():
            # DDP starts this program again from sys.argv, so it stays what the user typed.
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            super().__init__(
                BaseModule,
                JSONLDataModule,
                SaveConfig,
                {"overwrite": True},
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=42,
                parser_class=Parser,
                parser_kwargs={
                    self.verb: {
                        "usage": f"minigpt {self.verb} --config FILE [--config OVERLAY] [options]",
                        "description": HELP.format(verb=self.verb),
                        "epilog": EXAMPLES,
                    }
                },
                trainer_defaults={
                    "max_epochs": -1,
                    "precision": None,
                    "num_sanity_val_steps": -1,  # the held-out loss before the first step
                    "check_val_every_n_epoch": None,
                    "log_every_n_steps": 10,
                    "gradient_clip_val": 1.0,
                    "use_distributed_sampler": False,
                    "enable_model_summary": False,
                },
                args=args,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Build the parser of the chosen verb only: each takes a second."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run directory and what happens in it."""
        parser.add_argument("--run_dir", type=str, default="outputs/run", help="Where the run is.")
        parser.add_argument(
            *("--overwrite",), type=bool, default=False, help="Start over in a used run directory."
        )
        parser.add_argument(
            *("--predictions",), type=str | None, default=None, help="Where predict writes."
        )
        parser.add_argument(
            *("--allow_changes",),
            type=bool,
            default=False,
            help="Go on from a checkpoint with other data, tokenizer or base.",
        )
        parser.add_class_arguments(CheckpointOptions, "checkpoint")

    def _parse_ckpt_path(self) -> None:
        """Keep the config as it is: Lightning would put a checkpoint's old values over it."""

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self._get(self.config, "run_dir"))

    def before_instantiate_classes(self) -> None:
        """Settle what depends on the run directory and the hardware."""
        config = self.config[self.verb]
        self.stale: list[Path] = []  # what an earlier run left and this one replaces
        if self.verb == "fit":
            if first := is_first_process():
                self.held.enter_context(locked(self.run_dir))
            self.status = RunStatus(self.run_dir, first)
            observe(self.status, self.held)
            check_numbers(config)
            check_weights(config.trainer.precision)
        self._settle_start(config)
        config.weights_only = True  # no checkpoint may run code
        if self.verb in ("validate", "test"):
            config.verbose = False  # the results are told in our own lines
        config.trainer.precision = choose_precision(
            config.trainer.precision, config.trainer.accelerator, config.trainer.strategy
        )
        config.trainer.default_root_dir = str(self.run_dir)
        if config.trainer.accelerator == "auto":  # MPS only when asked for: it is untested
            config.trainer.accelerator = "gpu" if torch.cuda.is_available() else "cpu"
        if "TORCHELASTIC_RUN_ID" in os.environ and config.trainer.devices == "auto":
            join_launcher(config.trainer)

    def _settle_start(self, config: Any) -> None:
        if config.get("ckpt_path") == "auto":
            newest = newest_checkpoint(self.run_dir)
            config.ckpt_path = str(newest) if newest else None
            log.info("%s", f"Resuming from {newest}" if newest else "No checkpoint: starting anew.")
            if newest is None and self.verb == "fit" and is_first_process():
                self.stale = leftovers(self.run_dir, ("metrics.jsonl",))
        elif config.get("ckpt_path"):
            verify(Path(config.ckpt_path))
        elif self.verb == "fit" and is_first_process():
            self.stale = claim(self.run_dir, config.overwrite)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb, ready for signals: data is prepared before any callback is asked."""
        if self.verb == "fit":
            self.stopping.install()
        super()._run_subcommand(subcommand)

    @contextmanager
    def _ended_in_order(self) -> Iterator[None]:
        """Hold what a `fit` takes until its end, and note in its run directory how it ended."""
        with signals_given_back(), ExitStack() as self.held:
            try:
                yield
            except BaseException as error:
                if self.status is None:
                    raise
                own = own_words(error, self.run_dir)
                if not isinstance(own, RunExistsError):  # what is there stays as it is
                    self.status.end(own)
                if own is error:
                    raise
                raise own from error

    def instantiate_classes(self) -> None:
        """Build the stage; what its classes refuse is told in their own words."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            own = next((e for e in chain(error) if isinstance(e, MiniGPTError)), None)
            if own is None:
                raise
            raise own from error

    def after_instantiate_classes(self) -> None:
        """Let validate, test and predict use the run's own model."""
        if self.verb == "fit" or self._get(self.config, "ckpt_path"):
            return
        if not (self.run_dir / "hf").is_dir():
            raise ModelError(
                f"There is no trained model in {self.run_dir}. Train it with: minigpt fit "
                "--config CONFIG, or name another run with --run_dir."
            )
        self.model.trained = str(self.run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run directory's loggers and callbacks."""
        config = self.config_init[self.verb]
        own: list[Any] = [self.throughput, RunRecorder(self.run_dir, self.throughput), SampleText()]
        if self.verb == "fit":
            own.insert(0, MakeRoom(self.stale))
            saving = Checkpoints(self.run_dir, config.checkpoint.every, config.checkpoint.keep)
            assert self.status is not None
            self.stopping = Stopping(saving, self.status)
            same = SameRun(config.allow_changes, self._options(), config.ckpt_path)
            own += [self.status, same, self.stopping, saving]
        if self.verb == "predict":
            target = config.predictions or self.run_dir / "predictions.jsonl"
            own.append(PredictionWriter(Path(target)))
        if config.trainer.enable_progress_bar is not False:
            own.append(StepProgress(self.throughput))
        config.trainer.callbacks = [*(config.trainer.callbacks or []), *own]
        if config.trainer.logger is None and self.verb == "fit":
            config.trainer.logger = [RunTensorBoard(self.run_dir), JSONLLogger(self.run_dir)]
        elif config.trainer.logger is None:
            config.trainer.logger = False
        if config.trainer.strategy == "fsdp":
            config.trainer.strategy = sharding(config.trainer.precision)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, ImportError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
        check_strategy(trainer.strategy)
        if not isinstance(trainer.strategy, FSDP2):
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        FitLoop.put_in(trainer)
        trainer.hyper = self._hyperparameters()  # type: ignore[attr-defined]
        return trainer

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = self.config[self.verb].model.as_dict()["init_args"]
        return options

    def _hyperparameters(self) -> dict[str, Any]:
        config = self.config[self.verb]
        chosen = {"model": config.model, "data": config.data}
        flat: dict[str, Any] = {}
        for section, values in chosen.items():
            for name, value in values.as_dict().get("init_args", {}).items():
                parts = value.items() if isinstance(value, dict) else [("", value)]
                flat |= {f"{section}/{name}/{key}".rstrip("/"): v for key, v in parts}
        return {k: v if isinstance(v, int | float | str) else str(v) for k, v in flat.items()}


def is_first_process() -> bool:
    """Whether no launcher has made this process another one's helper."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0")) <= 0 for name in names)


def join_launcher(trainer: Any) -> None:
    """Use the processes that `torchrun` or `accelerate launch` has started."""
    here, all_ = (int(os.environ.get(n, "1")) for n in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    trainer.devices, trainer.num_nodes = here, all_ // here


def choose_precision(asked: Any, accelerator: str, strategy: Any = "auto") -> Any:
    """Return the precision to train in: as asked, or what the hardware multiplies fast.

    A CPU does not train in fp16: 16-mixed becomes bf16-mixed where the CPU has it, and
    fp32 where bf16 would be emulated. FSDP2 does not train in 16-mixed. Said in one line.
    """
    asked = {"16": "16-mixed", "bf16": "bf16-mixed"}.get(str(asked), asked)
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if asked is not None and not (on_cpu and asked == "16-mixed"):
        return asked
    chosen = fast_precision(accelerator, on_cpu)
    if asked == "16-mixed":
        fast = chosen == "bf16-mixed"
        told = ": bf16 is used" if fast else ", nor has this one native bf16: fp32 is used"
        log.info("fp16 does not train on a CPU%s.", told)
    else:
        if chosen == "16-mixed" and str(getattr(strategy, "class_path", "")).endswith(".FSDP2"):
            chosen = "32-true"
        log.info("Precision: %s (chosen by hardware).", chosen)
    return chosen


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


# What a run writes; a new run removes these and nothing else. It writes config.yaml over.
RUN_FILES = ("checkpoints", "hf", "metrics.jsonl", "summary.json", "exam.json", "status.json")


def claim(run_dir: Path, overwrite: bool) -> list[Path]:
    """Return what an earlier run left in a run directory.

    Raises:
        RunExistsError: when it holds a run and `overwrite` is false.
    """
    used = [name for name in ("hf", "checkpoints") if (run_dir / name).exists()]
    if used and not overwrite:
        raise RunExistsError(
            f"{run_dir} already holds a run ({', '.join(used)}). Resume it with --ckpt_path auto "
            "(scripts: --resume), start over with --overwrite true (scripts: --overwrite), or "
            "choose another --run_dir (scripts: --output_dir)."
        )
    return leftovers(run_dir, RUN_FILES)


def leftovers(run_dir: Path, names: Sequence[str]) -> list[Path]:
    """Return which of the named files, and TensorBoard's, an earlier run left."""
    left = [*(run_dir / name for name in names), *run_dir.glob("events.out.tfevents.*")]
    return [path for path in left if path.exists()]


def check_numbers(config: Any) -> None:
    """Refuse numbers that Lightning would take, or refuse in a traceback.

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
        "checkpoint.every": (config.checkpoint.every, False),
        "checkpoint.keep": (config.checkpoint.keep, False),
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
    endless = all(limits[f"trainer.max_{unit}"][1] for unit in ("steps", "epochs"))
    if endless and not trainer.fast_dev_run:
        raise ConfigError("The run has no end: set trainer.max_steps or trainer.max_epochs.")


def check_weights(precision: Any) -> None:
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


def run(args: list[str]) -> MiniGPTCLI:
    """Run one verb, such as ``run(["fit", "--config", "configs/sft.yaml"])``."""
    quiet()
    check_configs(args)
    try:
        return MiniGPTCLI(args)
    except OptionError as error:
        raise explained(error, args) from error


def quiet() -> None:
    """Silence the libraries' hints that no user of MiniGPT can act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", text)
    # The numbers are summed over all processes before they are logged.
    warnings.filterwarnings("ignore", ".*It is recommended to use .self.log.*sync_dist.*")
    warnings.filterwarnings("ignore", ".*Total length of .list. across ranks is zero.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated.*")
    disable_progress_bar()
