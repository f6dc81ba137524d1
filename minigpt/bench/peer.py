"""TRL on the same work, where it is installed: `python -m minigpt.bench.peer JOB RESULT`.

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

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from minigpt.bench.baseline import IGNORED, LEAST, Job, samples
from minigpt.data.store import TokenStore
from minigpt.machine import peak_memory


class Clock(TrainerCallback):
    """Stops the time and counts useful tokens, from the end of the first step on."""

    def __init__(self, job: Job) -> None:
        self.job, self.tokens, self.steps, self.seconds, self.started = job, 0, 0, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note a step; stop when the time is over."""
        if state.global_step == 1:
            self.started, self.tokens = time.perf_counter(), 0
            return
        self.steps, self.seconds = state.global_step - 1, time.perf_counter() - self.started
        enough = self.seconds >= self.job.seconds and self.steps >= LEAST
        control.should_training_stop = enough or self.steps >= self.job.steps


def useful(batch: dict[str, Any]) -> int:
    """Return a batch's own tokens; the prompt of a pair counts once."""
    if (mask := batch.get("attention_mask")) is None:
        return int(batch["input_ids"].numel())
    prompts = mask - batch["completion_mask"] if "completion_mask" in batch else mask[:0]
    return int(mask.sum() - prompts.sum() // 2)


def rows(job: Job, store: TokenStore) -> Dataset:
    """Return the store's samples as the trainers take them."""
    made = []
    for first, *second in samples(store, range(len(store))):
        if not second:
            made.append({"input_ids": first[0], "labels": first[1]})
            continue
        prompt = first[1].count(IGNORED)
        chosen, rejected = first[0][prompt:], second[0][0][prompt:]
        answers = {"chosen_ids": chosen, "rejected_ids": rejected}
        made.append({"prompt_ids": first[0][:prompt], **answers})
    return Dataset.from_list(made)


def train(job: Job) -> dict[str, float]:
    """Train until the steps or the seconds are over; return what it took."""
    clock = Clock(job)
    kind, options = (DPOTrainer, DPOConfig) if job.stage == "dpo" else (SFTTrainer, SFTConfig)

    class Counted(kind):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Dataset, *given: Any) -> Dataset:
            return dataset if job.stage == "dpo" else super()._prepare_dataset(dataset, *given)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **more: Any) -> Any:
            clock.tokens += useful(inputs)
            return super().compute_loss(model, inputs, *given, **more)

    packed = {"packing": True, "packing_strategy": "wrapped"} if job.stage == "pretrain" else {}
    adapter = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as place:
        trainer = Counted(
            model=job.model,
            args=options(
                output_dir=place,
                per_device_train_batch_size=job.batch_size,
                max_length=job.max_length,
                learning_rate=job.lr,
                max_steps=job.steps + 1,
                bf16=job.precision.startswith("bf16"),
                fp16=job.precision.startswith("16"),
                use_cpu=job.device == "cpu",
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=job.seed,
                model_init_kwargs={"dtype": "float32"},
                **packed,
            ),
            train_dataset=rows(job, TokenStore(Path(job.stores[0]), Path())),
            peft_config=adapter if job.stage == "lora" else None,
            callbacks=[clock],
        )
        trainer.train()
    return {"tokens": clock.tokens, "seconds": clock.seconds, "steps": clock.steps, **peak_memory()}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    done = train(Job(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(done))
