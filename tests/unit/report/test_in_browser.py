"""The pages that verbs write, in a browser as narrow as a phone, light and dark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from tiny_runs import write_jsonl

Minigpt = Callable[..., Any]
WIDTH = 360
LONG = "https://example.org/" + "a-very-long-path-without-any-place-to-break" * 3
# Labels of charts that do not lie within them.
LABELS = """[...document.querySelectorAll('svg text')].filter(text => {
  const own = text.getBoundingClientRect(), all = text.ownerSVGElement.getBoundingClientRect();
  return own.left < all.left || own.right > all.right || own.bottom > all.bottom + 1;
}).map(text => text.textContent)"""
PAGES = {
    "report": "report {root}/pretrain {root}/sft --output {out}",
    "stats": "data stats rows.jsonl {root}/sft.jsonl --tokenizer {root}/tokenizer --html {out}",
    "show": "data show rows.jsonl --kind text --tokenizer {root}/tokenizer --html {out}",
    "evaluate": "evaluate --model {root}/pretrain {root}/sft --pairs pairs.jsonl "
    "--exam {root}/exam.jsonl --max_new_tokens 4 --html {out}",
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone(
    minigpt: Minigpt,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    browser: Browser,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": LONG}, {"text": "the cat " * 30}] * 3)
    write_jsonl(tmp_path / "pairs.jsonl", [{"good": "the cat sits", "bad": "cat the sits"}])
    out = tmp_path / f"{name}.html"
    assert minigpt(*PAGES[name].format(root=trained, out=out).split()).status == 0
    looks = []
    for scheme in ("light", "dark"):
        context = browser.new_context(
            viewport={"width": WIDTH, "height": 800},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        page, complaints = context.new_page(), list[str]()
        page.on("pageerror", lambda error: complaints.append(str(error)))  # noqa: B023
        page.on("console", lambda message: complaints.append(message.text))  # noqa: B023
        page.goto(out.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTH
        assert page.evaluate(LABELS) == []
        looks.append(
            page.evaluate("[getComputedStyle(document.body).color, document.body.clientHeight]")
        )
        context.close()
        assert complaints == []
    assert looks[0][0] != looks[1][0]
    assert looks[0][1] == looks[1][1] > 400
