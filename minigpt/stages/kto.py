"""KTO: learn from single completions, each desirable or not, against a frozen reference."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from minigpt.data.batch import PackedBatch
from minigpt.data.formats import BatchKind
from minigpt.data.unpaired import KTODataModule, UnpairedBatch, Window
from minigpt.errors import ConfigError
from minigpt.model.losses import kto
from minigpt.stages.base import LossSums
from minigpt.stages.reference import ReferenceModule
from minigpt.stages.step import Sums


class KTOModule(ReferenceModule):
    """Make desirable completions likelier and others less likely, relative to the reference.

    What a completion is compared with is a baseline: how much likelier than the reference the
    model has made completions of other prompts, on average over the whole optimizer step.

    Args:
        beta: how fast a completion saturates on its side of the baseline.
        desirable_weight: of the losses of desirable completions.
        undesirable_weight: of the others. Where kinds are not balanced, weights are to be chosen so
            that weight times rows of the desirable is 1 to 1.33 times that of the others.
        kwargs: see `BaseModule`.
    """

    learns_from: ClassVar[tuple[BatchKind, ...]] = ("unpaired",)

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < beta < float("inf"):
            raise ConfigError(f"model.beta must be a number above 0, but is {beta}.")
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"model.{name} must be a number from 0 up, but is {weight}.")
        if not any(weights.values()):
            raise ConfigError(
                "model.desirable_weight and model.undesirable_weight are 0: nothing is learnt."
            )
        self.beta = beta
        self.weights = (desirable_weight, undesirable_weight)

    @property
    def data(self) -> KTODataModule:
        """The DataModule in use."""
        data = super().data
        assert isinstance(data, KTODataModule)
        return data

    def compute_loss(self, batch: PackedBatch) -> LossSums:
        """Return the summed loss of all completions, and the sums behind its metrics."""
        assert isinstance(batch, UnpairedBatch)
        assert batch.window is not None
        baseline = self.baseline(batch.window)
        learns = not batch.is_filler
        ratios = self.model(batch, per_answer=True) - self.reference_logprobs(batch)
        desirable = batch.desirable
        losses = kto(ratios, desirable, baseline, self.beta, *self.weights)
        rewards = self.beta * ratios.detach()
        metrics: dict[str, Tensor | float] = {
            "rewards/desirable": rewards[desirable].sum(),
            "rewards/undesirable": rewards[~desirable].sum(),
            "desirable": desirable.sum(),
            "kl": baseline * len(ratios),
        }
        return LossSums(losses.sum() * float(learns), len(ratios) * learns, metrics)

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Return the means: of the rewards over their own kind, which may be missing in a step."""
        values = super().metrics(totals)
        counts = {"desirable": totals["desirable"]}
        counts["undesirable"] = totals["count"] - totals["desirable"]
        for kind, count in counts.items():
            del values[f"rewards/{kind}"]
            if count:
                values[f"rewards/{kind}"] = totals[f"rewards/{kind}"] / count
        if all(counts.values()):
            margin = values["rewards/desirable"] - values["rewards/undesirable"]
            values["rewards/margin"] = margin
        return values

    def baseline(self, window: Window) -> Tensor:
        """Return the KL baseline of a window, computed at the first of its micro-batches."""
        if window.baseline is None:
            window.baseline = self._mean_ratio(window).clamp(min=0)
            window.mismatched = ()
        return window.baseline

    @torch.no_grad()
    def _mean_ratio(self, window: Window) -> Tensor:
        """Return the mean of log π - log π_ref over the mismatched completions of all processes."""
        sums = Sums()
        training = self.model.training
        self.model.eval()
        for batch in window.mismatched:
            batch = batch.to(self.device)
            ratios = self.model(batch, per_answer=True) - self.reference_logprobs(batch)
            learns = not batch.is_filler
            values = {"ratios": ratios.sum() * float(learns), "count": float(len(ratios) * learns)}
            sums.add(values, self.device)
        self.model.train(training)
        totals = sums.all_reduced()
        return (totals["ratios"] / totals["count"].clamp(min=1)).float()
