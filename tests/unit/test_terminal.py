"""Text from elsewhere commands no terminal."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.infer.engine import Delta, Engine
from minigpt.terminal import for_output, printable

ODD = st.text(st.characters(max_codepoint=0x2100) | st.sampled_from("\x1b\x9b\x07\n\t\u202e"))


@given(ODD)
def test_what_is_printable_commands_nothing(text: str) -> None:
    shown = printable(text)
    assert all(c in "\n\t" or unicodedata.category(c) != "Cc" for c in shown)
    assert not set("\u202a\u202e\u2028\u2066") & set(shown)
    if shown == text:
        assert "\\u001b" in text or "\x1b" not in text


@given(st.dictionaries(ODD, ODD))
def test_a_line_of_json_stays_what_it_is(row: dict[str, str]) -> None:
    assert json.loads(printable(json.dumps(row, ensure_ascii=False))) == row


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_goes_into_a_file_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert for_output("a\x1b[0m") == ("a\\u001b[0m" if is_terminal else "a\x1b[0m")


def test_messages_name_files_without_their_escapes(
    minigpt: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "a\x1b[31m\nminigpt: all is well"
    outcome = minigpt("data", "stats", file)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "a\\u001b[31m minigpt: all is well" in outcome.err
    assert "\x1b" not in outcome.err


def test_generate_prints_escapes_into_files_alone(
    minigpt: Callable[..., Any], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(*_: object) -> Any:
        yield Delta(1, "a\x1b[2J", [5], [], "stop")

    monkeypatch.setattr(Engine, "stream", stream)
    assert minigpt("generate", "--model", trained / "sft", "--prompt", "a").out == "a\x1b[2J\n"
