"""The update of a group of answers, as GRPO makes it: `grpo_update.py WORK RESULT WHAT`.

WHAT is `shared`, where the prompt is in the batch once, `repeated`, where it is there for each
answer, or `difference`, which compares the gradients of both.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import torch
from grpo import MIN_STEPS, Workload, read_work
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from minigpt.cli.options import quiet
from minigpt.data.formats import Prompt
from minigpt.data.rollouts import (
    EncodedPrompt,
    GRPODataModule,
    RolloutBatch,
    collate_rollouts,
    group_sample,
)
from minigpt.machine import peak_memory
from minigpt.stages import GRPOModule
from minigpt.stages.rewards import Reward


def batch_of(work: Workload, vocabulary: int, repeated: bool) -> RolloutBatch:
    """Return a group of answers of random tokens, as a packed batch."""
    random = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=random).tolist()

    prompt = EncodedPrompt(Prompt("", {}, 0, ("random", 1)), {}, tokens(work.prompt_length), 0)
    answers = [tokens(work.completion) for _ in range(work.generations)]
    advantages = torch.randn(work.generations, generator=random).tolist()
    groups = [[answer] for answer in answers] if repeated else [answers]
    return collate_rollouts(
        [group_sample(prompt, group) for group in groups],
        [0.0] * (work.generations * work.completion),
        advantages,
        [True] * work.generations,
    )


class Update(Callback):
    """Computes the update in place of training, with all that training has set up.

    Attributes:
        figures: what was measured.
    """

    def __init__(self, work: Workload, what: str) -> None:
        self.work = work
        self.what = what
        self.figures: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, module: GRPOModule) -> None:  # type: ignore[override]
        """Measure, and let training end before its first step."""
        if self.what == "difference":
            self.figures = {"gradient_difference": self.difference(trainer, module)}
        else:
            self.figures = self.speed(trainer, module) | peak_memory()
        trainer.should_stop = True

    def gradients(self, trainer: Trainer, module: GRPOModule, batch: RolloutBatch) -> list[Tensor]:
        """Return the gradients of the batch's loss, once they are computed."""
        module.zero_grad()
        with trainer.precision_plugin.train_step_context():
            loss = module.compute_loss(batch).loss
        loss.backward()
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return [p.grad for p in module.parameters() if p.grad is not None]

    def speed(self, trainer: Trainer, module: GRPOModule) -> dict[str, float]:
        """Return seconds of an update, and target tokens per second; the first one warms up."""
        batch = self.batch(module, self.what == "repeated")
        self.gradients(trainer, module, batch)
        updates, seconds, started = 0, 0.0, time.perf_counter()
        while updates < self.work.steps and not (
            seconds >= self.work.seconds and updates >= MIN_STEPS
        ):
            self.gradients(trainer, module, batch)
            updates += 1
            seconds = time.perf_counter() - started
        targets = len(batch.labels)
        return {"seconds": seconds / updates, "targets_per_s": targets * updates / seconds}

    def difference(self, trainer: Trainer, module: GRPOModule) -> float:
        """Return the largest norm of a difference of gradients over the gradient's norm."""
        shared, repeated = (
            [g.clone() for g in self.gradients(trainer, module, self.batch(module, repeated))]
            for repeated in (False, True)
        )
        pairs = zip(shared, repeated, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    def batch(self, module: GRPOModule, repeated: bool) -> RolloutBatch:
        """Return the batch, on the module's device."""
        return batch_of(self.work, len(module.tokenizer), repeated).to(module.device)


def measure(work: Workload, what: str) -> dict[str, float]:
    """Set up training as for this batch, and measure its update."""
    update = Update(work, what)
    data = GRPODataModule(
        train=work.rows,
        val_share=0.0,
        prompts_per_batch=work.generations if what == "repeated" else 1,
        num_generations=work.generations,
        max_completion_length=work.completion,
        max_length=max(work.prompt_length, work.longest_prompt) + work.completion,
        cache_dir=str(Path(work.directory) / "cache"),
    )
    if what == "repeated":  # no two of its answers share a prompt
        data.tokens_per_batch = work.generations * (work.prompt_length + work.completion)
    trainer = Trainer(
        max_steps=work.steps,  # by which it is decided whether compiling pays
        min_epochs=0,
        accelerator="gpu" if work.device == "cuda" else "cpu",
        devices=1,
        precision="32-true" if what == "difference" else work.precision,  # type: ignore[arg-type]
        callbacks=[update],
        use_distributed_sampler=False,
        default_root_dir=work.directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(GRPOModule([Reward("length")], init_from=work.start), datamodule=data)
    return update.figures


if __name__ == "__main__":
    quiet()
    logging.disable(logging.WARNING)
    result = measure(read_work(sys.argv[1]), sys.argv[3])
    Path(sys.argv[2]).write_text(json.dumps(result))
