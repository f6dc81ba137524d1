"""The tokens that end a turn, for templates that behave as published ones do."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from minigpt.data.chat import ChatCodec
from minigpt.data.ends import end_tokens, turn_end
from minigpt.data.records import Message
from minigpt.data.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, TURN_END

LOOP = "{% for m in messages %}"
# Another end than eos, and eos behind the whole chat, as Phi-3's.
PHI = (
    LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    LOOP + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# An answer is ended by the next turn alone.
GLM = (
    LOOP + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}"
REFUSING = "{{ raise_exception('no chats') }}"
# The mark takes in what follows the end token, or stops before it.
WIDE = CHAT_TEMPLATE.replace("+ '<|im_end|>' -}}{%- end", "+ '<|im_end|>\n' -}}{%- end")
NARROW = CHAT_TEMPLATE.replace(
    "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
    "{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
)
ADDED = ["<|end|>", "<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>"]

TWO_TURNS = [
    Message(role, content)
    for role, content in (("user", "1"), ("assistant", "A"), ("user", "2"), ("assistant", "B"))
]


@pytest.fixture(scope="module")
def many(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of several families."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": ADDED})
    made.eos_token = END_OF_TEXT
    return made


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> ChatCodec:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return ChatCodec(changed)


ENDS = {
    CHAT_TEMPLATE: TURN_END,
    WIDE: TURN_END,
    NARROW: TURN_END,
    PHI: "<|end|>",
    GEMMA: "<end_of_turn>",
    MISTRAL: END_OF_TEXT,
    GLM: "<|user|>",
    PLAIN: None,
    REFUSING: None,
    None: None,
}
NAMES = ["ours", "wide", "narrow", "phi", "gemma", "mistral", "glm", "plain", "refusing", "none"]


@pytest.mark.parametrize(("template", "expected"), ENDS.items(), ids=NAMES)
def test_the_token_that_ends_a_turn(
    many: PreTrainedTokenizerFast, template: str | None, expected: str | None
) -> None:
    changed = copy.deepcopy(many)
    changed.chat_template = template
    assert turn_end(changed) == expected
    ends = set(filter(None, (expected, END_OF_TEXT, TURN_END)))
    assert end_tokens(changed) == sorted(map(changed.convert_tokens_to_ids, ends))


def test_the_models_own_ends_are_added(many: PreTrainedTokenizerFast) -> None:
    usual, own = end_tokens(many), many.convert_tokens_to_ids("<end_of_turn>")
    assert end_tokens(many, own) == sorted({*usual, own})
    assert end_tokens(many, [own, 7]) == sorted({*usual, own, 7})
    assert end_tokens(many, [len(many), -1, own]) == sorted({*usual, own})  # no such tokens
    assert end_tokens(many, usual[0]) == usual


def test_tokens_that_are_not_special_end_turns_too(tokenizer: PreTrainedTokenizerFast) -> None:
    made = copy.deepcopy(tokenizer)
    made.add_tokens(["<|done|>", "\n\n"])
    made.eos_token = END_OF_TEXT
    made.chat_template = LOOP + "{{ m.role }}:{{ m.content }}\n\n<|done|>{% endfor %}"
    assert turn_end(made) == "<|done|>"
    assert made.convert_tokens_to_ids("<|done|>") in end_tokens(made)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (WIDE, ["A<|im_end|>", "B<|im_end|>"]),
        (NARROW, ["A<|im_end|>", "B<|im_end|>"]),
        (GEMMA, ["A<end_of_turn>", "B<end_of_turn>"]),
        (MISTRAL, [" A<|endoftext|>", " B<|endoftext|>"]),
    ],
    ids=["wide", "narrow", "gemma", "mistral"],
)
def test_a_target_ends_with_the_first_end_token(
    many: PreTrainedTokenizerFast, template: str, expected: list[str]
) -> None:
    turns = with_template(many, template).template.turns(TWO_TURNS)
    assert [piece.text for turn in turns for piece in turn.answer if piece.target] == expected


def test_what_a_template_writes_behind_the_end_is_not_learnt(
    many: PreTrainedTokenizerFast,
) -> None:
    (turn,) = with_template(many, PHI).template.turns(TWO_TURNS[:2])
    assert turn.answer == [("A<|end|>", True)]
