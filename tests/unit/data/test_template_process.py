"""Templates in a process of their own: as transformers renders them, and no longer than allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jinja2 import TemplateRuntimeError
from transformers.utils.chat_template_utils import render_jinja_template

from minigpt.data import template_process
from minigpt.data.template_process import TemplateProcess

CHAT = [{"role": "user", "content": "grüß \ud800 \n 你好"}, {"role": "assistant", "content": "x"}]
MARKED = """{%- for m in messages -%}{{ bos_token }}{%- if m.role == 'assistant' -%}
{%- generation -%}{{ m.content }}{%- endgeneration -%}{%- else -%}{{ m | tojson }}{%- endif -%}
{%- endfor -%}"""


def arguments(template: str, **more: Any) -> dict[str, Any]:
    return {"conversations": [CHAT], "chat_template": template, **more}


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[TemplateProcess]:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.5)
    process = TemplateProcess(longest=2**20)
    yield process
    process.close()


def test_it_renders_as_transformers_does(process: TemplateProcess) -> None:
    for more in ({}, {"bos_token": "<s>", "return_assistant_tokens_mask": True}):
        texts, spans = render_jinja_template(**arguments(MARKED, **more))
        rendered, marked = process(**arguments(MARKED, **more))
        assert rendered == texts
        assert [list(map(tuple, of_chat)) for of_chat in marked] == spans


def test_templates_that_do_not_end_or_cannot_be_rendered(process: TemplateProcess) -> None:
    loop = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2
    for template, words in {
        loop: "more than 0.5 seconds of processor time",
        "{{ 10 ** (10 ** 10) }}": "more than 0.5 seconds of processor time",
        "{{ 'x' * 10 ** 11 }}": "MemoryError",
        "{{ 'x' * (2 ** 20 + 1) }}": "more than 1048576 characters",
        "{{ messages[9].content }}": "has no",
        "{{ raise_exception('not such') }}": "not such",
    }.items():
        with pytest.raises(TemplateRuntimeError, match=words):
            process(**arguments(template))
        assert process(**arguments("{{ messages[1].content }}")) == (["x"], [])


def test_a_closed_process_renders_nothing(process: TemplateProcess) -> None:
    process.close()
    with pytest.raises(TemplateRuntimeError, match="no chats are rendered any more"):
        process(**arguments("x"))
