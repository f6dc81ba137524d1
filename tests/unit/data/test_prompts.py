from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minigpt.data.formats import Message
from minigpt.data.prompts import Prompt, load_prompts
from minigpt.errors import DataError


def test_load_prompts(write: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Once ", "id": 5},
        {"prompt": "q", "system": "s"},
        {"messages": [{"role": "user", "content": "q"}]},
        {"instruction": "q", "input": "i", "output": "not sent"},
    ]
    user = Message("user", "q")
    assert load_prompts(write(rows)) == [
        Prompt("Once ", rows[0], 0),
        Prompt((Message("system", "s"), user), rows[1], 1),
        Prompt((user,), rows[2], 2),
        Prompt((Message("user", "q\ni"),), rows[3], 3),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "t"},
        {"prompt": " "},
        {"prompt": 3},
        {"messages": [{"role": "assistant", "content": "a"}]},
        ["q"],
    ],
)
def test_a_bad_prompt_is_named(write: Any, row: object) -> None:
    path = write([{"prompt": "fine"}, row])
    with pytest.raises(DataError, match=r"rows\.jsonl:2") as caught:
        load_prompts(path)
    assert (caught.value.path, caught.value.line) == (path, 2)


def test_missing_prompts_are_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_prompts(tmp_path / "none.jsonl")
