"""The attention kernel: what an explicit mask gives, as exactly as bf16 can tell."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minigpt.accel import cpu_attention
from minigpt.data.batch import collate
from minigpt.model.packed_lm import PackedLM, packed_attention

needs_kernel = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(),  # type: ignore[attr-defined]
    reason="this CPU has no AVX512-BF16",
)
LENGTHS = st.integers(1, 150)
SHAPES = st.lists(
    st.one_of(st.tuples(st.just(0), LENGTHS, st.just(0)), st.tuples(LENGTHS, LENGTHS, LENGTHS)),
    min_size=1,
    max_size=4,
)


@pytest.fixture
def _unloaded() -> Iterator[None]:
    cpu_attention._library.cache_clear()
    yield
    cpu_attention._library.cache_clear()


def difference(results: Tensor, truth: Tensor) -> float:
    """Of the whole tensor, relative to its size; a single key's gradient may be nothing at all."""
    return float(
        (results.detach().float() - truth.detach()).norm()
        / (truth.detach().norm() + 1e-2 * truth.numel() ** 0.5)
    )


@needs_kernel
@given(
    shapes=SHAPES,
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]),
    width=st.sampled_from([16, 48, 64, 128]),
)
@example([(0, 1, 0)], (4, 2), 64)
@example([(0, 2, 0)], (1, 1), 64)  # of the weights one is nearly 1: gradients are small differences
@example([(0, 600, 0), (130, 200, 61), (0, 5, 0)], (4, 2), 64)
@settings(max_examples=40)
def test_kernel_equals_an_explicit_mask(
    shapes: list[tuple[int, int, int]], heads: tuple[int, int], width: int
) -> None:
    total = sum(map(sum, shapes))
    random = torch.Generator().manual_seed(total)
    q, k, v, weights = (  # as projections leave them: [1, heads, T, D] of tokens one by one
        torch.randn(1, total, n, width, generator=random).bfloat16().transpose(1, 2)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    halves = [x.detach().requires_grad_() for x in (q, k, v)]
    floats = [x.float().requires_grad_() for x in (q, k, v)]
    plan = tiny.plan(shapes)
    got, _ = packed_attention(torch.nn.Module(), *halves, None, plan=plan, scaling=0.3)
    assert "minigpt_attention" in str(got.grad_fn.next_functions)
    expected = scaled_dot_product_attention(
        *floats, attn_mask=tiny.mask_of(shapes), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    g = weights.transpose(1, 2)
    results = [got, *torch.autograd.grad(got, halves, g)]
    truth = [expected, *torch.autograd.grad(expected, floats, g.float())]
    for ours, theirs in zip(results, truth, strict=True):
        assert difference(ours, theirs) <= 0.006  # bf16 is right to 1 in 256


def gradients(lm: PackedLM, half: bool = True) -> list[Tensor]:
    batch = collate([*tiny.preferences([(40, 30, 77), (9, 3, 1)]), *tiny.texts([150, 3, 70])])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = lm(batch)
    return [loss.detach(), *torch.autograd.grad(loss, [*lm.parameters()])]


@needs_kernel
def test_a_model_with_the_kernel_is_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = PackedLM(tiny.model("qwen3", head_dim=16))
    exact, results = gradients(lm, half=False), gradients(lm)
    monkeypatch.setattr(cpu_attention, "available", lambda: False)
    plain = gradients(lm)
    assert any(not torch.equal(a, b) for a, b in zip(plain, results, strict=True))
    for ours, without, truth in zip(results, plain, exact, strict=True):
        assert difference(ours, truth) <= 1.2 * difference(without, truth) + 0.01


@needs_kernel
def test_operators_are_what_compilers_take_them_for() -> None:
    q, k, v = (torch.randn(9, n, 16).bfloat16().requires_grad_() for n in (4, 2, 2))
    spans = tiny.plan([(3, 2, 4)]).spans
    forward = torch.library.opcheck(cpu_attention._forward, (q, k, v, spans, 0.3))
    out, lse = cpu_attention._forward(q, k, v, spans, 0.3)
    saved = [x.detach() for x in (q, k, v, lse, spans)]
    back = torch.library.opcheck(cpu_attention._backward, (out.detach(), saved, 0.3))
    assert {*forward.values(), *back.values()} == {"SUCCESS"}


@needs_kernel
def test_threads_do_not_change_a_bit() -> None:
    q, k, v = (torch.randn(900, 4, 32).bfloat16().requires_grad_() for _ in range(3))
    spans = tiny.plan([(0, n, 0) for n in (300, 100, 450, 50)]).spans

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = cpu_attention.fused_attention(q, k, v, spans, 0.2)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    for a, b in zip(run(3), run(1), strict=True):
        assert torch.equal(a, b)


@needs_kernel
@pytest.mark.parametrize("everywhere", [False, True], ids=["query", "all"])
@pytest.mark.parametrize(("token", "sample"), [(0, (0, 30)), (40, (30, 50))])
def test_a_nan_stays_in_its_sample(token: int, sample: tuple[int, int], everywhere: bool) -> None:
    q, k, v = (torch.randn(90, 2, 32).bfloat16() for _ in range(3))
    for x in (q, k, v)[: 3 if everywhere else 1]:
        x[token] = torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    spans = tiny.plan([(0, 30, 0), (0, 20, 0), (0, 40, 0)]).spans
    out = cpu_attention.fused_attention(q, k, v, spans, 0.2)
    poisoned = [x.isnan().any((1, 2)) for x in (out, *torch.autograd.grad(out.sum(), (q, k, v)))]
    if not everywhere:
        assert poisoned[0].nonzero().flatten().tolist() == [token]
    for rows in poisoned:
        assert rows[slice(*sample)].any()
        assert not rows[: sample[0]].any()
        assert not rows[sample[1] :].any()


@pytest.mark.parametrize(
    ("dtype", "width", "applies"),
    [(torch.bfloat16, 64, True), (torch.float32, 64, False), (torch.bfloat16, 8, False)],
)
def test_what_the_kernel_is_for(
    dtype: torch.dtype, width: int, applies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.empty(3, 2, width, dtype=dtype)
    monkeypatch.setattr(cpu_attention, "available", lambda: True)
    assert cpu_attention.applies(query) is applies
    assert not cpu_attention.applies(query.to("meta"))
    monkeypatch.setattr(cpu_attention, "available", lambda: False)
    assert not cpu_attention.applies(query)


@needs_kernel
@pytest.mark.usefixtures("_unloaded")
def test_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path))
    assert cpu_attention.available()
    (library,) = (p for p in tmp_path.rglob("*") if p.is_file())
    built = library.stat().st_mtime_ns
    cpu_attention._library.cache_clear()
    monkeypatch.setenv("PATH", "")  # no compiler any more
    assert cpu_attention.available()
    assert library.stat().st_mtime_ns == built


def flipped(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def truncated(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:-100])


def another(library: Path) -> None:
    library.write_bytes(b"of another user, with another digest")


def others_may_write(library: Path) -> None:
    library.chmod(0o777)


def of_another_user(library: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file to another user")
    os.chown(library, 12345, -1)


def linked(library: Path) -> None:
    library.rename(library.with_name("elsewhere"))
    library.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "harm", [flipped, truncated, another, others_may_write, of_another_user, linked]
)
def test_a_library_that_others_may_have_written_is_never_loaded(
    harm: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def compiled(command: list[str], **_: object) -> None:
        Path(command[-1]).write_bytes(b"code" * 100)

    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_attention.subprocess, "run", compiled)
    library = cpu_attention._build()
    content = library.read_bytes()
    assert cpu_attention._build() == library
    assert caplog.messages == []
    harm(library)
    assert not cpu_attention._is_sound(library)
    assert cpu_attention._build() == library
    assert caplog.messages == [
        f"{library} is damaged, or others may write to it: it is built again."
    ]
    assert cpu_attention._is_sound(library)
    assert library.read_bytes() == content


@needs_kernel
@pytest.mark.usefixtures("_unloaded")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_attention_goes_on(
    compiler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert not cpu_attention.available()
        assert not cpu_attention.available()
    (message,) = caplog.messages
    assert message.startswith("Attention without its kernel, which only costs speed: ")
    assert compiler in message
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.usefixtures("_unloaded")
def test_other_processors_have_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not cpu_attention.available()
