"""Files from elsewhere: read within bounds of size and time, and refused in one paragraph.

Models, tokenizers, templates, adapters, configs and reports may hold anything, and the libraries
that read them raise whatever their bytes lead to, or never end. So each reader stands inside
`refusing`, and small files are read by `read_text`, `read_json` and `read_yaml`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from minigpt.errors import MiniGPTError, chain, is_panic

MEGABYTE = 1 << 20
LARGEST_FILE = 256 * MEGABYTE  # of files beside weights, of which tokenizers are the largest
LARGEST_CONFIG = MEGABYTE  # of YAML files and templates, which are written by hand
LARGEST_TREE = 100_000  # values of a YAML file, when each alias is written out
SECONDS = 120  # of computing by one thread: a hundred times what the slowest honest file takes
LONGEST_REASON = 300  # characters
# Exceptions whose text alone, such as "'weights'", says little.
UNCLEAR = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OFFLINE = {"ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled"}
_OFFLINE |= {"LocalEntryNotFoundError", "ReadTimeout", "ProxyError", "SSLError"}
_GATED = {"GatedRepoError"}

_limits: list[tuple[float, float]] = []  # in force: the thread's time at their end, and seconds


class TimeUpError(BaseException):
    """More time was computed than a file may take; no library's `except Exception` catches it."""


class NotReadableError(ValueError):
    """A file that is not read: it is too large, or no regular file, or holds something else."""


@contextmanager
def refusing(
    what: str,
    kind: type[MiniGPTError],
    remedy: str = "",
    seconds: float = SECONDS,
    verb: str = "cannot be loaded",
) -> Iterator[None]:
    """Turn whatever is raised while something from elsewhere is read into one paragraph.

    Args:
        what: what is read, as the beginning of a sentence, such as "The model at outputs/sft".
        kind: class of the error. MiniGPT's own errors pass.
        remedy: what the user can do about it.
        seconds: that the main thread may compute.
        verb: how the sentence goes on.

    Raises:
        MiniGPTError: of that class.
    """
    try:
        with limited_time(seconds):
            yield
    except MiniGPTError:
        raise
    except (Exception, TimeUpError) as error:
        raise kind(_paragraph(what, verb, reason_of(error), remedy)) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise kind(_paragraph(what, verb, reason_of(error), remedy)) from error


def _paragraph(what: str, verb: str, reason: str, remedy: str) -> str:
    return f"{what} {verb}: {reason.rstrip('.')}. {remedy}".rstrip()


def reason_of(error: BaseException) -> str:
    """Return what is wrong in one line, of `LONGEST_REASON` characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if first.endswith(":") and len(lines) > 1:
        first += f" {lines[1]}"
    if isinstance(error, MemoryError):
        first = "there is not enough memory for it"
    elif isinstance(error, RecursionError):
        first = "it is nested too deeply"
    elif isinstance(error, OSError) and error.strerror:
        first = error.strerror
    elif not first or isinstance(error, UNCLEAR):
        first = f"{type(error).__name__}: {first}".rstrip(": ")
    return first if len(first) <= LONGEST_REASON else first[: LONGEST_REASON - 1] + "…"


def may_be_hub_id(source: str | Path) -> bool:
    """Whether a model may be one on the hub: paths, also of runs that are gone, are not."""
    name = str(source)
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "outputs/")):
        return False
    return not Path(name).exists()


def hub_problem(error: BaseException) -> str:
    """Return why the hub did not give a file, in a sentence with what to do; "" for other errors.

    Goes by the names of the errors: the hub's client and the libraries below have several classes.
    """
    names = {type(each).__name__ for each in chain(error)}
    if names & _OFFLINE or "couldn't connect to" in str(error):
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        return (
            f"it is no folder here, and the hub at {hub} is not reachable. Check the name and the "
            "network, set HF_ENDPOINT to a mirror, or download it and give its folder."
        )
    if names & _GATED:
        return "the hub asks for access. Accept its terms on its page, and set HF_TOKEN."
    return ""


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Raise an error inside once the main thread has computed for so many seconds.

    Waiting, and what other threads or processes compute, does not count, so that a busy machine
    changes nothing. In threads other than the main one there is no limit.

    Raises:
        TimeUpError: when they are over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _end_when_over)
    signal.siginterrupt(signal.SIGVTALRM, False)  # no system call of a library fails by it
    interval = min(1.0, seconds)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, interval, interval)
    _limits.append((time.thread_time() + seconds, seconds))
    try:
        yield
    finally:
        _limits.pop()
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def limited_memory(size: int) -> Iterator[None]:
    """Raise a MemoryError inside once the process takes so many bytes more than it has now.

    Only where the system counts them (Linux), and in the main thread, as `limited_time`.
    """
    now = _data_size()
    if threading.current_thread() is not threading.main_thread() or now is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [bound for bound in (now + size, soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_size() -> int | None:
    """Return the bytes that RLIMIT_DATA counts, in some microseconds; None but on Linux."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except FileNotFoundError:
        return None


