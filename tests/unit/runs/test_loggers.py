"""metrics.jsonl: rewound to a step, whatever it holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt.runs.loggers import LAYOUT, JSONLLogger, parse_line

# What is no row: junk, bytes that are no text, and JSON without a step.
NO_STEP = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3)
JUNK = st.one_of(
    st.binary(min_size=1, max_size=12).map(lambda data: data.replace(b"\n", b"")),
    NO_STEP.map(lambda row: json.dumps({k: v for k, v in row.items() if k != "step"}).encode()),
    st.sampled_from(['"1"', "1.0", "-1", "true", "null", "[1]", "1e400", "NaN"]).map(
        lambda step: f'{{"step": {step}, "train/loss": 1}}'.encode()
    ),
).filter(lambda line: not parse_line(line))


def a_row(step: int, name: str = "train/loss") -> bytes:
    return json.dumps({"step": step, "time": 1.5, name: 0.25}).encode()


def rewound(directory: Path, lines: list[bytes], steps: int, validation_due: bool = False) -> Any:
    """Return the rows that a file of these lines has after it was rewound."""
    logger = JSONLLogger(directory)
    logger.path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]) + lines[-1])
    logger.rewind(steps, validation_due)
    return [json.loads(line) for line in logger.path.read_text().splitlines()]


@given(st.lists(st.lists(JUNK, max_size=2), min_size=5, max_size=5), st.integers(0, 5), JUNK)
@example([[b"\0" * 50], [b"\xff\xfe"], [b'{"loss": 1}'], [b"[" * 100_000], [b'{"step":']], 3, b"")
def test_damaged_lines_cost_no_other(
    tmp_path_factory: pytest.TempPathFactory, junk: list[list[bytes]], steps: int, cut: bytes
) -> None:
    directory = tmp_path_factory.mktemp("any")
    lines = [line for step in range(5) for line in (*junk[step], a_row(step))]
    assert rewound(directory, [*lines, cut], steps) == [json.loads(a_row(n)) for n in range(steps)]
    copy = directory / "metrics-damaged.jsonl"
    damaged = any(line.strip() for group in junk for line in group)
    assert copy.exists() == damaged
    if damaged:
        assert copy.read_bytes() == b"\n".join([*lines, cut])


def test_damaged_lines_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewound(tmp_path, [a_row(0), a_row(1), b'{"step": 2, "tra'], 2)  # cut off by a kill
    assert not caplog.messages
    rewound(tmp_path, [a_row(0), b"junk", a_row(1), b"\xff", b""], 2)
    (message,) = caplog.messages
    path, copy = tmp_path / "metrics.jsonl", tmp_path / "metrics-damaged.jsonl"
    assert message == (
        f"{path}: 2 damaged lines are left out (the first is line 2). The file as it was is {copy}."
    )


def test_a_validation_that_is_due_is_taken_out(tmp_path: Path) -> None:
    lines = [a_row(0), a_row(1), a_row(1, "val/loss"), a_row(2), b""]
    assert len(rewound(tmp_path, lines, 2)) == 3
    assert len(rewound(tmp_path, lines, 2, validation_due=True)) == 2


def test_the_row_of_a_training_step_is_looked_for(tmp_path: Path) -> None:
    logger = JSONLLogger(tmp_path)
    assert logger.lacks_step(0)
    rewound(tmp_path, [a_row(0), a_row(1, "val/loss"), b""], 2)
    assert [logger.lacks_step(step) for step in (0, 1, 2)] == [False, True, True]


def test_a_chart_shows_exactly_its_tags() -> None:
    tags = ["reward", "val/reward", "train/rewards/margin", "val/accuracy_by_words", "val/accuracy"]
    patterns = LAYOUT["train and validation"]["reward"][1]
    assert isinstance(patterns, list)
    assert [tag for tag in tags if any(re.search(p, tag) for p in patterns)] == tags[:2]
