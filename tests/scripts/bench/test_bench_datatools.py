"""The benchmark of `minigpt data` makes good files and reports what it measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "bench" / "datatools.py"


def test_rows_are_of_their_kind_and_do_not_repeat(tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    for kind, key in (("text", "text"), ("chat", "messages"), ("preference", "chosen")):
        path = tmp_path / f"{kind}.jsonl"
        count = script["write"](path, kind, True, 1e5)
        lines = path.read_text("utf-8").splitlines()
        assert len(set(lines)) == len(lines) == count
        assert not any(map(str.isascii, lines))
        assert all(key in json.loads(line) for line in lines)
    for arm in script["ARMS"]:
        seconds, peak = script["measure"](arm, tmp_path / "preference.jsonl")
        assert seconds > 0
        assert 50 < peak < 5000


def test_a_line_for_each_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(SCRIPT))
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "measure", lambda verb, path: (0.001, 100))
    monkeypatch.setattr(sys, "argv", ["datatools.py", "--mb", "0.01", "0.02"])
    main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["rows", "MB", "B/row", *" ".join(script["ARMS"]).split()]
    assert len(lines) == 12
    assert all(line.count("MB/s  100 MB") == 4 for line in lines)
