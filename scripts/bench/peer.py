"""TRL on the same work, where it is installed: `peer.py CONFIG RESULT`.

Its trainers as they come, on the token ids of our own store: pretraining packs texts into full
blocks (`wrapped`), the others pad to the longest of a batch; activations are kept, as in the
other arms.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from baseline import IGNORED, MIN_STEPS, LoopConfig, samples
from datasets import Dataset
from measure import TimedWork
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from minigpt.data.store import TokenStore
from minigpt.machine import peak_memory


class Clock(TrainerCallback):
    """Stops the time and counts useful tokens, from the end of the first step on."""

    def __init__(self, config: TimedWork) -> None:
        self.config = config
        self.tokens = 0
        self.steps = 0
        self.seconds = 0.0
        self.started = 0.0

    def on_step_end(
        self, args: object, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Note a step; stop when the time is over."""
        if state.global_step == 1:
            self.started = time.perf_counter()
            self.tokens = 0
            return
        self.steps = state.global_step - 1
        self.seconds = time.perf_counter() - self.started
        enough = self.seconds >= self.config.seconds and self.steps >= MIN_STEPS
        control.should_training_stop = enough or self.steps >= self.config.steps


def useful(batch: dict[str, Any]) -> int:
    """Return a batch's own tokens; the prompt of a pair counts once."""
    if (mask := batch.get("attention_mask")) is None:
        return int(batch["input_ids"].numel())
    prompts = mask - batch["completion_mask"] if "completion_mask" in batch else mask[:0]
    return int(mask.sum() - prompts.sum() // 2)


def common_options(work: TimedWork) -> dict[str, Any]:
    """Return the options of TRL's trainers that all stages have: as fast as ours, nothing saved."""
    return {
        "max_steps": work.steps + 1,
        "bf16": work.precision.startswith("bf16"),
        "fp16": work.precision.startswith("16"),
        "use_cpu": work.device == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }


def rows(config: LoopConfig, store: TokenStore) -> Dataset:
    """Return the store's samples as the trainers take them."""
    result = []
    for first, *second in samples(store, range(len(store))):
        if not second:
            result.append({"input_ids": first[0], "labels": first[1]})
            continue
        prompt = first[1].count(IGNORED)
        answers = {"chosen_ids": first[0][prompt:], "rejected_ids": second[0][0][prompt:]}
        result.append({"prompt_ids": first[0][:prompt], **answers})
    return Dataset.from_list(result)


def train(config: LoopConfig) -> dict[str, float]:
    """Train until the steps or the seconds are over; return its figures."""
    clock = Clock(config)
    kind, options = (DPOTrainer, DPOConfig) if config.stage == "dpo" else (SFTTrainer, SFTConfig)

    class Counted(kind):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Dataset, *more: object) -> Dataset:
            return dataset if config.stage == "dpo" else super()._prepare_dataset(dataset, *more)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], *more: object, **options: Any
        ) -> Any:
            clock.tokens += useful(inputs)
            return super().compute_loss(model, inputs, *more, **options)

    packed = {"packing": True, "packing_strategy": "wrapped"} if config.stage == "pretrain" else {}
    adapter = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as directory:
        trainer = Counted(
            model=config.model,
            args=options(
                output_dir=directory,
                per_device_train_batch_size=config.batch_size,
                max_length=config.max_length,
                learning_rate=config.lr,
                seed=config.seed,
                **common_options(config),
                **packed,
            ),
            train_dataset=rows(config, TokenStore(Path(config.stores[0]), Path())),
            peft_config=adapter if config.stage == "lora" else None,
            callbacks=[clock],
        )
        trainer.train()
    return {"tokens": clock.tokens, "seconds": clock.seconds, "steps": clock.steps, **peak_memory()}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    result = train(LoopConfig(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(result))
