"""The configs and the data of the demo, as they come with the package or the clone."""

from __future__ import annotations

import filecmp
from pathlib import Path

import minigpt
from minigpt.errors import MiniGPTError

FOLDERS = ("configs", "data")


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


def is_bundled(file: str | Path) -> bool:
    """Whether a file is one of the demo's data files, or a copy of the same name."""
    path = Path(file)
    try:
        folder = starter() / "data"
    except MiniGPTError:
        return False
    if not path.is_file():
        return False
    return any(filecmp.cmp(path, other, shallow=False) for other in folder.rglob(path.name))
