"""The options of preference losses: which belong to which, and what they do."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.model.losses import PreferenceLoss, ReferenceFreeLoss, dpo, simpo
from minigpt.stages.dpo import DPOModule
from minigpt.stages.preference_loss import GAMMA, REFERENCE_FREE, SMOOTHED, PreferenceOptions

LOSSES = get_args(PreferenceLoss)
POLICY, LENGTHS = torch.tensor([-7.0, -12.0]), torch.tensor([4, 8])
NAN, INFINITE = float("nan"), float("inf")


def options(loss: Any, beta: float = 0.1, **more: Any) -> PreferenceOptions:
    smoothing = {"label_smoothing": 0.001} if loss == "exo" else {}
    return PreferenceOptions(loss, beta, **(smoothing | more))


def test_there_are_fourteen() -> None:
    assert len(LOSSES) == 14
    assert get_args(ReferenceFreeLoss) == REFERENCE_FREE


@pytest.mark.parametrize("loss", LOSSES)
def test_options_that_do_nothing_are_refused(loss: str) -> None:
    if loss not in SMOOTHED:
        with pytest.raises(ConfigError, match=f"label_smoothing .* or exo .*with loss: {loss}"):
            options(loss, label_smoothing=0.1)
    if loss != "simpo":
        for gamma in (0.0, 1.0):
            with pytest.raises(ConfigError, match=f"gamma belongs to loss: simpo .*: {loss}"):
                options(loss, gamma=gamma)
    if loss in REFERENCE_FREE:
        with pytest.raises(ConfigError, match=f"{loss} has no reference: leave out"):
            DPOModule(init_from="start", loss=loss, reference="precomputed")


@pytest.mark.parametrize(
    ("loss", "changes", "words"),
    [
        ("simpo", {"gamma": -0.1}, "a number from 0 up; got -0.1"),
        ("simpo", {"gamma": NAN}, "got nan"),
        ("simpo", {"gamma": INFINITE}, "got inf"),
        ("sigmoid", {"sft_weight": -1.0}, "sft_weight is a number from 0 up, but is -1.0"),
        ("sigmoid", {"beta": 0.0}, "beta must be a number above 0, but is 0.0"),
        ("sigmoid", {"beta": INFINITE}, "beta must be a number above 0, but is inf"),
        ("cpo", {"sft_weight": NAN}, "but is nan"),
        ("cpo", {"sft_weight": INFINITE}, "but is inf"),
        ("exo", {"label_smoothing": 0.0}, "exo needs a model.label_smoothing above 0"),
        ("exo", {"label_smoothing": 0.5}, "lies in 0..0.5; got 0.5"),
    ],
)
def test_options_out_of_range_are_refused(loss: str, changes: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options(loss, **changes)


def test_orpo_and_cpo_are_defined_with_the_sft_term() -> None:
    weights = {loss: options(loss).weight_of_sft for loss in LOSSES}
    assert {loss for loss, weight in weights.items() if weight} == {"orpo", "cpo"}
    assert set(weights.values()) == {0.0, 1.0}
    assert options("cpo", sft_weight=0.0).sft_term(POLICY, LENGTHS) is None
    assert options("nca", sft_weight=0.3).weight_of_sft == 0.3
    term = options("nca", sft_weight=0.3).sft_term(POLICY, LENGTHS)
    assert term is not None
    assert term.item() == 7 / 4


@pytest.mark.parametrize("loss", LOSSES)
def test_each_name_has_a_loss_of_its_own(loss: str) -> None:
    reference = None if loss in REFERENCE_FREE else torch.tensor([-10.0, -11.0])
    values = {
        name: options(name).pairs(POLICY, torch.tensor([-10.0, -11.0]), LENGTHS).losses.item()
        for name in LOSSES
        if name not in ("cdpo", "robust") or name == loss  # which are sigmoid without smoothing
    }
    ours = options(loss).pairs(POLICY, reference, LENGTHS).losses.item()
    assert ours == values.pop(loss)
    assert math.isfinite(ours)
    if loss not in ("cdpo", "robust"):
        assert ours not in values.values()


def test_gamma_and_label_smoothing_reach_their_losses() -> None:
    reference = torch.tensor([-10.0, -11.0])
    for configured, gamma in ((None, GAMMA), (0.0, 0.0), (1.5, 1.5)):
        losses = options("simpo", gamma=configured).pairs(POLICY, None, LENGTHS).losses
        assert losses.equal(simpo(POLICY, LENGTHS, 0.1, gamma).losses)
    for loss in SMOOTHED:
        losses = options(loss, label_smoothing=0.2).pairs(POLICY, reference, LENGTHS).losses
        assert losses.equal(dpo(POLICY, reference, LENGTHS, 0.1, loss, 0.2).losses)
