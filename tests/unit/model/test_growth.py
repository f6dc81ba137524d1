from __future__ import annotations

import pytest
import tiny
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from minigpt.errors import ConfigError
from minigpt.model.growth import Growth, awake, check_growth, put_to_sleep
from minigpt.model.packed_lm import PackedLM

ALONE = SingleDeviceStrategy(torch.device("cpu"))
PATIENT = DDPStrategy(find_unused_parameters=True)


def test_layers_that_sleep_change_nothing_until_they_train() -> None:
    lm = PackedLM(tiny.model("qwen3", num_hidden_layers=3))
    batch, growth = tiny.batch([9, 5]), Growth(1, 4)
    with torch.no_grad():
        before = lm(batch)
        put_to_sleep(lm.hf, growth)
        with awake(lm.hf, growth, step=3):
            few = lm(batch)
        with awake(lm.hf, growth, step=4):
            every = lm(batch)
    assert few == every
    assert before != every


def test_only_layers_that_are_awake_have_gradients() -> None:
    lm = PackedLM(tiny.model("qwen3"))
    growth = Growth(1, 4)
    put_to_sleep(lm.hf, growth)
    with awake(lm.hf, growth, step=0):
        lm(tiny.batch([9, 5])).backward()
    told = [all(p.grad is None for p in layer.parameters()) for layer in lm.hf.base_model.layers]
    assert told == [False, True]
    lm(tiny.batch([9, 5])).backward()
    last = lm.hf.base_model.layers[1]
    assert float(last.mlp.down_proj.weight.grad.abs().max()) > 0
    assert float(last.self_attn.o_proj.weight.grad.abs().max()) > 0


def test_a_model_is_whole_again_after_a_step_that_failed() -> None:
    model = tiny.model("qwen3")
    step = awake(model, Growth(1, 4), step=0)
    step.__enter__()
    assert model.config.num_hidden_layers == 1
    assert not step.__exit__(RuntimeError, RuntimeError(), None)
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("strategy", [ALONE, PATIENT])
def test_a_run_that_grows_is_let_pass(strategy: Strategy) -> None:
    check_growth(Growth(1, 4), 5, strategy)


@pytest.mark.parametrize(
    ("steps", "strategy", "told"),
    [(4, ALONE, "the run has 4 steps"), (5, DDPStrategy(), "find_unused_parameters_true")],
)
def test_a_run_that_would_not_grow_is_refused(steps: int, strategy: Strategy, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_growth(Growth(1, 4), steps, strategy)


@pytest.mark.parametrize(("layers", "steps", "name"), [(0, 4, "layers"), (1, 0, "steps")])
def test_growth_starts_from_something(layers: int, steps: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"grow.{name} must be at least 1, but is 0"):
        Growth(layers, steps)
