"""KTO: steps written out, the baseline of a whole step, the reference, exact resume."""

from __future__ import annotations

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import Fit
from torch import Tensor

from minigpt.__main__ import main
from minigpt.data.batch import Sample
from minigpt.errors import ConfigError
from minigpt.model.pretrained import load_model
from minigpt.stages.kto import KTOModule

WEIGHTS = {"model__init_args__desirable_weight": 2.0, "model__init_args__undesirable_weight": 0.5}
BETA, STEPS, RATE = 0.3, 4, 0.2


def logprob(model: Any, sample: Sample, number: int) -> Tensor:
    """The summed log-prob of one of a sample's answers, from plain logits."""
    start = sample.prompt + sum(sample.answers[:number])
    answer = torch.tensor(sample.ids[start : start + sample.answers[number]].astype(int))
    prompt = torch.tensor(sample.ids[: sample.prompt].astype(int))
    with torch.no_grad() if number else torch.enable_grad():
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0]
    logp = logits[sample.prompt - 1 : -1].log_softmax(-1)
    return logp.gather(1, answer[:, None]).sum()


def step_by_hand(policy: Any, reference: Any, samples: list[Sample]) -> dict[str, float]:
    """One step of SGD on the losses as the paper writes them; return what is to be logged."""
    with torch.no_grad():
        mismatched = [logprob(policy, s, 1) - logprob(reference, s, 1) for s in samples]
        baseline = max(0.0, float(torch.stack(mismatched).mean()))
    losses, rewards = [], {True: [], False: []}  # type: ignore[var-annotated]
    for sample in samples:
        with torch.no_grad():
            expected = logprob(reference, sample, 0)
        ratio = logprob(policy, sample, 0) - expected
        if sample.desirable:
            losses.append(2.0 * (1 - torch.sigmoid(BETA * (ratio - baseline))))
        else:
            losses.append(0.5 * (1 - torch.sigmoid(BETA * (baseline - ratio))))
        rewards[sample.desirable].append(BETA * ratio.item())
    loss = torch.stack(losses).mean()
    policy.zero_grad()
    loss.backward()
    with torch.no_grad():
        for weight in policy.parameters():
            weight -= RATE * weight.grad
    means = {kind: sum(values) / len(values) for kind, values in rewards.items()}
    return {
        "loss": loss.item(),
        "kl": baseline,
        "desirable": len(rewards[True]) / len(samples),
        "rewards/desirable": means[True],
        "rewards/undesirable": means[False],
        "rewards/margin": means[True] - means[False],
    }


