"""Real files, damaged: what readers of files from elsewhere must refuse in one paragraph."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt.errors import MiniGPTError

Example = TypeVar("Example")
# How many damaged files are read: in `make test`, and in `make faults-large`.
counts = pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.large)])
# The same where each file is read by a process of its own.
few = pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.large)])

ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 2**80, 0.5, -1.5, 1e300, "", "abc", "../x"]
ODD += [
    "\x1b[2J",
    "a\nb",
    "\x00",
    "9" * 30,
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    [-1, "x"],
    ["abc"] * 3,
]
# Copies, since what is put into a document may be changed there.
odd = st.one_of(
    st.sampled_from(ODD).map(copy.deepcopy), st.integers(), st.floats(), st.text(max_size=8)
)


def assert_read_or_refused(
    count: int, examples: st.SearchStrategy[Example], read: Callable[[Example], object]
) -> None:
    """Read damaged examples; each is taken, or refused by an error of ours in one paragraph."""

    @settings(
        max_examples=count,
        database=None,
        derandomize=count <= 100,
        suppress_health_check=list(HealthCheck),
    )
    @given(examples)
    def each(example: Example) -> None:
        with suppress(MiniGPTError):
            assert_one_paragraph(lambda: read(example))

    each()


def assert_one_paragraph(read: Callable[[], object]) -> None:
    try:
        read()
    except MiniGPTError as error:
        text = str(error)
        assert text.strip() == text
        assert "\n" not in text, text
        assert len(text) < 1500, text
        raise


def paths(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a JSON value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:4]
    return [path, *(inner for key, item in items for inner in paths(item, (*path, key)))]


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """Replace or remove values of a JSON document."""
    changed = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(paths(changed)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                changed = copy.deepcopy(draw(odd))
                break
            continue
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.integers(0, 3)) == 0:
            del parent[path[-1]]
        else:
            parent[path[-1]] = copy.deepcopy(draw(odd))
    return json.dumps(changed).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, header: int | None = None) -> bytes:
    """Change, cut, double or fill some bytes, of the first `header` ones where that is given."""
    end = min(len(content), header or len(content))
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, min(end, len(out)) - 1)))
        length = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(("change", "cut", "double", "fill", "remove")))
        if kind == "change":
            new = draw(st.binary(min_size=1, max_size=9))
            out[start : start + len(new)] = new
        elif kind == "fill":
            out[start : start + length] = draw(st.sampled_from((b"\xff", b"\0", b"["))) * length
        elif kind == "cut":
            del out[start:]
        elif kind == "double":
            out[start:start] = out[start : start + length]
        else:
            del out[start : start + length]
    return bytes(out)
