"""Direct preference optimisation and its kin, most against a frozen reference (reference.py)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from minigpt.data.batch import PackedBatch
from minigpt.data.formats import BatchKind
from minigpt.errors import ConfigError
from minigpt.model.losses import PreferenceLoss, sum_by
from minigpt.model.packed_lm import PackedLM
from minigpt.stages.base import LossSums
from minigpt.stages.preference_loss import PreferenceOptions
from minigpt.stages.reference import ReferenceModule, digest_of, pair_logprobs


class DPOModule(ReferenceModule):
    """Make chosen answers likelier than rejected ones, for most losses relative to the reference.

    Args:
        beta: strength of the pull towards the reference; a scale where there is none.
        loss: against the reference: sigmoid (DPO), cdpo, robust, hinge, ipo, sigmoid_norm, exo,
            nca, apo_zero, apo_down, sppo_hard; without: simpo, orpo, cpo. See docs/preferences.md.
        label_smoothing: the share of wrong labels, for cdpo, robust and exo.
        gamma: how far ahead simpo wants chosen answers; by default 0.5.
        sft_weight: of an SFT term, the chosen answer's negative log-prob per token (RPO); by
            default 1 for orpo and cpo, which are defined with it, and 0 for the others.
        reference: `model` keeps the frozen model; `precomputed` computes its log-probs of
            all pairs once, keeps them with the token stores, and lets it go.
        kwargs: see `BaseModule`.
    """

    learns_from: ClassVar[tuple[BatchKind, ...]] = ("preference",)

    def __init__(
        self,
        beta: float = 0.1,
        loss: PreferenceLoss = "sigmoid",
        label_smoothing: float = 0.0,
        gamma: float | None = None,
        sft_weight: float | None = None,
        reference: Literal["model", "precomputed"] = "model",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.preference = PreferenceOptions(loss, beta, label_smoothing, gamma, sft_weight)
        if reference == "precomputed" and not self.preference.needs_reference:
            raise ConfigError(f"loss: {loss} has no reference: leave out model.reference.")
        self.reference = reference
        self._precomputed: dict[tuple[str, int], Tensor] = {}  # [2] log-probs by file and line

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the reference."""
        return self.preference.needs_reference

    def build_model(self) -> PackedLM:
        """Note the digest under which precomputed log-probs are saved: that of the weights."""
        lm = super().build_model()
        if self.source is self.start and self.reference == "precomputed":
            self._digest = digest_of(lm, str(self.trainer.precision))
        return lm

    def on_fit_start(self) -> None:
        """Compute the log-probs of a precomputed reference before training."""
        super().on_fit_start()
        if self.reference == "precomputed":
            self.precompute()

    def precompute(self) -> None:
        """Compute the reference's log-probs of all pairs, then drop the frozen copy."""
        precomputed: dict[tuple[str, int], Tensor] = {}
        for store in self.data.stores():
            broadcast = self.trainer.strategy.broadcast
            logprobs = pair_logprobs(store, self.data, self._digest, self._logprobs_of, broadcast)
            on_device = torch.from_numpy(logprobs).to(self.device)
            sources = ((str(store.source), line) for line in store.lines().tolist())
            precomputed.update(zip(sources, on_device, strict=True))
        self._precomputed = precomputed
        self._frozen.clear()

    def _logprobs_of(self, batch: PackedBatch) -> Tensor:
        with self.trainer.precision_plugin.forward_context():  # as in a step
            return self.reference_logprobs(batch.to(self.device))

    def reference_logprobs(self, batch: PackedBatch) -> Tensor:
        """Return the reference's summed log-prob of each answer, [2P]."""
        if self._precomputed:
            return torch.stack([self._precomputed[source] for source in batch.sources]).flatten()
        return super().reference_logprobs(batch)

    def compute_loss(self, batch: PackedBatch) -> LossSums:
        """Return the summed loss of all pairs, and the sums behind its metrics."""
        learns = not batch.is_filler
        policy = self.model(batch, per_answer=True)
        reference = self.reference_logprobs(batch) if self.needs_reference else None
        lengths = sum_by(torch.ones_like(batch.labels), batch.answers, batch.n_answers)
        pairs = self.preference.pairs(policy, reference, lengths)
        margins = pairs.chosen_rewards - pairs.rejected_rewards
        metrics: dict[str, Tensor | float] = {
            "rewards/chosen": pairs.chosen_rewards.sum(),
            "rewards/rejected": pairs.rejected_rewards.sum(),
            "rewards/margin": margins.sum(),
            "rewards/accuracy": (margins > 0).sum(),
            "logps/chosen": policy[0::2].sum(),
            "logps/rejected": policy[1::2].sum(),
        }
        loss = pairs.losses.sum()
        if (sft := self.preference.sft_term(policy, lengths)) is not None:
            metrics["nll/chosen"] = sft.sum()
            loss = loss + self.preference.weight_of_sft * sft.sum()
        return LossSums(loss * float(learns), len(margins) * learns, metrics)
