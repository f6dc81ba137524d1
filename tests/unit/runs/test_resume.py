"""Options that a checkpoint is compared by."""

from __future__ import annotations

import pytest

from minigpt.errors import ConfigError
from minigpt.runs.resume import ExactResume


def test_an_option_that_is_newer_than_the_checkpoint_may_be_left_out() -> None:
    compared = ExactResume(False, {}, None)
    compared._compare({"beta": "0.1"}, {"beta": "0.1", "gamma": "None"})
    assert compared.changed == []
    with pytest.raises(ConfigError, match=r"belongs to: gamma was None, is 1\.0\. Put it back"):
        compared._compare({"beta": "0.1"}, {"beta": "0.1", "gamma": "1.0"})
