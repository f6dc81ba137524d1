"""Each stage refuses the data that it cannot learn from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from minigpt.data.datamodule import (
    DPODataModule,
    JSONLDataModule,
    PretrainDataModule,
    SFTDataModule,
)
from minigpt.data.rollouts import GRPODataModule
from minigpt.data.unpaired import KTODataModule
from minigpt.errors import ConfigError
from minigpt.stages import (
    DPOModule,
    GRPOModule,
    KTOModule,
    LoRAModule,
    PretrainModule,
    RewardModule,
    SFTModule,
)
from minigpt.stages.base import BaseModule
from minigpt.stages.rewards import Reward

DATA: list[type[JSONLDataModule]] = [
    PretrainDataModule,
    SFTDataModule,
    DPODataModule,
    KTODataModule,
    GRPODataModule,
]
TEXTS: list[type[JSONLDataModule]] = [PretrainDataModule, SFTDataModule]


START: dict[str, Any] = {"init_from": "outputs/start"}


@pytest.mark.parametrize(
    ("build", "accepted"),
    [
        (partial(PretrainModule, **START), TEXTS),
        (partial(SFTModule, **START), TEXTS),
        (partial(LoRAModule, **START), TEXTS),
        (partial(DPOModule, **START), [DPODataModule]),
        (partial(RewardModule, **START), [DPODataModule]),
        (partial(KTOModule, **START), [KTODataModule]),
        (partial(GRPOModule, [Reward("exact")], **START), [GRPODataModule]),
    ],
)
def test_a_stage_takes_its_own_data(
    build: Callable[[], BaseModule], accepted: list[type[JSONLDataModule]]
) -> None:
    module = build()
    for data in DATA:
        if data in accepted:
            module.check_data(data())
        else:
            with pytest.raises(ConfigError, match=f"cannot learn from the rows of {data.__name__}"):
                module.check_data(data())
