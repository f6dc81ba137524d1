"""TRL's GRPOTrainer on the same prompts, where it is installed: `grpo_trl.py WORK RESULT`.

As it comes, with the same samples in a step and one update for each rollout. Activations are
stored, as in our arm, which is faster and takes more memory than its default.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from datasets import Dataset
from grpo import LEARNING_RATE, Workload, read_work, step_figures
from grpo_reward import even_tokens
from peer import Clock, common_options
from trl import GRPOConfig, GRPOTrainer

from minigpt.data import tokenizer as tokenizers
from minigpt.machine import peak_memory


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """Notes how long each rollout takes, and how long its answers are."""

    rollouts: list[tuple[float, float]]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started = time.perf_counter()
        outputs = super()._generate_and_score_completions(inputs)
        length = float(outputs["completion_mask"].sum(1).float().mean())
        self.rollouts.append((time.perf_counter() - started, length))
        return outputs


def train(work: Workload) -> dict[str, Any]:
    """Train until the steps or the seconds are over; return the figures."""
    clock = Clock(work)
    trainer = TimedTrainer(
        model=work.start,
        reward_funcs=even_tokens,
        processing_class=tokenizers.load(work.start),
        args=GRPOConfig(
            output_dir=str(Path(work.directory) / "trl"),
            per_device_train_batch_size=work.prompts * work.generations,
            num_generations=work.generations,
            max_completion_length=work.completion,
            beta=0.0,
            learning_rate=LEARNING_RATE,
            **common_options(work),
        ),
        train_dataset=Dataset.from_list(prompts_of(work)),
        callbacks=[clock],
    )
    trainer.rollouts = []
    trainer.train()
    seconds, lengths = zip(*trainer.rollouts[1:], strict=True)
    figures = step_figures(work, clock.steps, clock.seconds, mean(seconds), mean(lengths))
    return figures | peak_memory()


def prompts_of(work: Workload) -> list[dict[str, Any]]:
    """Return the rows as TRL takes them."""
    rows = map(json.loads, Path(work.rows).read_text().splitlines())
    return [{"prompt": row["messages"]} for row in rows]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    result = train(read_work(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result))
