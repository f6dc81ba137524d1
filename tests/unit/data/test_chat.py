from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.data.chat import ChatCodec, View, install_template
from minigpt.data.records import Message
from minigpt.data.template import has_generation_marks
from minigpt.data.tokenizer import CHAT_TEMPLATE, TURN_END, TURN_START
from minigpt.errors import DataError, TokenizerError

# No marks, trims contents, and ends a turn without a line break.
LLAMA = (
    "{{- '<|endoftext|>' -}}{%- for m in messages -%}"
    "{{- '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n\n' -}}{%- endif -%}"
)
UNMARKED = CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
EMPTY_BLOCK = CHAT_TEMPLATE.replace(
    "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
    "{%- endgeneration -%}{{- message['content'] + '<|im_end|>' -}}",
)
# Shows the past as a count of messages only, so that each turn changes what came before.
REWRITING = "{{ messages|length }}{{ messages[-1]['content'] }}{{ '>' if add_generation_prompt }}"
# Says nothing of what the assistant says.
SILENT = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}"

CHAT = (
    Message("system", "be kind"),
    Message("user", "1+1?"),
    Message("assistant", "2"),
    Message("user", "ok"),
    Message("assistant", "春眠\n"),
)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> ChatCodec:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return ChatCodec(changed)


def views(codec: ChatCodec, chat: Sequence[Message]) -> list[View]:
    planned = codec.chat(chat)
    units = dict.fromkeys(chain(*(unit for one in planned for unit in one.units)))
    return codec.views(planned, codec.encode_units(list(units)))


def table(codec: ChatCodec, view: View) -> list[tuple[str, bool]]:
    """Every token's text with whether it is a target."""
    texts = [codec.tokenizer.decode([i], skip_special_tokens=False) for i in view.ids]
    return list(zip(texts, view.targets, strict=True))


def targets(codec: ChatCodec, chat: Sequence[Message]) -> list[str]:
    turns = codec.template.turns(chat)
    return ["".join(p.text for p in turn.answer if p.target) for turn in turns]


def test_targets_are_the_answers_and_the_ends_of_their_turns() -> None:
    def rows(text: str, target: bool) -> list[tuple[str, bool]]:
        return [(token, target) for token in text.split("|")]

    bytes_only = tokenizers.train([], 260)  # every token is a byte or special, so easy to read
    codec = ChatCodec(bytes_only)
    chat = (*CHAT[:4], Message("assistant", "no\n"))
    start, end = ("<|im_start|>", False), "<|im_end|>"
    (view,) = views(codec, chat)
    assert table(codec, view) == [
        *[start, *rows("s|y|s|t|e|m|\n|b|e| |k|i|n|d", False), (end, False), ("\n", False)],
        *[start, *rows("u|s|e|r|\n|1|+|1|?", False), (end, False), ("\n", False)],
        *[start, *rows("a|s|s|i|s|t|a|n|t|\n", False), ("2", True), (end, True), ("\n", False)],
        *[start, *rows("u|s|e|r|\n|o|k", False), (end, False), ("\n", False)],
        *[start, *rows("a|s|s|i|s|t|a|n|t|\n", False), *rows("n|o|\n", True), (end, True)],
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT_TEMPLATE, ["2<|im_end|>", "春眠\n<|im_end|>"]),
        (UNMARKED, ["2<|im_end|>", "春眠\n<|im_end|>"]),
        (LLAMA, ["2<|im_end|>", "春眠<|im_end|>"]),
    ],
    ids=["ours", "unmarked", "llama"],
)
def test_targets_of_templates(
    tokenizer: PreTrainedTokenizerFast, template: str, expected: list[str]
) -> None:
    codec = with_template(tokenizer, template)
    assert targets(codec, CHAT) == expected
    (view,) = views(codec, CHAT)
    assert view.targets[-1]  # nothing is learnt after the last answer
    assert views(codec, [*CHAT, Message("user", "more")]) == [view]
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    ids = codec.tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids[: len(view.ids)] == view.ids


