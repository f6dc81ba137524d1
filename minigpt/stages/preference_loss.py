"""Which preference loss a run trains, and its options."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.losses import PreferenceLoss, Preferences, chosen_nll, cpo, dpo, orpo, simpo

SMOOTHED = ("cdpo", "robust", "exo")  # the losses that assume a share of wrong labels
REFERENCE_FREE = ("simpo", "orpo", "cpo")
WITH_SFT_TERM = ("orpo", "cpo")  # defined as a sum with it
GAMMA = 0.5


@dataclass(frozen=True)
class PreferenceOptions:
    """A preference loss and its options. See `DPOModule`.

    Raises:
        ConfigError: when an option is out of range, or is not one of this loss.
    """

    loss: PreferenceLoss
    beta: float
    label_smoothing: float = 0.0
    gamma: float | None = None
    sft_weight: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        smoothing, gamma, weight = self.label_smoothing, self.gamma, self.sft_weight
        if not 0 <= smoothing < 0.5 or (smoothing and self.loss not in SMOOTHED):
            raise ConfigError(
                f"model.label_smoothing belongs to loss: {', '.join(SMOOTHED[:-1])} or "
                f"{SMOOTHED[-1]} and lies in 0..0.5; got {smoothing} with loss: {self.loss}."
            )
        if self.loss == "exo" and not smoothing:
            raise ConfigError(
                "loss: exo needs a model.label_smoothing above 0, such as 0.001: it compares with "
                "a rejected answer of that probability."
            )
        if gamma is not None and (self.loss != "simpo" or not 0 <= gamma < float("inf")):
            raise ConfigError(
                f"model.gamma belongs to loss: simpo and is a number from 0 up; got {gamma} with "
                f"loss: {self.loss}."
            )
        if weight is not None and not 0 <= weight < float("inf"):
            raise ConfigError(f"model.sft_weight is a number from 0 up, but is {weight}.")
        if not 0 < self.beta < float("inf"):
            raise ConfigError(f"model.beta must be a number above 0, but is {self.beta}.")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a frozen model."""
        return self.loss not in REFERENCE_FREE

    @property
    def weight_of_sft(self) -> float:
        """The weight of the SFT term."""
        if self.sft_weight is None:
            return float(self.loss in WITH_SFT_TERM)
        return self.sft_weight

    def pairs(self, policy: Tensor, reference: Tensor | None, lengths: Tensor) -> Preferences:
        """Return the losses, without the SFT term, and the rewards of pairs.

        Args:
            policy: [2P] summed log-probs of answers, chosen and rejected alternating.
            reference: [2P] the same under the reference; none where the loss needs none.
            lengths: [2P] target tokens of each answer.
        """
        if self.loss == "simpo":
            gamma = GAMMA if self.gamma is None else self.gamma
            return simpo(policy, lengths, self.beta, gamma)
        if self.loss == "orpo":
            return orpo(policy, lengths, self.beta)
        if self.loss == "cpo":
            return cpo(policy, self.beta)
        assert reference is not None
        return dpo(policy, reference, lengths, self.beta, self.loss, self.label_smoothing)

    def sft_term(self, policy: Tensor, lengths: Tensor) -> Tensor | None:
        """Return the SFT term of pairs before it is weighted, [P]; none where it weighs 0."""
        return chosen_nll(policy, lengths) if self.weight_of_sft else None
