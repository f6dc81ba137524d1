"""What lengths and words alone tell of preference pairs."""

from __future__ import annotations

import numpy as np
import torch

from minigpt.data.batch import Sample
from minigpt.evaluate.baselines import by_length, by_words, cross_validated


def pair(chosen: list[int], rejected: list[int]) -> Sample:
    """A preference behind a prompt of one token, which says nothing."""
    return Sample(np.array([7, *chosen, *rejected]), 1, (len(chosen), len(rejected)), None, ("", 0))


SHORT = [pair([1, 2], [3, 4, 5]), pair([4], [1, 1]), pair([2], [4, 4])]


def test_the_length_that_is_right_in_training_decides() -> None:
    held_out = [pair([1], [2, 3]), pair([1, 2], [3]), pair([1], [2])]
    assert by_length(SHORT, held_out) == [1, 0, 0.5]
    longer = [pair([1, 1], [2])]
    assert by_length(longer, held_out) == [0, 1, 0.5]


def test_words_that_tell_answers_apart_are_found() -> None:
    """Token 5 is in better answers, 6 in worse ones, 1 and 2 in both."""
    train = [pair([1, 5, 2], [1, 6, 2]), pair([2, 5], [6, 1]), pair([5], [1, 6, 6])]
    held_out = [pair([5, 9], [6, 9]), pair([6], [5]), pair([1], [1, 9]), pair([9], [9])]
    with torch.inference_mode():  # as in a validation
        assert by_words(train, held_out) == [1, 0, 0.5, 0.5]


def test_each_pair_is_held_out_once() -> None:
    """The rare way that one pair is right is not learnt from itself."""
    pairs = [pair([1], [2, 2])] * 6 + [pair([1, 1, 1], [2])]
    assert cross_validated(by_length, pairs) == [1.0] * 6 + [0.0]
    assert cross_validated(by_words, [pair([1], [2])] * 5) == [1.0] * 5
