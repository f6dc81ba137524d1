"""MiniGPTCLI: fit, validate, test and predict for every stage, from configs.

Beyond LightningCLI: the run directory with its loggers, checkpoints and export; precision
by hardware; errors as one paragraph.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger

import minigpt.stages  # noqa: F401  (registers the short class names)
from minigpt.cli.options import check_distinct, quiet
from minigpt.cli.parser import (
    OptionError,
    Parser,
    check_configs,
    check_sections,
    explained,
    replaced_options,
    with_file_names,
)
from minigpt.cli.settings import (
    check_machines,
    check_numbers,
    check_seed,
    check_weights,
    choose_precision,
    fast_precision,
    is_first_process,
    join_launcher,
)
from minigpt.data.datamodule import JSONLDataModule
from minigpt.errors import ConfigError, MiniGPTError, ModelError, RunExistsError, chain
from minigpt.lightning_internals import (
    FitLoop,
    RestoringConnector,
    VerbCLI,
    observe_children,
)
from minigpt.model.parallel import FSDP2, check_strategy, sharding
from minigpt.runs.checkpoints import (
    AtomicCheckpointIO,
    CheckpointOptions,
    Checkpoints,
    newest_checkpoint,
    verify,
)
from minigpt.runs.claim import locked, stale_files, stale_run
from minigpt.runs.loggers import JSONLLogger, RunTensorBoard
from minigpt.runs.plan import RunPlan
from minigpt.runs.progress import StepProgress, Throughput
from minigpt.runs.results import (
    Hyperparameter,
    PredictionWriter,
    RemoveStaleRun,
    RunRecorder,
    SampleText,
)
from minigpt.runs.resume import ExactResume, SameCheckpoint
from minigpt.runs.status import RunStatus, as_user_error, misconfigured, restoring
from minigpt.runs.stopping import Stopping, restored_signals
from minigpt.stages.base import BaseModule

log = logging.getLogger("minigpt")

HELP = """Run a stage from a config; later configs and options on the command line win.

Options of the stage are model.init_args.* and data.init_args.*. They are listed by
  minigpt {verb} --model.help SFTModule     (or Pretrain-, DPO-, KTO-, GRPO-, Reward-, LoRAModule)
  minigpt {verb} --data.help SFTDataModule  (or Pretrain-, DPO-, KTO-, GRPODataModule)
"""
EXAMPLES = """examples:
  minigpt fit --config configs/sft.yaml
  minigpt fit --config configs/recipes/hub_lora.yaml --data.init_args.train mine.jsonl
  minigpt fit --config configs/sft.yaml --trainer.devices 2
  minigpt fit --config configs/sft.yaml --run_dir outputs/short --trainer.max_steps 100
  minigpt fit --config configs/sft.yaml --ckpt_path auto
  minigpt validate --config configs/sft.yaml
  minigpt test --config configs/sft.yaml
  minigpt predict --config configs/sft.yaml --data.init_args.predict prompts.jsonl
"""


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config into the run directory when training starts.

    For `fit` only: testing a run does not change what made it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: the run may still be refused, and the directory hold another's config."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save it."""
        super().setup(trainer, pl_module, "fit")


def add_run_options(parser: ArgumentParser) -> None:
    """Add the run directory and what happens in it."""
    parser.add_argument("--run_dir", type=str, default="outputs/run", help="Where the run is.")
    parser.add_argument(
        "--overwrite", type=bool, default=False, help="Start over in a used run directory."
    )
    parser.add_argument(
        "--predictions", type=str | None, default=None, help="Where predict writes."
    )
    parser.add_argument(
        "--allow_changes",
        type=bool,
        default=False,
        help="Go on from a checkpoint with other data, tokenizer or base.",
    )
    parser.add_class_arguments(CheckpointOptions, "checkpoint")
    parser.add_argument(
        "--validate.every",
        type=int | Literal["epoch"] | None,
        default=None,
        help="Optimizer steps between two validations, or epoch for one at each epoch's end.",
    )


