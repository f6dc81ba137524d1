"""GRPO: sampled answers are scored, and learnt from as any packed batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import Fit

from minigpt.cli.trainer import MiniGPTCLI
from minigpt.errors import ConfigError, DataError, TrainingError
from minigpt.files import write_manifest
from minigpt.model.restore import load_plain
from minigpt.report.build import write_report
from minigpt.runs.checkpoints import STATE
from minigpt.stages.grpo import GRPOModule

# Rewards by TRL's signature: answers that begin alike score by their first token.
FUNCTIONS = """
def low_ids(prompts, completions, completion_ids, **fields):
    return [sum(i < 290 for i in ids) / len(ids) for ids in completion_ids]

def unscored(prompts, completions, completion_ids, log_metric, **fields):
    log_metric("answers", len(prompts))
    return [None if ids[0] % 3 == 0 else float(ids[0] % 2) for ids in completion_ids]

def same(prompts, completions, completion_ids, **fields):
    return [1.0 for _ in completion_ids]

def half(prompts, completions, completion_ids, **fields):
    return [1.0 if number % 2 else None for number, _ in enumerate(completion_ids)]

def never(prompts, completions, completion_ids, **fields):
    return [None for _ in completion_ids]
"""


@pytest.fixture
def grpo(fit: Fit, world: Path, tmp_path: Path) -> Any:
    """Run GRPO from the SFT model: `grpo("low_ids", "name of the run", dotted__path=value)`."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)

    def start(reward: str, name: str = "run", *more: str, **changes: Any) -> MiniGPTCLI:
        function = f"{tmp_path / 'functions.py'}:{reward}"
        rewards = [{"kind": "function", "function": function}]
        return fit("grpo", name, *more, **{"model__init_args__rewards": rewards, **changes})

    return start


def metrics(tmp_path: Path, name: str, run: str = "run") -> list[float]:
    return tiny_runs.metrics(tmp_path / run, name)


def test_the_reward_rises(grpo: Any, tmp_path: Path) -> None:
    grpo("low_ids", trainer__max_steps=12, trainer__val_check_interval=12)
    rewards = metrics(tmp_path, "reward/low_ids")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    before, after = metrics(tmp_path, "val/reward")
    assert after > before
    assert {0.0} == set(metrics(tmp_path, "train/clip/low") + metrics(tmp_path, "train/clip/high"))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_trained_on_is_what_was_sampled(
    temperature: float, grpo: Any, tmp_path: Path
) -> None:
    grpo("low_ids", model__init_args__temperature=temperature)
    gaps = metrics(tmp_path, "rollout/logprob_gap")
    assert max(gaps) < 1e-4
    assert max(gaps) > 0  # they are computed in two ways


def test_a_step_of_two_micro_batches_is_a_step_of_one(grpo: Any, tmp_path: Path, sgd: None) -> None:
    one = {"data__init_args__prompts_per_batch": 4}
    two = {"data__init_args__prompts_per_batch": 2, "trainer__accumulate_grad_batches": 2}
    grpo("unscored", "one", **one)
    grpo("unscored", "two", **two)
    for name in ("train/loss", "grad_norm", "reward", "rollout/not_scored"):
        first, second = (metrics(tmp_path, name, run) for run in ("one", "two"))
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    assert min(metrics(tmp_path, "rollout/not_scored", "one")) > 0


