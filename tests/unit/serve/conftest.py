"""A server that the tests share."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import tiny
from serving import ANSWER, HTML, Served, recite, running

from minigpt.infer.engine import Engine


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """`sft` and `html` answer by heart; `base` knows no chats and talks on and on."""
    root = tmp_path_factory.mktemp("served")
    tiny.model("llama", max_position_embeddings=4096).save_pretrained(root / "base")
    tiny.tokenizer(root / "base", template=False)
    return {
        "base": Engine.load(root / "base"),
        "sft": recite(root / "sft", ANSWER),
        "html": recite(root / "html", HTML),
    }


@pytest.fixture(scope="module")
def served(engines: dict[str, Engine]) -> Iterator[Served]:
    with running(engines) as server:
        yield server


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return served.client
