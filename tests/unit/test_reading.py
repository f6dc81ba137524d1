"""Files from elsewhere are read within bounds."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
from pathlib import Path

import damage
import pytest
from hypothesis import strategies as st

from minigpt.errors import ConfigError, DataError
from minigpt.reading import (
    LARGEST_CONFIG,
    LONGEST_REASON,
    NotReadableError,
    TimeUpError,
    check_directory,
    limited_memory,
    limited_time,
    may_be_hub_id,
    read_bytes,
    read_json,
    read_yaml,
    refusing,
)

PLAIN = "model: {class_path: SFTModule, init_args: {lr: 1.0e-3, names: [a, b]}}\nrun_dir: outputs\n"
PAIRS = zip("abcdefgh", "bcdefghi", strict=True)
TENFOLD = [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in PAIRS]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(TENFOLD)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("it is bad.\nmore"), "it is bad"),
        (ValueError("of two:\n  parts\nmore"), "of two: parts"),
        (KeyError("weights"), "KeyError: 'weights'"),
        (RuntimeError(), "RuntimeError"),
        (RecursionError("deep"), "it is nested too deeply"),
        (MemoryError(), "there is not enough memory for it"),
        (PermissionError(13, "Permission denied", "x"), "Permission denied"),
        (ValueError("x" * 9999), "x" * (LONGEST_REASON - 1) + "…"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (type("PanicException", (BaseException,), {})("called unwrap"), "called unwrap"),
    ],
)
def test_whatever_is_raised_becomes_a_paragraph(error: BaseException, reason: str) -> None:
    expected = f"The file cannot be loaded: {reason}. Copy it."
    with (
        pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"),
        refusing("The file", ConfigError, "Copy it."),
    ):
        raise error


@pytest.mark.parametrize("error", [DataError("x"), KeyboardInterrupt(), SystemExit(75)])
def test_our_own_errors_and_signals_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, refusing("The file", ConfigError):
        raise error
    assert raised.value is error


def spin() -> None:
    while True:
        try:
            while True:
                pass
        except Exception:  # as libraries do
            pass


def test_what_does_not_end_is_ended() -> None:
    with (
        pytest.raises(ConfigError, match=r"after 0\.2 seconds of computing it is not done"),
        refusing("The file", ConfigError, seconds=0.2),
    ):
        spin()
    with pytest.raises(TimeUpError, match=r"0\.1"), limited_time(600), limited_time(0.1):
        re.fullmatch("(a+)+$", "a" * 60 + "b")
    with pytest.raises(TimeUpError, match=r"0\.1"), limited_time(0.1), limited_time(600):
        spin()
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_other_threads_have_no_limit() -> None:
    done = threading.Event()

    def read() -> None:
        with limited_time(0.0):
            done.set()

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert done.is_set()


def test_sizes_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"x" * 11)
    assert read_bytes(file, 11) == b"x" * 11
    with pytest.raises(NotReadableError, match=r"a\.json has more than 10 bytes"):
        read_bytes(file, 10)
    with pytest.raises(NotReadableError, match="zero is no regular file"):
        read_bytes(Path("/dev/zero"))


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    for read in (read_bytes, read_json, read_yaml):
        with pytest.raises(NotReadableError, match="no regular file"):
            read(tmp_path / "a.json")
    with pytest.raises(NotReadableError, match="no regular file"):
        check_directory(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "5", "null", '"a"'])
def test_what_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(NotReadableError, match="holds no JSON object"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]", "more than 100,000 values"),
        ("a: &a {b: *a}", "more than 100,000 values"),
        ("[" * 5000, "nested too deeply"),
        ("a: " * 5000, "^a cannot be loaded: "),
        ("- " * 3000 + "x", "nested too deeply"),
        ("x" * (LARGEST_CONFIG + 1), "more than 1,048,576 bytes"),
        ("a: 2001-99-99", "^a cannot be loaded: "),
        ("? [a]\n: b", "^a cannot be loaded: "),
        ("a: !!python/object/apply:os.system [x]", "^a cannot be loaded: "),
        ("a: 0x_", "^a cannot be loaded: "),
        ("\0", "^a cannot be loaded: "),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ConfigError, match=reason), refusing("a", ConfigError):
        read_yaml(tmp_path / "a.yaml")


def test_aliases_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: *a\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"x": 1}, "b": {"x": 1}}


@damage.counts
def test_damaged_files(tmp_path: Path, count: int) -> None:
    def read(content: bytes) -> None:
        (tmp_path / "a").write_bytes(content)
        with refusing("a", ConfigError):
            read_yaml(tmp_path / "a")
        with refusing("a", ConfigError):
            read_json(tmp_path / "a")

    damaged = damage.damaged_bytes(PLAIN.encode()), damage.damaged_bytes(BOMB.encode())
    damage.assert_read_or_refused(
        count, st.one_of(*damaged, damage.damaged_json({"a": [1, {"b": None}]})), read
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("gpt2", True),
        ("outputs/chinese-tokenizer", False),
        ("./gpt2", False),
        ("/models/gpt2", False),
        ("a/b/c", False),
        ("data", False),
    ],
)
def test_the_hub_is_not_asked_for_paths(
    name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert may_be_hub_id(name) is expected


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux counts what is taken")
def test_memory_is_limited_inside_alone() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), limited_memory(1 << 26):
        bytearray(1 << 28)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(1 << 28)) == 1 << 28