class MiniGPTCLI(VerbCLI):
    """The verbs that need a Trainer.

    Args:
        args: the command line after `minigpt`; the first word is the verb.
    """

    def __init__(self, args: list[str]) -> None:
        self.verb = args[0]
        self.replaced = replaced_options(args)
        self.throughput = Throughput()
        self.status: RunStatus | None = None  # of a `fit` that holds its run directory
        with self._recording_end(), warnings.catch_warnings():
            # DDP starts this program again from sys.argv, so it stays what the user typed.
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            if self.verb != "fit":  # whose callbacks alone save checkpoints and go on from them
                warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
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
        """Return the chosen verb alone: building the parser of each takes a second."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line; refuse empty sections, and a seed before Lightning takes it."""
        super().parse_arguments(parser, args)
        check_sections(self.options)
        check_seed(self.options.seed_everything)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run."""
        add_run_options(parser)

    @property
    def options(self) -> Namespace:
        """The options of the verb."""
        options = self.config[self.verb]
        assert isinstance(options, Namespace)
        return options

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.options.run_dir)

    def before_instantiate_classes(self) -> None:
        """Lock the run directory, and set the options that depend on it or on the hardware."""
        config = self.options
        for key, later in self.replaced.items():
            config[key] = -1 if key.startswith("trainer.max_") else None
            log.info("%s, which is given last, replaces %s.", later, key)
        self.stale: list[Path] = []  # what an earlier run left and this one replaces
        if self.verb == "fit":
            is_first = is_first_process()
            if is_first:
                self.until_end.enter_context(locked(self.run_dir))
            self.status = RunStatus(self.run_dir, is_first)
            observe_children(self.status.exit_code_after_death, self.until_end)
            check_numbers(config)
            check_weights(config.trainer.precision)
        self._choose_start(config)
        config.weights_only = True  # no checkpoint may run code
        if self.verb in ("validate", "test"):
            config.verbose = False  # our own lines show the results
        config.trainer.precision = choose_precision(
            config.trainer.precision, config.trainer.accelerator, config.trainer.strategy
        )
        config.trainer.default_root_dir = str(self.run_dir)
        if config.trainer.accelerator == "auto":  # MPS only when asked for: it is untested
            config.trainer.accelerator = "gpu" if torch.cuda.is_available() else "cpu"
        if "TORCHELASTIC_RUN_ID" in os.environ and config.trainer.devices == "auto":
            join_launcher(config.trainer)
        check_machines(config.trainer)

    def _choose_start(self, config: Namespace) -> None:
        """Check the checkpoint to go on from, if any, and note what the run replaces."""
        if config.get("ckpt_path") == "auto":
            newest = newest_checkpoint(self.run_dir)
            config.ckpt_path = str(newest) if newest else None
            log.info("%s", f"Resuming from {newest}" if newest else "No checkpoint: starting anew.")
            if newest is None and self.verb == "fit" and is_first_process():
                self.stale = stale_files(self.run_dir, ("metrics.jsonl",))
        elif config.get("ckpt_path"):
            verify(Path(config.ckpt_path))
        elif self.verb == "fit" and is_first_process():
            self.stale = stale_run(self.run_dir, config.overwrite)

    def before_verb(self) -> None:
        """Handle signals from here on: data is prepared before any callback is called."""
        if self.verb == "fit":
            self.stopping.install()

    @contextmanager
    def _recording_end(self) -> Iterator[None]:
        """At the end restore signals, release the lock, and write how a `fit` ended."""
        with restored_signals(), ExitStack() as self.until_end:
            try:
                yield
            except BaseException as error:
                if self.status is None:
                    raise
                user_error = as_user_error(error, self.run_dir, getattr(self, "datamodule", None))
                if not isinstance(user_error, RunExistsError):  # what is there stays as it is
                    self.status.end(user_error)
                if user_error is error:
                    raise
                raise user_error from error

    def instantiate_classes(self) -> None:
        """Build the stage; MiniGPT's own errors pass, though jsonargparse wraps them."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            for inner in chain(error):
                if isinstance(inner, MiniGPTError):
                    raise inner from error
                if isinstance(inner, ImportError):
                    raise ConfigError(
                        f"A class that the config names cannot be used: {inner}. Install the "
                        "package, or leave the class out."
                    ) from error
            raise

    def after_instantiate_classes(self) -> None:
        """Refuse data of another stage; let validate, test and predict use the run's model."""
        self.model.check_data(self.datamodule)
        if self.verb == "fit" or self.options.get("ckpt_path"):
            return
        if not (self.run_dir / "hf").is_dir():
            raise ModelError(
                f"There is no trained model in {self.run_dir}. Train it with: minigpt fit "
                "--config CONFIG, or name another run with --run_dir."
            )
        self.model.use_run(self.run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run directory's loggers and callbacks."""
        config = self.config_init[self.verb]
        config.trainer.callbacks = [*(config.trainer.callbacks or []), *self._callbacks(config)]
        config.trainer.logger = self._loggers(config.trainer.logger)
        if config.validate.every == "epoch":
            config.trainer.check_val_every_n_epoch = 1
        if config.trainer.strategy == "fsdp":
            config.trainer.strategy = sharding(config.trainer.precision)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, ImportError, MisconfigurationException) as error:
            raise misconfigured(error) from error
        check_strategy(trainer.strategy)
        if not isinstance(trainer.strategy, FSDP2):
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        FitLoop.install(trainer)
        trainer._checkpoint_connector = RestoringConnector(trainer, restoring)
        self._count_micro_batches(trainer)
        return trainer

    def _callbacks(self, config: Namespace) -> list[Callback]:
        """Return the verb's callbacks, in the order in which Lightning calls them."""
        checkpoints = Checkpoints(self.run_dir, config.checkpoint) if self.verb == "fit" else None
        hyperparameters = self._hyperparameters()
        recorder = RunRecorder(self.run_dir, self.throughput, hyperparameters, checkpoints)
        callbacks: list[Callback] = [SameCheckpoint(config.ckpt_path), self.throughput, recorder]
        callbacks.append(SampleText())
        if checkpoints is not None:
            assert self.status is not None
            self.stopping = Stopping(checkpoints, self.status)
            stage_options = self.options.model.as_dict()["init_args"]
            resume = ExactResume(config.allow_changes, stage_options, config.ckpt_path)
            fast = fast_precision(config.trainer.accelerator, config.trainer.accelerator == "cpu")
            plan = RunPlan(checkpoints, fast)
            callbacks.insert(0, RemoveStaleRun(self.stale))
            callbacks += [self.status, resume, self.stopping, plan, checkpoints]
        if self.verb == "predict":
            target = config.predictions or self.run_dir / "predictions.jsonl"
            prompts = self.options.data.init_args.get("predict")
            check_distinct("--predictions", target, [prompts] if prompts else [])
            callbacks.append(PredictionWriter(Path(target)))
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(StepProgress(self.throughput))
        return callbacks

    def _count_micro_batches(self, trainer: Trainer) -> None:
        """Turn tokens of a step, and steps between validations, into micro-batches."""
        assert isinstance(self.datamodule, JSONLDataModule)
        if self.datamodule.tokens_per_step is not None:
            processes = trainer.num_devices * trainer.num_nodes
            trainer.accumulate_grad_batches = self.datamodule.accumulation(processes)
        steps = self.options.validate.every
        if isinstance(steps, int):
            trainer.val_check_interval = steps * trainer.accumulate_grad_batches

    def _loggers(self, configured: Logger | Iterable[Logger] | bool | None) -> list[Logger]:
        """Return the run directory's loggers and those of the config; none but for `fit`."""
        if configured is False or self.verb != "fit":
            return []
        ours: list[Logger] = [RunTensorBoard(self.run_dir), JSONLLogger(self.run_dir)]
        if configured is None or configured is True:
            return ours
        return [*ours, *(configured if isinstance(configured, Iterable) else [configured])]

    def _hyperparameters(self) -> dict[str, Hyperparameter]:
        """Return the options of model and data by names such as model/optimizer/lr."""
        flat: dict[str, object] = {}
        for section, options in (("model", self.options.model), ("data", self.options.data)):
            for name, value in options.as_dict().get("init_args", {}).items():
                items = value.items() if isinstance(value, dict) else [("", value)]
                flat |= {f"{section}/{name}/{key}".rstrip("/"): item for key, item in items}
        return {k: v if isinstance(v, int | float | str) else str(v) for k, v in flat.items()}


def run(args: list[str]) -> MiniGPTCLI:
    """Run one verb, such as ``run(["fit", "--config", "configs/sft.yaml"])``."""
    quiet()
    check_configs(args)
    try:
        return MiniGPTCLI(with_file_names(args))
    except OptionError as error:
        raise explained(error, args) from error
    except MisconfigurationException as error:  # of Lightning, while a verb runs
        raise misconfigured(error) from error
