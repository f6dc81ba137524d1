"""A built package needs no clone: its configs and data come with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("minigpt", "configs", "data", "pyproject.toml", "setup.py", "MANIFEST.in")
TEXTS = ("README.md", "LICENSE")


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Run a command outside the clone and return what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel installs it."""
    clone, site = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("site")
    for name in (*SOURCES, *TEXTS):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, clone / name, symlinks=True)
        else:
            shutil.copy(source, clone)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(site / "wheels"))
    run(*pip, "wheel", *build, str(clone), cwd=clone)
    (wheel,) = (site / "wheels").iterdir()
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=site)
    return site


def test_demo_and_recipe_start_from_a_wheel(site: Path, tmp_path: Path) -> None:
    python = (sys.executable, "-m", "minigpt")
    where = run(
        sys.executable, "-c", "import minigpt; print(minigpt.__file__)", cwd=tmp_path, path=site
    )
    assert Path(where.strip()).is_relative_to(site)
    shown = run(*python, "init", "demo", cwd=tmp_path, path=site)
    assert "minigpt fit --config configs/pretrain.yaml" in shown
    assert "begin with configs/recipes/hub_lora.yaml" in shown
    demo = tmp_path / "demo"
    assert (demo / "data/mini/dpo.jsonl").read_bytes() == (ROOT / "data/dpo.jsonl").read_bytes()
    sizes = ("--vocab_size", "320", "--output_dir", "outputs/tokenizer")
    files = ("--data_file", "data/mini/sft.jsonl")
    run(*python, "tokenizer", "train", *files, *sizes, cwd=demo, path=site)
    run(
        *(*python, "fit", "--config", "configs/pretrain.yaml", "--config", "configs/quick.yaml"),
        *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu"),
        cwd=demo,
        path=site,
    )
    assert (demo / "outputs/pretrain/hf/model.safetensors").is_file()
    run(
        *(*python, "fit", "--config", "configs/recipes/security.yaml"),
        *("--config", "configs/quick.yaml", "--model.init_args.init_from", "outputs/pretrain"),
        *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu"),
        cwd=demo,
        path=site,
    )
    assert (demo / "outputs/security/hf/model.safetensors").is_file()


def test_from_a_clone(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "demo")]) == 0
    for name in ("configs/sft.yaml", "configs/recipes/hub_lora.yaml", "data/sft.jsonl"):
        assert (tmp_path / "demo" / name).read_bytes() == (ROOT / name).read_bytes()


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    assert main(["init", str(tmp_path)]) == 2
    assert f"{tmp_path / 'data'} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (tmp_path / "file").touch()
    assert main(["init", str(tmp_path / "file" / "below")]) == 2
