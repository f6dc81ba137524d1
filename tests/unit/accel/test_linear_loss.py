"""The loss by chunks against plain torch, and which heads it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt import accel
from minigpt.accel import linear_loss as losses
from minigpt.accel.linear_loss import (
    head_is_linear,
    linear_cross_entropy,
    linear_logprobs,
    softmax_,
)
from minigpt.model.packed_lm import PackedLM

IDS = torch.arange(8)[None]
CHANGED: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.5},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None},
}


@pytest.mark.parametrize(
    ("device", "half", "dtype"),
    [
        ("cpu", True, torch.float32),
        pytest.param("cuda", True, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", False, torch.float32, marks=pytest.mark.gpu),
    ],
)
def test_layers_add_to_bf16_on_a_gpu(device: str, half: bool, dtype: torch.dtype) -> None:
    lm = PackedLM(tiny.model("qwen3")).to(device)
    dtypes = []
    layer = lm.hf.base_model.layers[-1]
    layer.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    with torch.autocast(device, torch.bfloat16, enabled=half):
        lm(tiny.batch([5, 9]).to(device))
    assert dtypes == [dtype]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_known_families_have_a_linear_head(family: str) -> None:
    model = tiny.model(family).train()
    assert accel.linear_head(model, packed=True) is not None
    assert model.training


@pytest.mark.parametrize(("family", "changes"), CHANGED.items())
def test_changed_logits_are_noticed(family: str, changes: dict[str, Any]) -> None:
    assert not head_is_linear(tiny.model(family, **changes), IDS)


def test_a_soft_cap_is_noticed_while_logits_are_small() -> None:
    model = tiny.model("gemma2", final_logit_softcapping=30.0, attn_logit_softcapping=None)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.01)
    assert not head_is_linear(model, IDS)


Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor]


def arguments(n: int, h: int, v: int, bias: bool, dtype: torch.dtype = torch.float32) -> Arguments:
    generator = torch.Generator().manual_seed(n * 1009 + h * 31 + v)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    labels = torch.randint(v, (n,), generator=generator)
    return leaf(n, h), leaf(v, h), leaf(v) if bias else None, labels


def gradients(function: Callable[..., Tensor], args: Arguments) -> list[Tensor]:
    """The value and the gradients of hidden, weight and bias; each label weighs differently."""
    value = function(*args)
    weights = torch.linspace(-1, 2, len(args[3]), dtype=value.dtype) if value.ndim else 1.0
    total = (value * weights).sum()
    leaves = [x for x in args[:3] if x is not None]
    return [value.detach(), *torch.autograd.grad(total, leaves)]


def plain_sum(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    return cross_entropy(linear(h, w, b), y, reduction="sum")


def plain_logprobs(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    return linear(h, w, b).log_softmax(-1).gather(1, y[:, None]).squeeze(1)


PAIRS = pytest.mark.parametrize(
    ("ours", "plain"),
    [(linear_cross_entropy, plain_sum), (linear_logprobs, plain_logprobs)],
    ids=["cross_entropy", "logprobs"],
)


@PAIRS
@given(n=st.integers(1, 40), h=st.integers(1, 24), v=st.integers(2, 300), bias=st.booleans())
@settings(max_examples=40)
def test_linear_losses_equal_torch(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], n: int, h: int, v: int, bias: bool
) -> None:
    args = arguments(n, h, v, bias)
    exact = tuple(x.detach().double().requires_grad_() if x is not None else None for x in args[:3])
    got = gradients(ours, args)
    for result, torchs, truth in zip(
        got, gradients(plain, args), gradients(plain, (*exact, args[3])), strict=True
    ):
        assert torch.allclose(result, torchs, rtol=1e-4, atol=1e-4)
        assert torch.allclose(result.double(), truth, rtol=1e-4, atol=1e-4)


def test_cross_entropy_without_gradients_is_the_same() -> None:
    args = arguments(207, 8, 30, True)
    with torch.no_grad():
        value = linear_cross_entropy(*args)
    assert not value.requires_grad
    assert value.item() == pytest.approx(linear_cross_entropy(*args).item(), rel=1e-6)


def test_probabilities_are_saved_only_for_a_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[int] = []
    save = torch.autograd.function.FunctionCtx.save_for_backward
    monkeypatch.setattr(
        torch.autograd.function.FunctionCtx,
        "save_for_backward",
        lambda ctx, *tensors: (saved.append(len(tensors)), save(ctx, *tensors)),
    )
    args = arguments(207, 8, 30, True)
    linear_logprobs(*args)
    with torch.no_grad():
        linear_logprobs(*args)
    assert saved == [6, 5]


@pytest.mark.parametrize("saved", [3, 2], ids=["saved", "computed again"])  # of 207 * 30
@PAIRS
def test_linear_losses_over_several_chunks(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    saved: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 30 * 100)
    monkeypatch.setattr(losses, "ROWS", 23)
    monkeypatch.setattr(losses, "SAVED_CHUNKS", saved)
    args = arguments(207, 8, 30, True)
    assert [len(label) for _, label in losses._chunks(args[0], args[1], args[3])] == [69, 69, 69]
    for result, truth in zip(gradients(ours, args), gradients(plain, args), strict=True):
        assert torch.allclose(result, truth, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("n", "sizes"), [(0, []), (63, [63]), (500, [256, 244]), (1000, [384, 384, 232])]
)
def test_chunks_are_multiples_of_what_matmuls_like(
    n: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 400)
    hidden, weight, _, labels = arguments(n, 2, 1, False)
    assert [len(label) for _, label in losses._chunks(hidden, weight, labels)] == sizes


class Largest(TorchDispatchMode):
    """Notes the size of the largest fp32 tensor that is computed."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.dtype == torch.float32:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_a_softmax_that_is_not_compiled_widens_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(50, 30).bfloat16()
    expected_probabilities = logits.clone()
    expected = softmax_(expected_probabilities)
    monkeypatch.setattr(losses, "FP32_LOGITS", 7 * 30 + 1)
    with Largest() as largest:
        got = softmax_(logits)
    assert largest.numbers == 7 * 30
    assert torch.equal(got, expected)
    assert torch.equal(logits, expected_probabilities)


@pytest.mark.parametrize("ours", [linear_cross_entropy, linear_logprobs])
def test_linear_losses_without_targets(ours: Callable[..., Tensor]) -> None:
    args = arguments(0, 8, 30, True)
    value, hidden, weight, bias = gradients(ours, args)
    assert value.sum() == 0
    assert hidden.shape == (0, 8)
    assert not weight.any()
    assert not bias.any()


@PAIRS
def test_linear_losses_under_autocast(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    """bf16 keeps 8 bits, so single products are off by up to 2^-8; the norms stay within 2%."""
    args = arguments(200, 32, 300, True)
    with torch.autocast("cpu", torch.bfloat16):
        result = gradients(ours, args)
    assert result[0].dtype == torch.float32
    for got, truth in zip(result, gradients(plain, args), strict=True):
        assert got.dtype == truth.dtype
        assert (got - truth).norm() <= 0.02 * truth.norm()


@pytest.mark.parametrize("ours", [linear_cross_entropy, linear_logprobs])
def test_a_frozen_head_gets_no_gradient(ours: Callable[..., Tensor]) -> None:
    hidden, weight, bias, labels = arguments(5, 4, 9, True)
    assert bias is not None
    ours(hidden, weight.detach(), bias.detach(), labels).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is bias.grad is None
