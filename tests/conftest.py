"""What every test stands on: no network, a cache of its own, a steady number of threads."""

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import leftovers
import pytest
from hypothesis import HealthCheck, settings
from patience import limit

# Before torch, transformers and MiniGPT are imported, and in the environment so that child
# processes get it too.
_CACHE = tempfile.TemporaryDirectory(prefix="minigpt-test-cache-")
os.environ["MINIGPT_CACHE"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
# Sums depend on how many threads share them, and golden losses must not depend on the machine.
os.environ["OMP_NUM_THREADS"] = "1"
# Whoever starts tests in the background has them ignore Ctrl-C, and every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
leftovers.adopt_orphans()
_BUSY: list[subprocess.Popen[bytes]] = []
# How long an example takes is a matter of what else the machine does. The examples are the same
# in every run, so that no change fails for an old fault that chance met; `pytest
# --hypothesis-profile random` looks for new ones.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("steady", settings.get_profile("random"), derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_outside_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sockets connect to this machine only."""
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    """Fail a test that leaves a process running, and end that process for those that follow."""
    before = leftovers.children()
    yield
    ended = leftovers.end(before)
    assert not ended, f"left running: {', '.join(ended)}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="keep the losses of this run as golden ones"
    )
    parser.addoption(
        "--busy", type=int, default=0, metavar="N", help="keep N processes busy beside the tests"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Scale the time limit of each test; processes of pytest-xdist are given it."""
    if not hasattr(config, "workerinput"):
        _BUSY.extend(_spinning() for _ in range(config.option.busy))
    if config.option.timeout is None:
        config.option.timeout = limit(float(config.getini("timeout")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and this machine has none"))


def pytest_unconfigure() -> None:
    for process in _BUSY:
        process.kill()
        process.wait()
    _CACHE.cleanup()


def _spinning() -> subprocess.Popen[bytes]:
    """Start a process that computes until this one ends."""
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    return subprocess.Popen([sys.executable, "-c", code])


def _guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guard(self: socket.socket, address: Any) -> Any:
        if not _is_local(self.family, address):
            raise RuntimeError(f"a test tried to connect to {address!r}; tests use no network")
        return connect(self, address)

    return guard


def _is_local(family: int, address: Any) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True  # e.g. a Unix socket
    host = str(address[0])
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which is not looked up
        return False
