"""A watch on models that fall into repetition, or no longer end their answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minigpt.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collapse:
    """What to do when a model's sampled answers repeat themselves, or do not end.

    Args:
        action: `off` does nothing, `warn` logs it, `stop` ends the run.
        repeated: share of repeated 4-grams (see `repeated_ngrams`) above which a step counts.
        unfinished: share of answers cut off at the longest length above which a step counts.
        steps: in a row that must be above one of these bounds.

    Raises:
        ConfigError: when a bound or the steps are out of range.
    """

    action: Literal["off", "warn", "stop"] = "warn"
    repeated: float = 0.2
    unfinished: float = 0.3
    steps: int = 5

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name in ("repeated", "unfinished"):
            if not 0 <= (bound := getattr(self, name)) <= 1:
                raise ConfigError(f"collapse.{name} is a share from 0 to 1, but is {bound}.")
        if self.steps < 1:
            raise ConfigError(f"collapse.steps must be at least 1, but is {self.steps}.")


class CollapseWatch:
    """Counts the steps in a row whose answers repeat themselves, or do not end.

    Args:
        options: the bounds, and what to do.
    """

    def __init__(self, options: Collapse) -> None:
        self.options = options
        self.repeated_steps = 0
        self.unfinished_steps = 0

    def observe(self, repeated: float, unfinished: float) -> None:
        """Add a step; warn or stop when the last `steps` were all above the same bound.

        A warning comes once until a step is below that bound again.

        Args:
            repeated: mean share of repeated 4-grams of the step's answers, over all processes.
            unfinished: share of them that were cut off.

        Raises:
            TrainingError: then, if the action is stop.
        """
        bounds = self.options
        self.repeated_steps = self.repeated_steps + 1 if repeated > bounds.repeated else 0
        self.unfinished_steps = self.unfinished_steps + 1 if unfinished > bounds.unfinished else 0
        repeats = "4-grams in answers that occurred there before"
        self._judge(self.repeated_steps, repeats, repeated, bounds.repeated)
        cut_off = "answers cut off at the longest length"
        self._judge(self.unfinished_steps, cut_off, unfinished, bounds.unfinished)

    def _judge(self, steps: int, what: str, share: float, bound: float) -> None:
        if steps < self.options.steps:
            return
        message = (
            f"For {self.options.steps} steps, {what} have been more than {bound:.0%} (now "
            f"{share:.0%}): the model may have collapsed, or found a reward that it should not "
            "have. Look at the samples and at each reward; a lower learning rate, a replay of SFT "
            "rows or a KL (beta) holds it back."
        )
        if self.options.action == "stop":
            raise TrainingError(
                f"{message} collapse.action is stop, so the run has ended; checkpoints from before "
                "are kept."
            )
        if self.options.action == "warn" and steps == self.options.steps:
            log.warning("%s", message)

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"repeated": self.repeated_steps, "unfinished": self.unfinished_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with saved counts."""
        self.repeated_steps, self.unfinished_steps = state["repeated"], state["unfinished"]


def repeated_ngrams(answers: Sequence[Sequence[int]], n: int = 4) -> float:
    """Return the share of an answer's n-grams that occurred in it before, as a mean over answers.

    Args:
        answers: token ids of each. One of fewer than n tokens repeats nothing.
        n: tokens of an n-gram.
    """
    shares = []
    for ids in answers:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / max(1, len(shares))