def _end_when_over(_: int, __: FrameType | None) -> None:
    for end, seconds in _limits:
        if time.thread_time() > end:
            raise TimeUpError(f"after {seconds:g} seconds of computing it is not done")


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """Read a small file.

    Raises:
        NotReadableError: when it is larger than `limit` bytes, or no regular file: a pipe may
            never end.
        OSError: when it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise NotReadableError(f"{path.name} is no regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise NotReadableError(f"{path.name} has more than {limit:,} bytes")
    return content


def read_text(path: Path, limit: int = LARGEST_FILE) -> str:
    """Read a small UTF-8 file; raises as `read_bytes` does, and UnicodeDecodeError."""
    return read_bytes(path, limit).decode("utf-8")


def read_json(path: Path, limit: int = LARGEST_FILE) -> dict[str, Any]:
    """Read a small file that holds one JSON object.

    Raises:
        ValueError: when it holds something else, or for what `read_bytes` refuses.
        RecursionError: when it is nested too deeply.
        OSError: when it cannot be read.
    """
    value = json.loads(read_text(path, limit))
    if not isinstance(value, dict):
        raise NotReadableError(f"{path.name} holds no JSON object")
    return value


def read_yaml(path: Path) -> Any:
    """Read a small YAML file.

    Raises:
        ValueError: when its aliases stand for more than `LARGEST_TREE` values or for themselves,
            or for what `read_bytes` refuses.
        yaml.YAMLError, RecursionError: when it is damaged or nested too deeply.
        OSError: when it cannot be read.
    """
    import yaml

    return yaml.safe_load(check_yaml(path))


def check_yaml(path: Path) -> str:
    """Return the text of a small YAML file; raises as `read_yaml` does."""
    import yaml

    text = read_text(path, LARGEST_CONFIG)
    tree = yaml.compose(text, yaml.SafeLoader)
    if tree is not None and _tree_size(tree, {}) > LARGEST_TREE:
        raise NotReadableError(f"{path.name} holds more than {LARGEST_TREE:,} values")
    return text


def _tree_size(node: Any, sizes: dict[int, int]) -> int:
    """Return how many values a YAML node stands for, with each alias written out."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = LARGEST_TREE  # so that a node inside itself is too large
    items = node.value if isinstance(node.value, list) else []
    if items and isinstance(items[0], tuple):  # of a mapping
        items = [item for key_and_value in items for item in key_and_value]
    sizes[id(node)] = 1 + sum(_tree_size(item, sizes) for item in items)
    return sizes[id(node)]


def check_directory(directory: Path) -> None:
    """Refuse a model's or tokenizer's directory in which reading a file might never end.

    Raises:
        NotReadableError: for something like a pipe, or a file beside the weights that is larger
            than `LARGEST_FILE`.
    """
    for path in [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]:
        if not path.exists() or path.is_dir():
            continue
        if not path.is_file():
            raise NotReadableError(f"{path.name} is no regular file")
        is_text = path.suffix in (".json", ".jinja", ".txt", ".model")
        if is_text and path.stat().st_size > LARGEST_FILE:
            raise NotReadableError(f"{path.name} has more than {LARGEST_FILE:,} bytes")
