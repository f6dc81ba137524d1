"""Two processes train exactly as one does: DDP and FSDP2 on the CPU, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from driver import never, sgd  # type: ignore[import-not-found]
from patience import limit

import minigpt.model.optimizer as optim
import minigpt.stages.setup as setup
from minigpt.cli.trainer import run
from minigpt.model.pretrained import find_model, load_model

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FSDP2 = {"class_path": "minigpt.model.parallel.FSDP2"}
STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp2": FSDP2}
JOBS = [(stage, "sgd") for stage in (*tiny_runs.STAGES, "kto", "reward")]
JOBS += [("pretrain", "muon"), ("lora", "muon")]
REWARDS = ("chosen", "rejected", "margin", "accuracy")
RESUMED = [("pretrain", "muon"), ("lora", "muon"), ("dpo", "sgd")]
ALL = [(*stage_and_kind, name) for stage_and_kind in JOBS for name in STRATEGIES]


def job(root: Path, stage: str, kind: str, name: str, **changes: Any) -> dict[str, Any]:
    """Two epochs in steps of two micro-batches; the last step of an epoch may have only one,
    beside which a second process has a filler.
    """
    config = tiny_runs.config(
        root,
        stage,
        root / f"{stage}-{kind}-{name}",
        trainer__max_steps=-1,
        trainer__max_epochs=2,
        trainer__val_check_interval=1,
        data__init_args__tokens_per_batch=400,
        checkpoint={"every": 1, "keep": 9, "best": "val/loss", "export": "last"},
        **changes,
    )
    if kind == "muon":
        config["model"]["init_args"]["optimizer"] = {"name": "muon", "lr": 0.02}
    if stage == "lora":
        config["model"]["init_args"]["lora"] = {"dropout": 0.0}
    if stage == "kto":  # with a baseline above 0
        config["model"]["init_args"]["desirable_weight"] = 2.0
    return {"args": tiny_runs.arguments("fit", config), "sgd": kind != "muon"}


def launch(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=limit(600),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def torchrun(root: Path, jobs: list[dict[str, Any]]) -> None:
    file = root / "jobs.json"
    file.write_text(json.dumps(jobs))
    start = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    launch(*start, str(HERE / "driver.py"), str(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job by one process and by two; run directories are stage-kind-strategy."""
    torch.set_num_threads(1)
    root = tiny_runs.write_data(tmp_path_factory.mktemp("runs"))
    patch = pytest.MonkeyPatch()
    for stage in ("pretrain", "sft"):
        run(tiny_runs.arguments("fit", tiny_runs.config(root, stage, root / stage)))
    for stage, kind in JOBS:
        alone = job(root, stage, kind, "alone", trainer__accumulate_grad_batches=2)
        with patch.context() as only:
            only.setattr(optim, "fast_bf16", never)
            if alone["sgd"]:
                only.setattr(setup, "build_optimizer", sgd)
            run(alone["args"])
    jobs = [job(root, stage, kind, name, **two(name)) for stage, kind, name in ALL]
    with patch.context() as only:
        only.setattr(setup, "build_optimizer", sgd)
        run(grpo_job(root, "alone", trainer__accumulate_grad_batches=2)["args"])
    rollouts = [grpo_job(root, name, **two("ddp")) for name in ("ddp", "resumed")]
    rollouts[1]["args"] += ["--ckpt_path", str(root / "grpo-ddp" / "checkpoints" / "step=3")]
    rollouts[1]["args"] += ["--allow_changes", "true"]  # the reward lies in another file
    torchrun(root, [*jobs, *later_jobs(root), *rollouts])
    return root


