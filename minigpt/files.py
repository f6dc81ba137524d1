"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class whole_directory:  # noqa: N801  (used like a function)
    """Context manager: fill a directory beside its place, then put it there in one rename."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> Path:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.directory.name}-"
        self.partial = Path(tempfile.mkdtemp(prefix=prefix, dir=self.directory.parent))
        self.partial.chmod(0o755)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            old = self.partial.with_name(self.partial.name + "-old")
            if self.directory.exists():
                self.directory.rename(old)
            self.partial.rename(self.directory)
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)
