"""Baselines of reward models: they prefer an answer by its length, or by its words, alone.

A reward model that is no better has learnt no more than that.

Shape legend: N tokens of all answers, P pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from minigpt.data.batch import Sample
from minigpt.model.losses import sum_by

PAIRS = 20_000  # that a baseline is fitted to, at most
STEPS, RATE, DECAY = 200, 0.05, 0.01  # of the fit by AdamW
FOLDS = 5

Baseline = Callable[[Iterable[Sample], Sequence[Sample]], list[float]]


def by_length(train: Iterable[Sample], held_out: Sequence[Sample]) -> list[float]:
    """Prefer the longer answer, or the shorter one if that is right more often in training.

    Args:
        train: preferences, the chosen answer before the rejected one.
        held_out: preferences to judge, in the same form.

    Returns:
        For each held-out pair 1 if that is right, 0 if it is wrong, 0.5 for equal lengths.
    """
    longer = _right(_lengths(list(islice(train, PAIRS))))
    sign = 1 if np.mean(longer) >= 0.5 else -1
    return _right(sign * _lengths(held_out))


def by_words(train: Iterable[Sample], held_out: Sequence[Sample]) -> list[float]:
    """Prefer the answer whose tokens have the higher sum of weights, wherever they stand.

    The weights are those of a logistic regression on the training pairs. Arguments and result as
    for `by_length`.
    """
    fitted = list(islice(train, PAIRS))
    rows = 1 + max(int(sample.ids.max()) for sample in (*fitted, *held_out))
    # A validation calls this, too: without gradients, and under autocast.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        weights = torch.zeros(rows, dtype=torch.float32, requires_grad=True)
        optimizer = torch.optim.AdamW([weights], lr=RATE, weight_decay=DECAY)
        tokens = _tokens(fitted)
        for _ in range(STEPS):
            optimizer.zero_grad()
            softplus(-_differences(weights, *tokens)).mean().backward()
            optimizer.step()
        return _right(_differences(weights.detach(), *_tokens(held_out)).numpy())


def cross_validated(baseline: Baseline, pairs: Sequence[Sample]) -> list[float]:
    """Judge each pair by a baseline that is fitted to the other folds; results as `by_length`."""
    right = np.zeros(len(pairs))
    for fold in range(FOLDS):
        train = [pair for number, pair in enumerate(pairs) if number % FOLDS != fold]
        if train and len(pairs) > fold:
            right[fold::FOLDS] = baseline(train, pairs[fold::FOLDS])
    return [float(value) for value in right]


def _right(differences: np.ndarray) -> list[float]:
    """Return 1 for what is above 0, 0 for what is below, and 0.5 for what is 0."""
    return [float(value) for value in (1 + np.sign(differences)) / 2]


def _lengths(pairs: Sequence[Sample]) -> np.ndarray:
    """Return by how many tokens each pair's first answer is longer, [P]."""
    return np.array([pair.answers[0] - pair.answers[1] for pair in pairs])


def _tokens(pairs: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens of all answers [N], their pairs [N] and signs [N], 1 for the first."""
    ids = np.concatenate([pair.ids[pair.prompt :] for pair in pairs]).astype(np.int64)
    sizes = np.array([pair.answers for pair in pairs])  # [P, 2]
    number = np.repeat(np.arange(len(pairs)), sizes.sum(1))
    sign = np.repeat(np.tile([1.0, -1.0], len(pairs)), sizes.ravel())
    return torch.from_numpy(ids), torch.from_numpy(number), torch.from_numpy(sign).float()


def _differences(weights: Tensor, ids: Tensor, number: Tensor, sign: Tensor) -> Tensor:
    """Return by how much each pair's first answer has the higher sum of weights, [P]."""
    return sum_by(sign * weights[ids], number, int(number[-1]) + 1)