def grpo_job(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Two steps from each rollout, with a replay; step 3 is in the middle of the second one."""
    reward, seen = root / f"reward_{name}.py", root / f"sampled-{name}"
    reward.write_text(
        "import os\n"
        "def low(completion_ids, **_):\n"
        f"    with open({str(seen)!r} + os.environ.get('RANK', '0'), 'a') as file:\n"
        "        file.writelines(f'{ids}\\n' for ids in completion_ids)\n"
        "    return [sum(i < 290 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    config = tiny_runs.config(
        root,
        "grpo",
        root / f"grpo-{name}",
        trainer__max_steps=5,
        model__init_args__rewards=[{"kind": "function", "function": f"{reward}:low"}],
        data__init_args__passes=2,
        data__init_args__replay={str(root / "sft.jsonl"): 0.3},
        checkpoint={"every": 1, "keep": 9},
        **changes,
    )
    return {"args": tiny_runs.arguments("fit", config), "sgd": True}


def two(strategy: str) -> dict[str, Any]:
    return {"trainer__devices": 2, "trainer__strategy": STRATEGIES[strategy]}


def later_jobs(root: Path) -> list[dict[str, Any]]:
    """Go on from checkpoints in the middle of an epoch; use finished runs."""
    jobs = []
    asked = [{"role": "user", "content": "the dog"}]  # an exam that leaves one process nothing
    single = {"id": "1", "family": "single", "messages": asked, "answer": "no such reply"}
    tiny_runs.write_jsonl(root / "single.jsonl", [single])
    for name in STRATEGIES:
        for stage, kind in RESUMED:
            resumed = job(root, stage, kind, f"{name}-resumed", **two(name))
            checkpoint = root / f"{stage}-{kind}-{name}" / "checkpoints" / "step=2"
            resumed["args"] += ["--ckpt_path", str(checkpoint)]
            jobs.append(resumed)
        precomputed = {
            "model__init_args__reference": "precomputed",
            "data__init_args__cache_dir": str(root / f"cache-{name}"),
        }
        first = job(root, "dpo", "sgd", f"{name}-precomputed", **precomputed, **two(name))
        again = {**first, "args": [*first["args"], "--overwrite", "true"]}  # finds them computed
        jobs += [first, again]
        tested = tiny_runs.config(root, "sft", root / f"sft-sgd-{name}", **two(name))
        tested["model"]["init_args"]["sampling"] = {"max_new_tokens": 4}
        tested["data"]["init_args"] |= {
            "exam": [str(root / "exam.jsonl"), str(root / "single.jsonl")],
            "predict": str(root / "prompts.jsonl"),
        }
        for verb in ("validate", "test", "predict"):
            jobs.append({"args": tiny_runs.arguments(verb, tested), "sgd": False})
    return jobs


def weights(path: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_model(path, scores=stage == "reward").state_dict()


@pytest.mark.parametrize(("stage", "kind", "strategy"), ALL)
def test_the_weights_are_those_of_one_process(
    stage: str, kind: str, strategy: str, runs: Path
) -> None:
    alone = weights(runs / f"{stage}-{kind}-alone", stage)
    start = weights(runs / "sft", "sft")
    together = weights(runs / f"{stage}-{kind}-{strategy}", stage)
    tolerance = 1e-4 if kind == "muon" else 1e-5
    for name, value in together.items():
        assert torch.allclose(value, alone[name], rtol=tolerance, atol=tolerance), name
    changed = [
        not torch.allclose(alone[name], start[name], atol=1e-3) for name in start.keys() & alone
    ]
    assert any(changed)


@pytest.mark.parametrize(("stage", "kind", "strategy"), ALL)
def test_the_logged_numbers_are_those_of_one_process(
    stage: str, kind: str, strategy: str, runs: Path
) -> None:
    for name in ("train/loss", "grad_norm", "val/loss"):
        alone = tiny_runs.metrics(runs / f"{stage}-{kind}-alone", name)
        together = tiny_runs.metrics(runs / f"{stage}-{kind}-{strategy}", name)
        if name == "val/loss":  # one process validates after every micro-batch
            alone, together = ([values[0], values[-1]] for values in (alone, together))
        assert len(together) > 1
        assert together == pytest.approx(alone, rel=1e-3), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_baseline_of_a_step_is_that_of_all_processes(strategy: str, runs: Path) -> None:
    alone = tiny_runs.metrics(runs / "kto-sgd-alone", "train/kl")
    together = tiny_runs.metrics(runs / f"kto-sgd-{strategy}", "train/kl")
    assert max(alone) > 0.5
    assert together == pytest.approx(alone, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("stage", "kind"), RESUMED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_ends_where_the_whole_one_did(
    strategy: str, stage: str, kind: str, runs: Path
) -> None:
    before = runs / f"{stage}-{kind}-{strategy}"
    expected, resumed = load_model(before).state_dict(), before.with_name(f"{before.name}-resumed")
    assert len(tiny_runs.metrics(resumed)) == len(tiny_runs.metrics(before)) - 2
    for name, value in load_model(resumed).state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name


def sampled_ids(runs: Path, name: str) -> list[str]:
    """The answers that all processes of a run scored, in any order."""
    files = sorted(runs.glob(f"sampled-{name}[01]"))
    return sorted(line for file in files for line in file.read_text().splitlines())


def test_rollouts_are_those_of_one_process(runs: Path) -> None:
    assert len(set(sampled_ids(runs, "alone"))) > 20
    assert sampled_ids(runs, "ddp") == sampled_ids(runs, "alone")
    for name in ("reward", "rollout/length", "rollout/spread", "train/loss", "grad_norm"):
        alone = tiny_runs.metrics(runs / "grpo-alone", name)
        together = tiny_runs.metrics(runs / "grpo-ddp", name)
        assert len(together) == 5
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-6), name
    for name in ("val/reward", "val/pass_at_1", "val/cut_off"):
        values = (tiny_runs.metrics(runs / f"grpo-{run}", name) for run in ("alone", "ddp"))
        assert next(values) == pytest.approx(next(values)), name
    ddp, resumed = (load_model(runs / f"grpo-{run}").state_dict() for run in ("ddp", "resumed"))
    alone = load_model(runs / "grpo-alone").state_dict()
    for name, value in ddp.items():
        assert torch.allclose(value, alone[name], rtol=1e-5, atol=1e-5), name
        assert torch.allclose(value, resumed[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(("stage", "kind", "strategy"), ALL)
def test_checkpoints_are_models_and_the_best_stays(
    stage: str, kind: str, strategy: str, runs: Path
) -> None:
    checkpoints = runs / f"{stage}-{kind}-{strategy}" / "checkpoints"
    best = json.loads((checkpoints / "best.json").read_text())
    values = tiny_runs.metrics(checkpoints.parent, "val/loss")
    assert best["held_out"]["val/loss"] == min(values)
    assert find_model(checkpoints / "best") == checkpoints / f"step={best['step']}" / "hf"
    last = weights(checkpoints / "last", stage)
    exported = weights(checkpoints.parent, stage)
    assert all(torch.equal(last[name], value) for name, value in exported.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_share_the_computing_of_reference_logprobs(strategy: str, runs: Path) -> None:
    for name in ("loss", *(f"rewards/{kind}" for kind in REWARDS)):
        alone = tiny_runs.metrics(runs / "dpo-sgd-alone", f"train/{name}")
        together = tiny_runs.metrics(runs / f"dpo-sgd-{strategy}-precomputed", f"train/{name}")
        assert together == pytest.approx(alone, rel=1e-3, abs=1e-5), name
    for name in ("val/loss", "val/rewards/margin"):
        alone = tiny_runs.metrics(runs / "dpo-sgd-alone", name)
        together = tiny_runs.metrics(runs / f"dpo-sgd-{strategy}-precomputed", name)
        ends = [alone[0], alone[-1]]  # one process validates after every micro-batch
        assert [together[0], together[-1]] == pytest.approx(ends, rel=1e-3, abs=1e-5), name
    assert len(list((runs / f"cache-{strategy}").glob("*/reference-*.npz"))) == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exam_and_predictions_hold_every_item(strategy: str, runs: Path) -> None:
    run_dir = runs / f"sft-sgd-{strategy}"
    exam = json.loads((run_dir / "exam.json").read_text())
    ids = [reply["id"] for reply in exam["replies"]]
    assert sorted(ids) == ["1", "empty-0", "empty-1", "odd-0", "odd-1", "odd-2"]
    assert exam["scores"].keys() == {"exam/empty", "exam/odd", "exam/single"}
    rows = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    assert [row["mark"] for row in rows] == [*range(7)]


def test_lightnings_own_launcher(runs: Path) -> None:
    config = tiny_runs.config(runs, "sft", runs / "launched")
    args = tiny_runs.arguments("fit", config, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert "sync_dist" not in launch("minigpt", *args)
    assert len(tiny_runs.metrics(runs / "launched")) == 3
    summary = json.loads((runs / "launched" / "summary.json").read_text())
    assert summary["steps"] == 3