def test_several_passes_have_ratios_and_resume_exactly(grpo: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data__init_args__passes": 2,
        "data__init_args__minibatches": 2,
        "trainer__max_steps": 7,
        "checkpoint": {"every": 1, "keep": "all"},
        "model__init_args__clip_high": 0.01,
        "model__init_args__clip_low": 0.01,
        "model__init_args__optimizer": {"lr": 0.05},
    }
    uninterrupted = grpo("low_ids", "whole", **changes)
    assert max(metrics(tmp_path, "train/clip/high", "whole")) > 0
    middle = sorted((tmp_path / "whole" / "checkpoints").iterdir())[5]  # in the second rollout
    losses = metrics(tmp_path, "train/loss", "whole")
    again = grpo("low_ids", "again", "--ckpt_path", str(middle), **changes)
    assert metrics(tmp_path, "train/loss", "again") == losses[-1:]
    for one, other in zip(
        uninterrupted.model.state_dict().values(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    state = load_plain(middle / STATE)  # the negative control: what it holds is learnt from
    for batch in state["rollout"]:
        batch["advantages"] *= 2
    torch.save(state, middle / STATE)
    write_manifest(middle)
    grpo("low_ids", "changed", "--ckpt_path", str(middle), **changes)
    assert metrics(tmp_path, "train/loss", "changed") != losses[-1:]
    other = grpo("low_ids", "other", data__init_args__seed=1, **changes)
    assert metrics(tmp_path, "train/loss", "other") != losses
    assert other.datamodule.position == uninterrupted.datamodule.position


def test_groups_without_signal_change_nothing_and_are_drawn_again(
    grpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    from minigpt.stages import rollouts

    sample_groups = rollouts.sample_groups

    def counted(engine: Any, prompts: Any, *args: Any) -> Any:
        asked.append(len(prompts))
        return sample_groups(engine, prompts, *args)

    monkeypatch.setattr(rollouts, "sample_groups", counted)
    run = grpo(
        "same", trainer__max_steps=2, model__init_args__redraws=2, trainer__limit_val_batches=0
    )
    assert asked == [4, 4, 4] * 2
    assert metrics(tmp_path, "rollout/without_signal") == [1.0, 1.0]
    assert metrics(tmp_path, "rollout/redrawn") == [1.0, 1.0]
    assert metrics(tmp_path, "grad_norm") == [0.0, 0.0]
    assert run.model.rollout_metrics["rollout/spread"] == 0


def test_answers_that_are_cut_off_may_count_nowhere(grpo: Any) -> None:
    run = grpo("low_ids", trainer__max_steps=2, model__init_args__mask_cut_off=True)
    for batch in run.model.rollout:
        ends = torch.tensor(sorted(run.model.engine().ends))
        lengths = torch.bincount(batch.answers, minlength=batch.n_answers)
        last = batch.labels[lengths.cumsum(0) - 1]
        assert batch.included.tolist() == torch.isin(last, ends).tolist()
        assert not batch.included.all()


def test_an_answer_is_right_from_a_reward_on(grpo: Any, tmp_path: Path) -> None:
    for success in (0.0, 2.0):  # of rewards from 0 to 1
        name = f"from {success:g}"
        grpo("low_ids", name, trainer__max_steps=2, model__init_args__success=success)
        right = float(success == 0)
        for metric in ("accuracy", "pass_at_1", "pass_at_4"):
            assert set(metrics(tmp_path, f"val/{metric}", name)) == {right}


def test_answers_that_cannot_be_scored_count_nowhere(grpo: Any, tmp_path: Path) -> None:
    grpo("unscored", trainer__max_steps=2)
    for share, reward in zip(
        metrics(tmp_path, "rollout/not_scored"), metrics(tmp_path, "reward"), strict=True
    ):
        assert 0 < share < 1
        assert 0 < reward < 1  # a mean of zeros and ones
    assert metrics(tmp_path, "reward/metrics/answers") == [16.0, 16.0]


def functions(tmp_path: Path, **weights: float) -> dict[str, Any]:
    """Return the change by which several functions reward, each with its weight."""
    file = tmp_path / "functions.py"
    rewards = [
        {"kind": "function", "function": f"{file}:{name}", "weight": weight}
        for name, weight in weights.items()
    ]
    return {"model__init_args__rewards": rewards}


def test_each_reward_has_the_mean_of_what_it_scores(grpo: Any, tmp_path: Path) -> None:
    grpo("same", trainer__max_steps=2, **functions(tmp_path, same=1.0, half=2.0))
    for name, mean in (("reward/same", 1.0), ("reward/half", 1.0), ("reward", 3.0)):
        assert metrics(tmp_path, name) == [mean, mean]
    assert metrics(tmp_path, "rollout/not_scored") == [0.5, 0.5]
    assert set(metrics(tmp_path, "val/reward")) == {3.0}
    for name in ("accuracy", "pass_at_1", "pass_at_4"):  # each answer that is scored is right
        assert set(metrics(tmp_path, f"val/{name}")) == {1.0}
    assert set(metrics(tmp_path, "val/not_scored")) == {0.5}


def test_a_reward_that_weighs_nothing_is_only_logged(grpo: Any, tmp_path: Path) -> None:
    grpo("same", trainer__max_steps=2, **functions(tmp_path, low_ids=1.0, half=0.0))
    assert metrics(tmp_path, "rollout/not_scored") == [0.0, 0.0]
    assert metrics(tmp_path, "reward/half") == [1.0, 1.0]
    assert metrics(tmp_path, "reward") == metrics(tmp_path, "reward/low_ids")


def test_without_a_score_there_is_no_mean(grpo: Any, tmp_path: Path) -> None:
    grpo("never", trainer__max_steps=2)
    for name in ("reward", "reward/never", "rollout/spread", "val/reward", "val/accuracy"):
        assert metrics(tmp_path, name) == []
    assert metrics(tmp_path, "rollout/not_scored") == [1.0, 1.0]
    assert set(metrics(tmp_path, "val/not_scored")) == {1.0}
    assert metrics(tmp_path, "grad_norm") == [0.0, 0.0]


def test_ratios_are_1_until_the_weights_move(grpo: Any, tmp_path: Path) -> None:
    """Also where old log-probs are stored, and an adapter has dropout: here it has none."""
    changes: dict[str, Any] = {
        "data__init_args__minibatches": 2,
        "trainer__max_steps": 4,
        "model__init_args__lora": {"r": 4, "dropout": 0.3},
        "model__init_args__optimizer": {"lr": 0.05},
        "model__init_args__clip_high": 1e-5,
        "model__init_args__clip_low": 1e-5,
    }
    grpo("low_ids", **changes)
    clipped = metrics(tmp_path, "train/clip/high"), metrics(tmp_path, "train/clip/low")
    first, second, third, fourth = (max(of_step) for of_step in zip(*clipped, strict=True))
    assert first == third == 0
    assert second > 0
    assert fourth > 0


def test_without_a_kl_no_reference_is_kept(grpo: Any) -> None:
    module = grpo("low_ids", trainer__max_steps=2).model
    assert module.packed_models() == [module.model]
    module = grpo("low_ids", "kl", trainer__max_steps=2, model__init_args__beta=0.1).model
    assert len(module.packed_models()) == 2


def test_the_replay_is_a_mean_of_its_own(grpo: Any, world: Path, tmp_path: Path, sgd: None) -> None:
    """Without signal in the groups, a step is one of SFT on the chats."""
    chats = str(world / "sft.jsonl")
    more = {"model__init_args__temperature": 0.8}  # which is not of the replay
    grpo("same", data__init_args__replay={chats: 0.5}, trainer__max_steps=2, **more)
    losses, replayed = metrics(tmp_path, "train/loss"), metrics(tmp_path, "train/replay/loss")
    assert losses == pytest.approx(replayed, rel=1e-6)
    assert all(share > 0.5 for share in metrics(tmp_path, "train/replay/share"))
    assert losses[0] == pytest.approx(
        metrics(world / "..", "val/loss", str(world / "sft"))[-1], rel=0.2
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model__init_args__loss": "sequence", "model__init_args__normalisation": "sequence"},
        {"model__init_args__loss": "cispo", "model__init_args__normalisation": "constant"},
        {"model__init_args__advantage": "leave_one_out"},
        {"model__init_args__lora": {"r": 4, "dropout": 0.0}},
        {"trainer__precision": "bf16-mixed"},
    ],
)
def test_each_kind_learns(changes: dict[str, Any], grpo: Any, world: Path, tmp_path: Path) -> None:
    run = grpo("low_ids", trainer__max_steps=2, **changes)
    assert all(norm > 0 and math.isfinite(norm) for norm in metrics(tmp_path, "grad_norm"))
    assert isinstance(run.model, GRPOModule)


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.0}])
def test_the_kl_is_to_the_model_at_the_start(lora: Any, grpo: Any, tmp_path: Path) -> None:
    changes = {"model__init_args__lora": lora, "trainer__max_steps": 4}
    more = {"model__init_args__temperature": 0.7, "model__init_args__optimizer": {"lr": 0.05}}
    grpo("low_ids", "free", **changes, **more, model__init_args__beta=1e-9)
    grpo("low_ids", "held", **changes, **more, model__init_args__beta=2.0)
    free, penalised = (metrics(tmp_path, "train/kl", run) for run in ("free", "held"))
    assert free[0] == pytest.approx(0, abs=1e-6)
    assert free[-1] > 2 * penalised[-1] > 0


