from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from minigpt.data import tokenizer as tokenizers
from minigpt.model.pretrained import save_model

Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Save a tiny model with a tokenizer: `saved("llama", change, hidden_size=64)`."""

    def save(family: str, change: Callable[[Any], Any] | None = None, **sizes: Any) -> Path:
        tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
        tokenizer = (change and change(tokenizer)) or tokenizer
        save_model(tiny.model(family, **sizes), tokenizer, tmp_path / "model")
        return tmp_path / "model"

    return save
