"""Whether a run compiles its layers, and what computes its attention, is part of its state."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import Fit
from torch import Tensor
from torch._dynamo.utils import counters

from minigpt import accel
from minigpt.accel import compiled_layers, cpu_attention, fast_attention, gpu_attention
from minigpt.errors import ConfigError
from minigpt.model.packed_lm import PackedLM
from minigpt.runs.results import SampleText

pytestmark = pytest.mark.skipif(not accel.ENABLED, reason="MINIGPT_ACCEL=off")
COMPILE = "model__init_args__compile_layers"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[PackedLM]:
    """Note which models are to be compiled, and leave them as they are."""
    noted: list[PackedLM] = []
    monkeypatch.setattr("minigpt.stages.setup.compile_model", lambda lm, *_: noted.append(lm))
    return noted


def test_a_run_goes_on_compiled_as_it_began(fit: Fit, compiled: list[PackedLM]) -> None:
    fit("sft", trainer__max_steps=2)
    assert compiled == []
    fit("sft", "compiled", trainer__max_steps=2, **{COMPILE: True})
    cli = fit("sft", "compiled", "--ckpt_path", "auto", trainer__max_steps=3)
    assert len(compiled) == 2
    assert compiled[1] is cli.model.model


def test_a_run_can_be_told_otherwise(
    fit: Fit, compiled: list[PackedLM], caplog: pytest.LogCaptureFixture
) -> None:
    fit("sft", trainer__max_steps=2, **{COMPILE: True})
    fit("sft", "run", "--ckpt_path", "auto", trainer__max_steps=3, **{COMPILE: False})
    assert len(compiled) == 1
    assert "compiled: True before, False now" in caplog.text


@torch.library.custom_op("minigpt_tests::stand_in", mutates_args=())
def stand_in(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A kernel of the shape of torch's for CUDA; what it computes does not matter here."""
    return q.clone()


stand_in.register_fake(lambda q, k, v: torch.empty_like(q))
stand_in.register_autograd(
    lambda ctx, grad: (grad, *(torch.zeros_like(x) for x in ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=[] if stage in ("sft", "dpo") else [pytest.mark.large])
        for stage in tiny_runs.STAGES  # each is compiled for half a minute
    ],
)
def test_no_graph_is_new_after_the_first_step(
    stage: str, fit: Fit, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The layers are those of a GPU, but for the kernel and the compiler's last step."""
    compiler, graphs = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda plain, **kw: compiler(plain, backend="eager", **kw)
    )
    for module in (fast_attention, compiled_layers):
        monkeypatch.setattr(module, "kernel_applies", lambda *_: True)
    monkeypatch.setattr(
        gpu_attention.varlen, "varlen_attn", lambda q, k, v, *_, **__: stand_in(q, k, v)
    )
    request.addfinalizer(torch._dynamo.reset)
    torch._dynamo.reset()
    counters.clear()

    def note(*_: Any) -> None:
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(SampleText, "on_train_batch_end", note, raising=False)
    fit(stage, trainer__max_steps=24, trainer__val_check_interval=5, **{COMPILE: True})
    assert len(graphs) == 24
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}
    assert not counters["graph_break"]


def test_the_reference_is_compiled_like_the_model(fit: Fit, compiled: list[PackedLM]) -> None:
    cli = fit("dpo", trainer__max_steps=2, **{COMPILE: True})
    assert compiled == [cli.model.model, *cli.model._frozen]
    assert len(compiled) == 2


def test_activations_are_not_computed_again_by_compiled_layers(fit: Fit) -> None:
    both: dict[str, Any] = {COMPILE: True, "model__init_args__activation_checkpointing": True}
    with pytest.raises(ConfigError, match="exclude each other"):
        fit("sft", **both)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_run_that_loses_its_kernel_says_so(
    precision: str, fit: Fit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cpu_attention, "available", lambda: True
    )  # too narrow heads to really use it
    fit("sft", trainer__max_steps=2, trainer__precision=precision)
    monkeypatch.setattr(cpu_attention, "available", lambda: False)
    fit("sft", "run", "--ckpt_path", "auto", trainer__max_steps=3, trainer__precision=precision)
    reported = "attention: kernel before, plain now" in caplog.text
    assert reported is precision.startswith("bf16")
