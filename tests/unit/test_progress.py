"""Long work tells how far it has come: on a terminal, and nowhere else."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt import progress

Minigpt = Callable[..., Any]
SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"  # the cursor


class Terminal:
    """A terminal that standard error is written to, and what was drawn on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reader, writer = pty.openpty()
        self.file, self.drawn = os.fdopen(writer, "w", encoding="utf-8"), b""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()  # or a full terminal would hold up who writes
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setattr("sys.stderr", self.file)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # what a closed terminal raises
            while part := os.read(self.reader, 1 << 16):
                self.drawn += part

    def close(self) -> str:
        """Close it and return what was drawn."""
        self.file.close()
        self.thread.join()
        os.close(self.reader)
        return self.drawn.decode()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def test_a_bar_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    with progress.shown("counting [x]"), progress.shown("inner"):
        progress.report(1, 4)
    progress.report(2, 4)
    output = terminal.close()
    assert "counting [x]" in plain(output)
    assert "25%" in output
    assert output.index(HIDE) < output.rindex(SHOW)
    assert output.endswith("\x1b[1A\x1b[2K")  # its line is wiped
    assert "inner" not in output
    assert "50%" not in output


def test_an_interruption_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), progress.shown("counting"):
        raise KeyboardInterrupt
    with progress.shown("again"):
        pass
    output = terminal.close()
    assert output.index(HIDE) < output.index(SHOW) < output.index("again")


def test_what_prints_on_the_terminal_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    with progress.shown("to a file", printing=True):
        pass
    monkeypatch.setattr("sys.stdout", terminal.file)
    with progress.shown("to a terminal", printing=True):
        pass
    monkeypatch.undo()
    output = terminal.close()
    assert "to a file" in output
    assert "to a terminal" not in output


VERBS = {
    "checking": "data check {root}/sft.jsonl --val {root}/sft_val.jsonl",
    "measuring": "data stats {root}/sft.jsonl",
    "reading texts": "tokenizer train --data_file {root}/pretrain.jsonl --output_dir tokenizer",
    "completing": "generate --model {root}/sft --file {root}/prompts.jsonl --max_new_tokens 3",
    "text {root}/": "evaluate --model {root}/sft --text {root}/pretrain_val.jsonl",
    "exporting": "export hf --model {root}/sft --output_dir exported",
}


@pytest.mark.parametrize("what", VERBS)
def test_verbs_show_a_bar_on_a_terminal_and_none_elsewhere(
    minigpt: Minigpt,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    args = [arg.format(root=trained) for arg in VERBS[what].split()]
    what = what.format(root=trained)
    monkeypatch.chdir(tmp_path)
    piped = minigpt(*args)
    assert piped.status == 0
    assert what not in piped.err
    assert "\x1b" not in piped.err
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    terminal = Terminal(monkeypatch)
    shown = minigpt(*args)
    output = plain(terminal.close())
    assert (shown.status, shown.out) == (0, piped.out)
    assert what in output
    assert "100%" in output or what == "exporting"