@pytest.mark.usefixtures("sgd")
def test_steps_equal_steps_written_out(world: Path, tmp_path: Path, fit: Fit) -> None:
    """Validations in the middle of a step, whose baseline is another, change nothing."""
    cli = fit(
        "kto",
        **WEIGHTS,
        model__init_args__beta=BETA,
        model__init_args__schedule={"warmup": 0, "decay": 0},
        data__init_args__tokens_per_batch=200,
        trainer__accumulate_grad_batches=3,
        trainer__gradient_clip_val=0.0,
        trainer__max_steps=STEPS,
        trainer__val_check_interval=2,
    )
    data = cli.datamodule
    epoch = list(data.order.batches(0))
    assert len(epoch) >= 3 * STEPS
    policy = load_model(world / "sft", "sdpa")
    reference = copy.deepcopy(policy)
    expected = [
        step_by_hand(policy, reference, [data.train_subsets[f].sample(n) for f, n in rows])
        for rows in (list(chain(*epoch[3 * step : 3 * step + 3])) for step in range(STEPS))
    ]
    assert max(values["kl"] for values in expected) > 0.01
    for name in expected[0]:
        logged = tiny_runs.metrics(tmp_path / "run", f"train/{name}")
        by_hand = [values[name] for values in expected]
        assert logged == pytest.approx(by_hand, rel=1e-3, abs=1e-4), name
    trained, start = load_model(tmp_path / "run").state_dict(), reference.state_dict()
    for name, value in policy.state_dict().items():
        assert torch.allclose(trained[name], value, rtol=1e-4, atol=1e-5), name
    assert any(not torch.allclose(trained[name], start[name], atol=1e-3) for name in trained)


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.0}])
def test_all_weights_learn_in_bf16_from_the_reference_on(
    lora: Any, tmp_path: Path, fit: Fit
) -> None:
    """The baseline is computed in the same autocast, without gradients: a trap of its cache."""
    module = fit(
        "kto",
        model__init_args__lora=lora,
        trainer__precision="bf16-mixed",
        trainer__accumulate_grad_batches=2,
        data__init_args__tokens_per_batch=512,
    ).model
    assert tiny_runs.metrics(tmp_path / "run")[0] == pytest.approx(0.5, abs=1e-3)
    for name in ("kl", "rewards/desirable", "rewards/undesirable"):
        first = tiny_runs.metrics(tmp_path / "run", f"train/{name}")[0]
        assert first == pytest.approx(0, abs=0.02), name
    assert bool(module._frozen) == (lora is None)
    trained = {name: w for name, w in module.named_parameters() if w.requires_grad and w.ndim == 2}
    assert len(trained) > 4
    states = module.trainer.optimizers[0].state
    for name, weight in trained.items():
        assert states[weight]["exp_avg"].abs().max() > 0, name


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path, fit: Fit) -> None:
    options = {
        **WEIGHTS,
        "trainer__accumulate_grad_batches": 2,
        "trainer__max_steps": 4,
        "trainer__val_check_interval": 3,
        "checkpoint": {"every": 2, "keep": 5},
    }
    fit("kto", "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=2"
    fit("kto", "rest", "--ckpt_path", str(checkpoint), **options)
    uninterrupted, resumed = (
        load_model(tmp_path / name).state_dict() for name in ("whole", "rest")
    )
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    losses = tiny_runs.metrics(tmp_path / "whole")
    assert tiny_runs.metrics(tmp_path / "rest") == losses[2:]


def test_a_finished_run_is_measured_against_its_start(
    world: Path, tmp_path: Path, fit: Fit
) -> None:
    from minigpt.cli.trainer import run

    fit("kto", trainer__val_check_interval=3)
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    config = tiny_runs.config(world, "kto", tmp_path / "run")
    measured = run(tiny_runs.arguments("validate", config)).trainer.callback_metrics
    assert final["val/rewards/margin"] > 0.01
    for name in ("val/loss", "val/kl", "val/rewards/margin"):
        assert float(measured[name]) == pytest.approx(final[name], rel=1e-3, abs=1e-5)


def test_a_step_of_one_kind_has_no_reward_of_the_other() -> None:
    module = KTOModule(init_from="start")
    totals = {"loss": 2.0, "count": 4.0, "desirable": 4.0, "kl": 0.0}
    totals |= {"rewards/desirable": 6.0, "rewards/undesirable": 0.0}
    values = {"loss": 0.5, "desirable": 1.0, "kl": 0.0, "rewards/desirable": 1.5}
    assert module.metrics(totals) == values


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "model.beta must be a number above 0, but is 0.0"),
        ({"beta": float("inf")}, "but is inf"),
        ({"desirable_weight": -1.0}, "model.desirable_weight must be a number from 0 up"),
        ({"undesirable_weight": float("nan")}, "model.undesirable_weight .* but is nan"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "nothing is learnt"),
    ],
)
def test_options_out_of_range(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KTOModule(init_from="start", **options)


def test_data_that_it_cannot_learn_from(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = tmp_path / "single.jsonl"
    tiny_runs.write_jsonl(single, [{"prompt": "the", "completion": "cat", "label": True}])
    pairs = str(world / "dpo.jsonl")
    for data, changes, words in (
        ("KTODataModule", {"train": str(single)}, f"{single}:1: 1 rows up to line 1 have one"),
        ("KTODataModule", {"train": pairs}, f"{pairs}:1: not an unpaired row"),
        (
            "DPODataModule",
            {"train": pairs, "val": pairs},
            "use KTODataModule",
        ),
    ):
        config = tiny_runs.config(world, "kto", tmp_path / "run", data__class_path=data)
        config["data"]["init_args"] |= changes
        status = main(tiny_runs.arguments("fit", config, "--overwrite", "true"))
        outcome = type("Outcome", (), {"status": status, "err": capsys.readouterr().err})
        tiny_runs.assert_refused(outcome, words)
