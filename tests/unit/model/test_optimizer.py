"""Optimizers and schedules: groups, Muon against torch's, state, rates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minigpt.errors import ConfigError
from minigpt.model import optimizer as optim
from minigpt.model.lora import Lora, add_adapter
from minigpt.model.optimizer import (
    BatchedMuon,
    MuonAdamW,
    OptimizerOptions,
    ScheduleOptions,
    build_optimizer,
    build_schedule,
    learning_rate_factor,
    newton_schulz,
)

MUON = OptimizerOptions(name="muon", lr=0.02, adamw_lr=0.003, weight_decay=0.1)


# Schedules


@pytest.mark.parametrize("name", ["wsd", "cosine"])
@pytest.mark.parametrize(("warmup", "floor"), [(0.1, 0.0), (10, 0.1), (0.0, 0.0)])
def test_schedule_rises_stays_and_falls(name: Any, warmup: float, floor: float) -> None:
    factor = learning_rate_factor(ScheduleOptions(name, warmup, 0.5, floor), 100)
    values = [factor(step) for step in range(100)]
    peak = 10 if warmup else 0
    assert values[0] == pytest.approx(0.1 if warmup else 1.0)
    assert max(values) == pytest.approx(1.0)
    assert values[peak] == pytest.approx(1.0)
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert floor < values[-1] <= floor + 0.02
    assert factor(100) == pytest.approx(floor)


def test_wsd_decays_linearly_over_the_decay_steps() -> None:
    factor = learning_rate_factor(ScheduleOptions("wsd", 4, 8, 0.0), 20)
    stays = [1.0] * 9
    falls = [left / 8 for left in range(7, 0, -1)]
    assert [factor(step) for step in range(20)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, *stays, *falls]
    )


def test_cosine_is_half_way_down_half_way_through() -> None:
    factor = learning_rate_factor(ScheduleOptions("cosine", 20, 0.5, 0.2), 120)
    assert factor(70) == pytest.approx(0.6)


@pytest.mark.parametrize(("warmup", "decay"), [(0.6, 0.5), (30, 0.8), (0.2, 90), (101, 0.0)])
def test_a_schedule_that_does_not_fit_is_refused(warmup: float, decay: float) -> None:
    with pytest.raises(ConfigError, match="do not fit into 100 steps"):
        learning_rate_factor(ScheduleOptions("wsd", warmup, decay), 100)


@pytest.mark.parametrize("total", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["wsd", "cosine"])
def test_the_default_schedule_fits_short_runs(name: Any, total: int) -> None:
    factor = learning_rate_factor(ScheduleOptions(name), total)
    assert all(0 < factor(step) <= 1 for step in range(total))


# Muon


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(16, 16), (16, 16), (48, 16), (16, 48), (16, 16), (48, 16)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def moved(kind: type[torch.optim.Muon], steps: int = 4) -> list[Tensor]:
    params = matrices()
    before = [p.detach().clone() for p in params]
    optimizer = kind(params, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return [p.detach() - b for p, b in zip(params, before, strict=True)]


@pytest.mark.parametrize(("in_bf16", "tolerance"), [(True, 2e-3), (False, 2e-2)])
def test_batched_muon_equals_torchs(
    in_bf16: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, as torch iterates, nearly equal; in fp32 within what bf16 loses."""
    monkeypatch.setattr(optim, "fast_bf16", lambda device: in_bf16)
    for ours, torchs in zip(moved(BatchedMuon), moved(torch.optim.Muon), strict=True):
        assert (ours - torchs).norm() <= tolerance * torchs.norm()


