"""Every config can be run: its keys are known, its files exist, its start says how to make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import yaml
from jsonargparse import Namespace

from minigpt.__main__ import main
from minigpt.cli import settings
from minigpt.cli import trainer as cli
from minigpt.model.architecture import build_native
from minigpt.model.parallel import FSDP2

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
STAGES = ("pretrain", "sft", "dpo", "kto", "grpo", "lora", "reward")
SIZES = {"26m": 26_879_488, "64m": 63_518_464, "125m": 125_062_144}  # with 6,400 tokens
TRAINERS: dict[str, dict[str, Any]] = {  # what each config says of its trainer
    file.relative_to(CONFIGS).as_posix(): yaml.safe_load(file.read_text("utf-8")).get("trainer", {})
    for file in sorted(CONFIGS.rglob("*.yaml"))
}
HARDWARE: dict[str, dict[str, Any]] = {
    "any": {},
    "cpu": {"accelerator": "cpu"},
    "gpu": {"accelerator": "gpu"},
    "ddp": {"strategy": "ddp", "devices": 2},
    "fsdp": {"strategy": "fsdp", "devices": 2},
}
Build = Callable[..., cli.MiniGPTCLI]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """Parse configs and instantiate what they describe, without running it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.MiniGPTCLI, "_run_subcommand", lambda *_: None)

    def build_from(*files: Path, more: tuple[str, ...] = ()) -> cli.MiniGPTCLI:
        return cli.run(["fit", *(f"--config={file}" for file in files), *more])

    return build_from