def test_a_collapse_stops_the_run(grpo: Any) -> None:
    collapse = {"action": "stop", "unfinished": 0.0, "steps": 2}
    with pytest.raises(TrainingError, match="For 2 steps, answers cut off at the longest length"):
        grpo(
            "low_ids", model__init_args__collapse=collapse, data__init_args__max_completion_length=2
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"data__init_args__num_generations": 1},
            ConfigError,
            "num_generations must be at least 2",
        ),
        ({"model__init_args__temperature": 0.0}, ConfigError, "temperature must be above 0"),
        ({"model__init_args__redraws": -1}, ConfigError, "redraws must be at least 0"),
        ({"model__init_args__clip_low": 2.0}, ConfigError, "clip_low lies in 0 to 1"),
        ({"model__init_args__spike": {"action": "warn"}}, ConfigError, "leave it out"),
        ({"model__init_args__rewards": [{"kind": "exact"}]}, DataError, r"grpo\.jsonl:1.*answer"),
        ({"data__class_path": "SFTDataModule"}, ConfigError, "use GRPODataModule"),
        ({"model__init_args__sampling": {"top_k": 5}}, ConfigError, "sampling.top_k.*leave it out"),
        ({"model__init_args__sampling": {"top_p": 0.5}}, ConfigError, "sampling.top_p"),
        ({"model__init_args__sampling": {"min_p": 0.1}}, ConfigError, "sampling.min_p"),
        (
            {"model__init_args__sampling": {"repetition_penalty": 1.1}},
            ConfigError,
            "sampling.repetition_penalty",
        ),
        (
            {"trainer__strategy": {"class_path": "minigpt.model.parallel.FSDP2"}},
            ConfigError,
            "use ddp",
        ),
        (
            {"model__init_args__rewards": [{"kind": "exact", "weight": None}]},
            ConfigError,
            "exact must be a number, but is None",
        ),
        ({"model__init_args__rewards": [{"kind": "nice"}]}, ConfigError, "nice"),
        ({"data__init_args__max_prompt_length": 1}, DataError, "left beside the longest answer"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    grpo: Any,
    world: Path,
    tmp_path: Path,
) -> None:
    if "data__class_path" in changes:
        file = str(world / "sft.jsonl")
        changes["data__init_args"] = {"train": file, "val_share": 0.0, "tokens_per_batch": 512}
    with pytest.raises(error, match=message):
        grpo("low_ids", **changes)
    if "trainer__strategy" not in changes:  # which is only there when the run is set up
        assert {file.name for file in (tmp_path / "run").glob("*")} <= {".lock", "status.json"}


def test_samples_are_logged_with_their_rewards(grpo: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    grpo("low_ids", trainer__max_steps=2)
    (file,) = (tmp_path / "run").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"tensors": 0})
    events.Reload()
    for name in ("rollouts/training", "rollouts/held_out"):
        (*_, last) = events.Tensors(f"{name}/text_summary")
        assert last.tensor_proto.string_val[0].decode().count("reward ") == 4
    assert all(seconds > 0 for seconds in metrics(tmp_path, "update/seconds"))
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    assert {"val/reward", "val/accuracy", "val/pass_at_1", "val/pass_at_4"} <= set(final)
    page = tmp_path / "report.html"
    write_report([tmp_path / "run"], page)
    for title in ("Reward", "Right answers", "Answers cut off", "Entropy"):
        assert f"<figcaption>{title}" in page.read_text()