def test_newton_schulz_brings_singular_values_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "fast_bf16", lambda device: False)
    batch = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(batch, (3.4445, -4.7750, 2.0315), 5))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_matrix_without_gradient_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    params = matrices()[:2]
    give_gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    BatchedMuon(params, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(params[1], before)


# Groups


def names_by(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups: dict[str, list[str]] = {}
    for group in optimizer.param_groups:
        key = f"{group.get('by', 'adamw')} {'decay' if group['weight_decay'] else 'no decay'}"
        groups.setdefault(key, []).extend(names[id(p)] for p in group["params"])
    return groups


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_hidden_matrices_only(family: str, tied: bool) -> None:
    model = tiny.model(family, tie_word_embeddings=tied)
    groups = names_by(model, build_optimizer(model, MUON))
    outer = {"embed_tokens", "lm_head", "wte", "wpe"}
    expected: dict[str, list[str]] = {}
    for name, p in model.named_parameters():
        if p.ndim < 2:
            expected.setdefault("adamw no decay", []).append(name)
        else:
            by = "adamw" if name.split(".")[-2] in outer else "muon"
            expected.setdefault(f"{by} decay", []).append(name)
    assert {k: sorted(v) for k, v in groups.items()} == {k: sorted(v) for k, v in expected.items()}
    assert len(expected["muon decay"]) == 2 * (4 if family == "gpt2" else 7)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_adamw_decays_matrices_only(family: str) -> None:
    model = tiny.model(family)
    groups = names_by(model, build_optimizer(model, OptimizerOptions()))
    dims = {name: p.ndim for name, p in model.named_parameters()}
    assert {dims[name] for name in groups["adamw decay"]} == {2}
    assert {dims[name] for name in groups["adamw no decay"]} == {1}
    assert sorted(name for names in groups.values() for name in names) == sorted(dims)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_lora_matrices_are_trained(family: str, name: Any) -> None:
    model = tiny.model(family)
    add_adapter(model, Lora(r=4), "base")
    optimizer = build_optimizer(model, OptimizerOptions(name=name))
    groups = names_by(model, optimizer)
    adapters = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert [key for key, names in groups.items() if names] == [f"{name} decay"]
    train(model, optimizer, range(2))
    assert sorted(groups[f"{name} decay"]) == adapters
    assert all(".lora_" in n for n in adapters)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="Nothing to train"):
        build_optimizer(tiny.model("llama").requires_grad_(False), MUON)


# The composite


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    for seed in seeds:
        give_gradients(params, seed)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_reloaded_optimizer_takes_the_same_next_step(name: Any) -> None:
    options = OptimizerOptions(name=name, lr=0.02)
    model = tiny.model("qwen3")
    optimizer = build_optimizer(model, options)
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 5))
    train(twin, resumed, range(3, 5))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_muon_adamw_equals_its_halves_alone() -> None:
    together, apart = tiny.model("llama"), tiny.model("llama")
    optimizer = build_optimizer(together, MUON)
    assert isinstance(optimizer, MuonAdamW)
    hidden = optim.hidden_matrices(apart)
    split: dict[str, list[nn.Parameter]] = {"muon": [], "matrix": [], "vector": []}
    for p in apart.parameters():
        kind = "muon" if id(p) in hidden else "matrix" if p.ndim > 1 else "vector"
        split[kind].append(p)
    muon = BatchedMuon(split["muon"], lr=MUON.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": split["matrix"]}, {"params": split["vector"], "weight_decay": 0.0}],
        lr=MUON.adamw_lr,
        betas=MUON.betas,
        weight_decay=0.1,
    )
    train(together, optimizer, range(3))
    for seed in range(3):
        give_gradients([*apart.parameters()], seed)
        muon.step()
        adamw.step()
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_schedule_reaches_both_halves() -> None:
    model = tiny.model("llama")
    optimizer = build_optimizer(model, MUON)
    schedule = build_schedule(optimizer, ScheduleOptions("wsd", 2, 2), 4)
    rates = []
    for seed in range(4):
        train(model, optimizer, range(seed, seed + 1))
        assert isinstance(optimizer, MuonAdamW)
        halves = (optimizer.muon.param_groups[0], optimizer.adamw.param_groups[-1])
        rates.append([group["lr"] for group in halves])
        schedule.step()
    assert rates == [pytest.approx([f * 0.02, f * 0.003]) for f in (0.5, 1.0, 1.0, 0.5)]


def test_a_rate_of_zero_changes_nothing() -> None:
    model = tiny.model("llama")
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, MUON)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(2))
    for ours, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, old)


def test_a_closure_is_run_with_gradients_and_its_loss_returned() -> None:
    model = tiny.model("llama")
    optimizer = build_optimizer(model, MUON)
    before = model.lm_head.weight.detach().clone()
    ids = torch.arange(10)[None]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not torch.equal(model.lm_head.weight, before)
