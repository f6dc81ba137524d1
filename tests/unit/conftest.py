"""What the unit tests share."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_runs
from patience import limit
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from minigpt.__main__ import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Outcome(NamedTuple):
    """What a user sees of a command."""

    status: int
    out: str
    err: str


Minigpt = Callable[..., Outcome]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two threads would wait for each other longer than tiny models compute."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def minigpt(capsys: pytest.CaptureFixture[str]) -> Iterator[Minigpt]:
    """Run a command line in this process: `minigpt("fit", "--config", "sft.yaml")`."""
    root = logging.getLogger()
    handlers = root.handlers[:]

    def run(*args: object) -> Outcome:
        root.handlers[:] = []  # so that the messages go to what stderr is now
        capsys.readouterr()
        return Outcome(main([str(arg) for arg in args]), *capsys.readouterr())

    yield run
    root.handlers[:] = handlers


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer and finished runs of three stages: `pretrain`, `sft` and `lora`."""
    root = tiny_runs.write_data(tmp_path_factory.mktemp("trained"))
    for stage in ("pretrain", "sft", "lora"):
        config = tiny_runs.config(root, stage, root / stage)
        assert main(tiny_runs.arguments("fit", config)) == 0
    return root


@pytest.fixture
def fit(trained: Path, tmp_path: Path, minigpt: Minigpt) -> Minigpt:
    """Fit a stage into `tmp_path / "run"`: `fit("sft", "--more", dotted__path=value)`."""

    def start(stage: str, *more: object, **changes: Any) -> Outcome:
        config = tiny_runs.config(trained, stage, tmp_path / "run", **changes)
        return minigpt(*tiny_runs.arguments("fit", config), *more)

    return start


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        bundled, installed = playwright.chromium.executable_path, map(shutil.which, BROWSERS)
        executable = bundled if Path(bundled).exists() else next(filter(None, installed), None)
        if executable is None:
            pytest.skip("no browser: install one with `playwright install chromium`")
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        flags = ["--no-sandbox"] if root else []
        launched = playwright.chromium.launch(
            executable_path=executable, args=flags, timeout=limit(60) * 1000
        )
        launched.new_context = patient(launched.new_context)  # type: ignore[method-assign]
        expect.set_options(timeout=limit(30) * 1000)
        yield launched
        launched.close()


def patient(opening: Callable[..., BrowserContext]) -> Callable[..., BrowserContext]:
    """Let what a page is asked for take its time."""

    def opened(**options: Any) -> BrowserContext:
        context = opening(**options)
        context.set_default_timeout(limit(30) * 1000)
        return context

    return opened
