"""The web page, in a browser without a window."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from patience import eventually
from playwright.sync_api import Browser, Locator, Page, Route, expect
from serving import ANSWER, HTML, QUESTION, Served

from minigpt.infer.continuous_batch import ContinuousBatch

LONG = QUESTION + " on"  # nothing learnt by heart


@pytest.fixture
def opened(browser: Browser, served: Served) -> Iterator[Page]:
    """The page with `sft` chosen; whatever it complains of fails the test."""
    context = browser.new_context(locale="en-GB", viewport={"width": 1200, "height": 800})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.goto(served.url)
    expect(page.get_by_role("checkbox", name="html")).to_be_checked()  # the last one
    choose(page, "sft")
    greedy(page)
    yield page
    context.close()
    meant = re.compile("status of 4|requires 'Trusted")
    assert [text for text in complaints if not meant.search(text)] == []
    eventually(lambda: not served.worker.completions)


def greedy(page: Page) -> None:
    page.locator("#temperature").evaluate("(node) => { node.value = 0; }")


def choose(page: Page, *names: str) -> None:
    expect(page.locator("#models input")).not_to_have_count(0)  # the page fetches them
    for box in page.locator("#models input").all():
        box.set_checked(box.get_attribute("value") in names)


def ask(page: Page, text: str) -> None:
    """Send a message once no answer is being written any more: until then Enter sends nothing.

    The text of an answer may be whole a moment before its end is told.
    """
    finished(page)
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def reply(page: Page, name: str = "sft") -> Locator:
    return page.get_by_role("region", name=name, exact=True).last


def test_asking(opened: Page) -> None:
    ask(opened, QUESTION)
    expect(reply(opened).locator(".said")).to_have_text(ANSWER)
    expect(reply(opened)).to_contain_text(re.compile(r"\d+ tokens · [\d.]+ tokens/s"))
    expect(opened.get_by_role("status")).to_have_text("Answer finished.")
    expect(opened.get_by_label("Message")).to_have_value("")
    expect(opened.get_by_label("Message")).to_be_focused()


def test_what_is_sent(opened: Page) -> None:
    sent: list[dict[str, Any]] = []
    opened.on("request", lambda r: sent.append(r.post_data_json) if r.post_data else None)
    opened.get_by_role("button", name="Settings").click()
    opened.get_by_label("System prompt").fill("Be 简短.")
    for name, keys in (("Temperature", 2), ("Top-k", 3), ("Min-p", 1), ("Repetition penalty", 1)):
        opened.get_by_label(name).focus()
        for _ in range(keys):
            opened.keyboard.press("ArrowRight")
    opened.get_by_label("Seed").fill("7")
    ask(opened, "one")
    finished(opened)
    ask(opened, "two")
    finished(opened)
    assert sent[0] == {
        "model": "sft",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.1,
        "top_p": 1,
        "top_k": 3,
        "min_p": 0.11,
        "repetition_penalty": 1.05,
        "max_tokens": 256,
        "seed": 7,
        "messages": [
            {"role": "system", "content": "Be 简短."},
            {"role": "user", "content": "one"},
        ],
    }
    roles = [message["role"] for message in sent[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    answer = opened.locator(".reply .said").first.evaluate("(node) => node.textContent")
    assert sent[1]["messages"][2]["content"] == answer


def test_several_models_side_by_side(opened: Page) -> None:
    choose(opened, "base", "sft", "html")
    ask(opened, QUESTION)
    expect(reply(opened, "sft").locator(".said")).to_have_text(ANSWER)
    expect(reply(opened, "html").locator(".said")).to_have_text(HTML)
    expect(reply(opened, "base")).to_contain_text("continues text")
    boxes = [reply(opened, name).bounding_box() for name in ("base", "sft", "html")]
    assert len({box["y"] for box in boxes if box}) == 1
    assert len({box["x"] for box in boxes if box}) == 3


def test_what_a_model_says_is_never_run(opened: Page) -> None:
    choose(opened, "html")
    ask(opened, QUESTION)
    expect(reply(opened, "html").locator(".said")).to_have_text(HTML)
    ask(opened, HTML)
    expect(opened.locator(".asked .said").last).to_have_text(HTML)
    finished(opened)
    assert opened.locator("#log img, #log script").count() == 0
    assert opened.title() == "MiniGPT"


def test_policy_runs_nothing_but_the_page(opened: Page, served: Served) -> None:
    policy = served.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    refused = opened.evaluate(
        """() => {
          const tried = [];
          try { document.body.innerHTML = "<b>x</b>"; } catch (e) { tried.push(e.name); }
          const script = document.createElement("script");
          try { script.textContent = "document.title = 'ran'"; } catch (e) { tried.push(e.name); }
          return tried;
        }"""
    )
    assert refused == ["TypeError", "TypeError"]
    text = served.get("/").text
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_stop(opened: Page, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step = ContinuousBatch.step

    def slowly(batch: ContinuousBatch) -> Any:
        time.sleep(0.05)  # or the answer might end before it is stopped
        return step(batch)

    monkeypatch.setattr(ContinuousBatch, "step", slowly)
    choose(opened, "base")
    opened.locator("#max_tokens").evaluate("(node) => { node.value = node.max; }")  # time to stop
    for control in ("button", "Escape"):
        ask(opened, LONG)
        expect(reply(opened, "base").locator(".said")).not_to_be_empty()
        if control == "button":
            opened.get_by_role("button", name="Stop").click()
        else:
            opened.keyboard.press(control)
        expect(reply(opened, "base")).to_contain_text("Stopped.")
        eventually(lambda: not served.worker.completions)


def test_regenerate_and_edit(opened: Page) -> None:
    ask(opened, QUESTION)
    expect(reply(opened).locator(".said")).to_have_text(ANSWER)
    ask(opened, "more")
    finished(opened)
    expect(opened.get_by_role("button", name="Regenerate")).to_have_count(1)  # of the last turn
    opened.get_by_role("button", name="Edit").first.click()
    box = opened.get_by_label("Edit message")
    expect(box).to_have_value(QUESTION)
    expect(box).to_be_focused()
    opened.keyboard.press("Escape")
    expect(opened.locator(".turn")).to_have_count(2)
    opened.get_by_role("button", name="Edit").first.click()
    box.fill("another")
    opened.get_by_role("button", name="Send again").click()
    expect(opened.locator(".turn")).to_have_count(1)
    expect(opened.locator(".asked .said")).to_have_text("another")
    expect(opened.get_by_role("button", name="Regenerate")).to_be_visible()
    opened.get_by_role("button", name="Edit").click()
    box.fill(QUESTION)
    opened.keyboard.press("Enter")
    expect(reply(opened).locator(".said")).to_have_text(ANSWER)
    with opened.expect_response("**/v1/chat/completions"):
        opened.get_by_role("button", name="Regenerate").click()
    expect(reply(opened).locator(".said")).to_have_text(ANSWER)
    opened.get_by_role("button", name="New chat").click()
    expect(opened.locator(".turn")).to_have_count(0)
    expect(opened.get_by_text("What would you like to ask?")).to_be_visible()


def test_an_edit_without_a_model_takes_nothing_back(opened: Page) -> None:
    for text in (QUESTION, "more"):
        ask(opened, text)
        finished(opened)
    opened.get_by_role("button", name="Edit").first.click()
    choose(opened)
    opened.get_by_label("Edit message").fill("another")
    opened.get_by_role("button", name="Send again").click()
    expect(opened.get_by_role("status")).to_have_text("Choose at least one model.")
    expect(opened.locator(".turn")).to_have_count(2)
    expect(opened.get_by_label("Edit message")).to_have_value("another")


@pytest.mark.parametrize("clipboard", [True, False])
def test_copy(opened: Page, clipboard: bool) -> None:
    """Pages of other hosts have no `navigator.clipboard` without TLS."""
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.evaluate("window.kept = navigator.clipboard")
    if not clipboard:
        opened.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    ask(opened, QUESTION)
    expect(reply(opened).locator(".said")).to_have_text(ANSWER)
    reply(opened).get_by_role("button", name="Copy").click()
    expect(opened.get_by_role("status")).to_have_text("Copied")
    assert opened.evaluate("window.kept.readText()") == ANSWER


def test_enter_of_an_input_method_sends_nothing(opened: Page) -> None:
    opened.get_by_label("Message").fill("ni hao")
    opened.get_by_label("Message").evaluate(
        "(node) => node.dispatchEvent(new KeyboardEvent('keydown', "
        "{key: 'Enter', isComposing: true, bubbles: true}))"
    )
    opened.keyboard.press("Shift+Enter")
    assert opened.locator(".turn").count() == 0
    assert "\n" in opened.get_by_label("Message").input_value()


def test_looks_and_languages(browser: Browser, served: Served) -> None:
    context = browser.new_context(locale="zh-CN", color_scheme="dark")
    page = context.new_page()
    page.goto(served.url)
    expect(page.get_by_role("button", name="发送")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(18, 22, 21)"
    page.get_by_role("button", name="主题").click()
    assert page.evaluate(ground) == "rgb(246, 247, 246)"
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.reload()  # both are remembered
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.evaluate(ground) == "rgb(246, 247, 246)"
    both = page.evaluate("[Object.keys(WORDS.en), Object.keys(WORDS.zh)]")
    assert both[0] == both[1]
    context.close()


@pytest.mark.parametrize(
    "stored",
    ["{", "null", "3", '"fr"', "[]", '[3, "none"]', '{"temperature": "hot", "system": 3}'],
)
def test_whatever_was_stored_the_page_works(browser: Browser, served: Served, stored: str) -> None:
    context = browser.new_context(locale="en")
    names = [f"minigpt.{key}" for key in ("language", "theme", "models", "settings")]
    script = f"for (const key of {names}) localStorage.setItem(key, {json.dumps(stored)});"
    context.add_init_script(script)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(served.url)
    expect(page.get_by_role("checkbox", name="html")).to_be_checked()
    expect(page.locator("#temperature")).to_have_value("0.5")
    expect(page.get_by_role("button", name="Theme: as the system")).to_be_visible()
    ask(page, QUESTION)
    expect(reply(page, "html").locator(".said")).not_to_be_empty()
    assert complaints == []
    context.close()


def test_narrow_screen(browser: Browser, served: Served) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, locale="en")
    page = context.new_page()
    page.goto(served.url)
    choose(page, "sft", "html")
    ask(page, QUESTION)
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(2)
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.keyboard.press("Escape")
    expect(page.get_by_role("complementary")).to_be_hidden()
    context.close()


def test_every_control_has_a_name_and_can_be_reached(opened: Page) -> None:
    opened.get_by_role("button", name="Settings").click()
    bare = opened.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")].filter((node) =>
          !(node.ariaLabel || node.textContent.trim() || node.labels?.length)).map((n) => n.id)"""
    )
    assert bare == []
    reached = set()
    opened.get_by_label("Message").focus()
    for _ in range(30):
        opened.keyboard.press("Tab")
        reached.add(opened.evaluate("document.activeElement.id || document.activeElement.value"))
    assert reached >= {"prompt", "send", "fresh", "language", "theme", "more", "temperature", "sft"}


