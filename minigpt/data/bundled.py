"""The configs and the data of the demo, as they come with the package or the clone."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path

import minigpt
from minigpt.errors import MiniGPTError

FOLDERS = ("configs", "data")
FETCHED = "public"  # in `data`: where `minigpt data fetch` puts what is not bundled
# In `data`: the demo's files, each with one for validation, and folders of others.
_FILES = (
    "pretrain",
    "sft",
    "sft_skills",
    "dpo",
    "kto",
    "lora_medical",
    "security_dpo",
    "replay",
    "grpo",
    "grpo_hard",
)
_DATA_FOLDERS = ("eval", "exam", "lora", "mini")


def starter() -> Path:
    """Return the folder with the configs and the data: of a built package, or of the clone.

    Raises:
        MiniGPTError: when the package was built without them.
    """
    package = Path(minigpt.__file__).parent
    for folder in (package / "starter", package.parent):
        if all((folder / name).is_dir() for name in FOLDERS):
            return folder
    raise MiniGPTError("This installation has no configs and data. Install MiniGPT again.")


def bundled_data(folder: Path) -> Iterator[Path]:
    """Yield the demo's files in its folder of data, in which others may have put theirs."""
    for name in _FILES:
        files = (folder / f"{name}.jsonl", folder / f"{name}_val.jsonl")
        yield from (file for file in files if file.is_file())
    for name in _DATA_FOLDERS:
        yield from (folder / name).glob("*")


def is_bundled(file: str | Path) -> bool:
    """Whether a file is one of the demo's data files, or a copy of the same name."""
    path = Path(file)
    try:
        folder = starter() / "data"
    except MiniGPTError:
        return False
    if not path.is_file():
        return False
    same_name = (other for other in bundled_data(folder) if other.name == path.name)
    return any(filecmp.cmp(path, other, shallow=False) for other in same_name)