def test_every_config_is_tested() -> None:
    tested = {f"{stage}.yaml" for stage in STAGES} | {"quick.yaml"}
    assert {file.name for file in CONFIGS.glob("*.yaml")} == tested
    assert [folder.name for folder in CONFIGS.iterdir() if folder.is_dir()] == ["recipes"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_line_names_the_demo_and_the_recipes(stage: str) -> None:
    first = (CONFIGS / f"{stage}.yaml").read_text(encoding="utf-8").splitlines()[0]
    command = f"minigpt fit --config configs/{stage}.yaml"
    assert first == f"# The demo (your own data: configs/recipes/). {command}"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_config(build: Build, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _stub(monkeypatch, *MACHINES["cpu with bf16"])
    stage_cli = build(CONFIGS / f"{stage}.yaml")
    assert stage_cli.trainer.precision == "bf16-mixed"  # left to the hardware
    assert type(stage_cli.model).__name__.lower() == f"{stage}module"
    assert str(stage_cli.run_dir) == f"outputs/{stage}"
    data = stage_cli.datamodule
    for file in (*data.train_weights, data.val, *data.exam):
        assert (ROOT / file).is_file()


# What multiplies: whether the CPU has native bf16; the GPU's compute capability; whether AMD's.
MACHINES: dict[str, tuple[bool, tuple[int, int] | None, bool]] = {
    "cpu": (False, None, False),
    "cpu with bf16": (True, None, False),
    "GTX 1080": (True, (6, 1), False),
    "V100": (True, (7, 0), False),
    "T4, RTX 20": (True, (7, 5), False),
    "A100": (False, (8, 0), False),
    "H100": (False, (9, 0), False),
    "MI300": (False, (9, 4), True),
}
# The precision that is chosen on a machine: by any accelerator, on the CPU, with FSDP2 as a class.
LIKED = {
    "cpu": ("32-true", "32-true", "32-true"),
    "cpu with bf16": ("bf16-mixed", "bf16-mixed", "bf16-mixed"),
    "GTX 1080": ("32-true", "bf16-mixed", "32-true"),
    "V100": ("16-mixed", "bf16-mixed", "32-true"),
    "T4, RTX 20": ("16-mixed", "bf16-mixed", "32-true"),
    "A100": ("bf16-mixed", "32-true", "bf16-mixed"),
    "H100": ("bf16-mixed", "32-true", "bf16-mixed"),
    "MI300": ("bf16-mixed", "32-true", "bf16-mixed"),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("hardware", HARDWARE)
def test_precision_of_each_combination(
    monkeypatch: pytest.MonkeyPatch, hardware: str, machine: str
) -> None:
    if hardware == "gpu" and MACHINES[machine][1] is None:
        return  # Lightning refuses it
    _stub(monkeypatch, *MACHINES[machine])
    by_any, on_cpu, in_fsdp2 = LIKED[machine]
    by_default = {"precision": None, "accelerator": "auto", "strategy": "auto"}
    for name, trainer in TRAINERS.items():
        made = {**by_default, **trainer, **HARDWARE[hardware]}
        chosen = settings.choose_precision(*(made[option] for option in by_default))
        assert chosen == (on_cpu if hardware == "cpu" else by_any), name
    as_class = Namespace(class_path="minigpt.model.parallel.FSDP2")
    assert settings.choose_precision(None, "auto", as_class) == in_fsdp2


def test_fsdp_runs_fsdp2_here(build: Build) -> None:
    more = ("--trainer.accelerator=cpu", "--trainer.strategy=fsdp", "--trainer.devices=2")
    stage_cli = build(CONFIGS / "sft.yaml", more=more)
    assert isinstance(stage_cli.trainer.strategy, FSDP2)


def _stub(
    monkeypatch: pytest.MonkeyPatch, native: bool, capability: tuple[int, int] | None, amd: bool
) -> None:
    """Let PyTorch find a machine's hardware; GPUs that emulate bf16 say that they support it."""
    gpu = Namespace(major=capability[0]) if capability else None
    monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("minigpt.model.optimizer._cpu_has_bf16", lambda: native)


@pytest.mark.parametrize(("size", "parameters"), SIZES.items())
def test_size(build: Build, size: str, parameters: int) -> None:
    recipe = CONFIGS / "recipes" / f"{size}.yaml"
    a = build(recipe).model.start.architecture
    assert (a.head_dim, a.tied) == (128 if size == "125m" else 64, True)
    assert f"{parameters / 1e6:.1f}M parameters" in recipe.read_text(encoding="utf-8")
    with torch.device("meta"):
        model = build_native(a, _Vocabulary())  # type: ignore[arg-type]
    assert sum(weight.numel() for weight in set(model.parameters())) == parameters


class _Vocabulary:
    """What the builder asks of a tokenizer of 6,400 tokens."""

    pad_token_id, eos_token_id = 1, 3

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(6400)}


def test_a_size_is_refused_where_the_model_is_given(
    tmp_path: Path, build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    size = tmp_path / "size.yaml"
    size.write_text("model:\n  init_args:\n    architecture: {hidden_size: 512}\n")
    assert main(["fit", f"--config={CONFIGS / 'sft.yaml'}", f"--config={size}"]) == 2
    assert f"{size}:3: model.init_args.architecture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("pretrain", "minigpt tokenizer train --data_file data/pretrain.jsonl "),
        ("sft", "minigpt fit --config configs/pretrain.yaml"),
        ("dpo", "minigpt fit --config configs/sft.yaml"),
        ("kto", "minigpt fit --config configs/sft.yaml"),
        ("lora", "minigpt fit --config configs/sft.yaml"),
        ("reward", "minigpt fit --config configs/sft.yaml"),
    ],
)
def test_missing_start_names_the_command_that_makes_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    assert main(["fit", "--config", str(CONFIGS / f"{stage}.yaml")]) == 2
    assert command in capsys.readouterr().err
    left = (tmp_path / "outputs" / stage).glob("[!.]*")
    assert [path.name for path in left] == ["status.json"]


def test_a_missing_start_of_a_recipe_names_its_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    assert main(["fit", "--config", "configs/recipes/chat.yaml"]) == 2
    assert "minigpt fit --config configs/recipes/64m.yaml" in capsys.readouterr().err
    assert main(["fit", "--config", "configs/recipes/poems.yaml"]) == 2
    command = "tokenizer train --data_file TEXTS --output_dir outputs/poems-tokenizer"
    assert command in capsys.readouterr().err


@pytest.fixture(scope="module")
def quick_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_data(tmp_path_factory.mktemp("quick"))


def test_quick_runs_every_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_world: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    tokenizer = tmp_path / "outputs" / "tokenizer"
    tokenizer.parent.mkdir()
    tokenizer.symlink_to(quick_world / "tokenizer")
    small = tmp_path / "small.yaml"
    sizes = {**tiny_runs.ARCHITECTURE, "max_positions": 512}
    small.write_text(yaml.safe_dump({"model": {"init_args": {"architecture": sizes}}}))
    for stage in STAGES:
        if stage == "grpo":  # whose micro-batches are counted in prompts
            continue
        files = [CONFIGS / f"{stage}.yaml", CONFIGS / "quick.yaml"]
        files += [small] if stage == "pretrain" else []
        assert main(["fit", *(f"--config={file}" for file in files)]) == 0
        summary = yaml.safe_load((tmp_path / "outputs" / stage / "summary.json").read_text())
        assert summary["steps"] == 4