def test_errors_are_told(opened: Page, served: Served) -> None:
    ask(opened, "the " * 600)
    expect(reply(opened).get_by_role("alert")).to_contain_text("maximum context length is 512")

    def cut(route: Route) -> None:
        chunk = {"choices": [{"delta": {"content": "half"}}]}
        route.fulfill(body=f"data: {json.dumps(chunk)}\n\n", content_type="text/event-stream")

    opened.route("**/v1/chat/completions", cut)
    opened.get_by_role("button", name="Regenerate").click()
    expect(reply(opened).get_by_role("alert")).to_have_text("The connection broke.")
    expect(reply(opened).locator(".said")).to_have_text("half")


def test_key_is_asked_for(browser: Browser, served: Served) -> None:
    context = browser.new_context(locale="en")
    page = context.new_page()

    def guarded(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "Incorrect API key."}})

    page.route("**/v1/**", guarded)
    page.goto(served.url)
    expect(page.get_by_text("Incorrect API key.")).to_be_visible()
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("芝麻")
    page.keyboard.press("Tab")
    expect(page.get_by_text("holds only letters of ASCII")).to_be_visible()
    page.get_by_label("API key").fill("sesame")
    page.keyboard.press("Tab")
    expect(page.get_by_role("checkbox", name="html")).to_be_checked()
    context.close()
