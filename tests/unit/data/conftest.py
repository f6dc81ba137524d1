"""Tiny tokenizers and files that the tests of the data path share."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import iter_rows

CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "What is 12 plus 30? It is 42.\n\nI'd say: don't ask again!",
]
Write = Callable[..., Path]


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as a JSONL file in the test's own directory."""

    def write_here(rows: Iterable[object], name: str = "rows.jsonl") -> Path:
        return write_rows(tmp_path / name, rows)

    return write_here


@pytest.fixture
def stub_trainer(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """Make what a DataModule asks of a trainer: `stub_trainer(rank, world, name=value)`."""

    def make(rank: int = 0, world: int = 1, **changes: Any) -> Any:
        trainer = SimpleNamespace(
            limit_train_batches=1.0,
            limit_val_batches=1.0,
            overfit_batches=0.0,
            accumulate_grad_batches=1,
            global_rank=rank,
            world_size=world,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            lightning_module=SimpleNamespace(
                source=SimpleNamespace(
                    tokenizer=tokenizer,
                    check_length=lambda length, shares_prompts: None,
                    embedding_rows=lambda: 1 << 20,
                ),
                load_exam=lambda path: list(iter_rows(path)),
                reads_last_tokens=False,
            ),
        )
        vars(trainer).update(changes)
        return trainer

    return make


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return write_rows(path, [{"text": text} for text in CORPUS * 4])


@pytest.fixture(scope="session")
def tokenizer(corpus_file: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of 340 tokens; tests must not change it."""
    return tokenizers.train([corpus_file], 340)
