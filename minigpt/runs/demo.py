"""What belongs to the bundled demo, to notice it in a run that is not the demo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from minigpt.data.bundled import is_bundled, starter
from minigpt.errors import MiniGPTError
from minigpt.reading import read_yaml

# Stages whose configs in configs/ are the demo's.
STAGES = ("pretrain", "sft", "dpo", "kto", "grpo", "lora", "reward")
REAL = "security"  # in the names of bundled data that is about the real world
MOST_PARAMETERS = 8_000_000  # of a model that the demo's data is enough for; the demo's has 3.5M


def demo_files(paths: Iterable[str | Path]) -> list[str]:
    """Return those of some files that hold the demo's invented world, wherever they lie."""
    return [str(path) for path in paths if REAL not in Path(path).name and is_bundled(path)]


def demo_prompts(prompts: Sequence[str]) -> list[str]:
    """Return those of some prompts that the demo's configs ask."""
    if not prompts:
        return []
    try:
        files = [starter() / "configs" / f"{stage}.yaml" for stage in STAGES]
    except MiniGPTError:
        return []
    asked: set[str] = set()
    for config in map(read_yaml, files):
        asked.update(config["model"]["init_args"].get("sample_prompts", ()))
    return [prompt for prompt in prompts if prompt in asked]