CONTENTS = st.text(alphabet=" \n\tab1。，春👩\u0301<|>", min_size=1, max_size=8) | st.text(
    min_size=1
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED, LLAMA], ids=["ours", "un", "llama"])
@settings(max_examples=40)
@given(contents=st.lists(CONTENTS, min_size=2, max_size=6), system=st.booleans())
@example(contents=["\n a \n", " \n b\n", "\n", " "], system=True)
def test_training_sees_what_inference_sends(
    tokenizer: PreTrainedTokenizerFast, template: str, contents: list[str], system: bool
) -> None:
    codec = with_template(tokenizer, template)
    roles = ["user", "assistant"] * 3
    chat = [Message(r, c) for r, c in zip(roles, contents, strict=False)]
    chat = [Message("system", "s ")] * system + chat
    if chat[-1].role == "user":
        chat.pop()
    known: list[int] = []
    samples = iter(views(codec, chat))
    for turn, message in enumerate(chat):
        if message.role != "assistant":
            continue
        sent = codec.encode_prompt(chat[:turn])
        plain = [{"role": m.role, "content": m.content} for m in chat[:turn]]
        assert sent == codec.tokenizer.apply_chat_template(
            plain, add_generation_prompt=True, return_dict=False
        )
        if not known or sent[: len(known)] != known:  # a token reaches from an answer backwards
            sample = next(samples)
        start = len(sent)
        end = [*sample.targets, False].index(False, start)
        known = sample.ids[:end]
        assert known[:start] == sent
        said = message.content.strip() if template == LLAMA else message.content
        assert codec.tokenizer.decode(known[start:]) == f"{said}<|im_end|>"
    assert next(samples, None) is None


def test_a_template_that_changes_earlier_turns_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    codec = with_template(tokenizer, REWRITING)
    with pytest.raises(DataError, match="leaves out the text of the system message") as caught:
        codec.chat(CHAT)
    assert caught.value.reason == "template"
    with pytest.raises(DataError, match="rewrites earlier turns") as caught:
        codec.chat(CHAT[1:3])
    assert caught.value.reason == "template"
    assert "model.init_args.chat_template" in str(caught.value)


@pytest.mark.parametrize("template", [EMPTY_BLOCK, SILENT], ids=["empty block", "silent"])
def test_a_template_that_hides_the_answers_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    with pytest.raises(DataError, match="no assistant text to train on") as caught:
        with_template(tokenizer, template).chat(CHAT[1:3])
    assert caught.value.reason == "no_targets"


def test_a_template_that_refuses_a_chat_says_why(tokenizer: PreTrainedTokenizerFast) -> None:
    codec = with_template(tokenizer, REFUSING + LLAMA)
    with pytest.raises(DataError, match="chat template refuses the chat: No system") as caught:
        codec.chat(CHAT)
    assert caught.value.reason == "template"
    assert targets(codec, CHAT[1:3]) == ["2<|im_end|>"]


def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        with_template(tokenizer, None)


def test_ours_is_installed_where_there_is_none(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    known = copy.deepcopy(tokenizer)
    known.chat_template = None
    assert not install_template(known)
    assert known.chat_template == CHAT_TEMPLATE
    assert "0 tokens added" in caplog.text
    assert not install_template(known)  # it has one now


def test_new_tokens_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bare = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", additional_special_tokens=["<|other|>"]
    )
    size = len(bare)
    assert size == 258
    assert install_template(bare)
    assert "2 tokens added" in caplog.text
    assert len(bare) == size + 2
    assert (bare.eos_token, bare.eos_token_id) == (TURN_END, size + 1)
    assert bare.convert_tokens_to_ids(TURN_START) == size
    assert bare.encode("<|other|>") == [bare.convert_tokens_to_ids("<|other|>")]
    assert targets(ChatCodec(bare), CHAT) == ["2<|im_end|>", "春眠\n<|im_end|>"]


def test_a_template_whose_tokens_would_get_ids_of_others(tmp_path: Path) -> None:
    bare = tokenizers.load(tiny.tokenizer(tmp_path / "bare", template=False))
    spec = json.loads(bare.backend_tokenizer.to_str())
    words = spec["model"]["vocab"]
    merged = [word for word in words if len(word) > 1 and not word.startswith("<|")]
    words |= {word: len(words) + place for place, word in enumerate(merged)}
    holed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(TokenizerError, match="ids that other tokens have"):
        install_template(holed)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHAT_TEMPLATE, True), (LLAMA, False), (None, False), ("", False)],
)
def test_has_generation_marks(template: str | None, expected: bool) -> None:
    assert has_generation_marks(template) is expected
