from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import templates
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.data.chat import (
    ChatCodec,
    MaskedIds,
    end_tokens,
    has_generation_marks,
    install_template,
    turn_end,
)
from minigpt.data.formats import Message
from minigpt.data.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, TURN_START
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


def views(codec: ChatCodec, chat: Sequence[Message]) -> list[MaskedIds]:
    planned = codec.plan_chat(chat)
    units = dict.fromkeys(chain(*(unit for one in planned for unit in one.units)))
    return codec.chat_samples(planned, codec.encode_units(list(units)))


def table(codec: ChatCodec, view: MaskedIds) -> list[tuple[str, bool]]:
    """Every token's text with whether it is a target."""
    texts = [codec.tokenizer.decode([i], skip_special_tokens=False) for i in view.ids]
    return list(zip(texts, view.targets, strict=True))


def targets(codec: ChatCodec, chat: Sequence[Message]) -> list[str]:
    turns = codec.template.turns(chat)
    return ["".join(p.text for p in turn.answer if p.target) for turn in turns]


def test_targets_are_the_answers_and_the_ends_of_their_turns() -> None:
    def rows(text: str, target: bool) -> list[tuple[str, bool]]:
        return [(token, target) for token in text.split("|")]

    bytes_only = tokenizers.train_on([], 260)  # every token is a byte or special, so easy to read
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


CONTENTS = (
    st.text(alphabet=" \n\tab1。，春👩\u0301<|>", min_size=1, max_size=8) | st.text(min_size=1)
).filter(lambda text: "<|im_" not in text)  # plain templates let users write control tokens


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
    previous: list[int] = []
    samples = iter(views(codec, chat))
    for turn, message in enumerate(chat):
        if message.role != "assistant":
            continue
        sent = codec.encode_prompt(chat[:turn])
        plain = [{"role": m.role, "content": m.content} for m in chat[:turn]]
        assert sent == codec.tokenizer.apply_chat_template(
            plain, add_generation_prompt=True, return_dict=False
        )
        if not previous or sent[: len(previous)] != previous:  # a token reaches over the border
            sample = next(samples)
        start = len(sent)
        end = [*sample.targets, False].index(False, start)
        previous = sample.ids[:end]
        assert previous[:start] == sent
        expected = message.content.strip() if template == LLAMA else message.content
        assert codec.tokenizer.decode(previous[start:]) == f"{expected}<|im_end|>"
    assert next(samples, None) is None


def test_a_template_that_changes_earlier_turns_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    codec = with_template(tokenizer, REWRITING)
    with pytest.raises(DataError, match="leaves out the text of the system message") as caught:
        codec.plan_chat(CHAT)
    assert caught.value.reason == "template"
    with pytest.raises(DataError, match="rewrites earlier turns") as caught:
        codec.plan_chat(CHAT[1:3])
    assert caught.value.reason == "template"
    assert "model.init_args.chat_template" in str(caught.value)


@pytest.mark.parametrize("template", [EMPTY_BLOCK, SILENT], ids=["empty block", "silent"])
def test_a_template_that_hides_the_answers_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    with pytest.raises(DataError, match="no assistant text to train on") as caught:
        with_template(tokenizer, template).plan_chat(CHAT[1:3])
    assert caught.value.reason == "no_targets"


def test_a_template_that_refuses_a_chat_says_why(tokenizer: PreTrainedTokenizerFast) -> None:
    codec = with_template(tokenizer, REFUSING + LLAMA)
    with pytest.raises(DataError, match="chat template refuses the chat: No system") as caught:
        codec.plan_chat(CHAT)
    assert caught.value.reason == "template"
    assert targets(codec, CHAT[1:3]) == ["2<|im_end|>"]


def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        with_template(tokenizer, None)


def test_ours_is_installed_where_there_is_none(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert not install_template(bare)
    assert bare.chat_template == CHAT_TEMPLATE
    assert "0 tokens added" in caplog.text
    assert not install_template(bare)  # it has one now


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
    words |= {word: len(words) + index for index, word in enumerate(merged)}
    holed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(TokenizerError, match="ids that other tokens have"):
        install_template(holed)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHAT_TEMPLATE, True), (LLAMA, False), (None, False), ("", False)],
)
def test_has_generation_marks(template: str | None, expected: bool) -> None:
    assert has_generation_marks(template) is expected


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
NO_CHATS = "{{ raise_exception('no chats') }}"
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
    extended = copy.deepcopy(tokenizer)
    extended.add_special_tokens({"additional_special_tokens": ADDED})
    extended.eos_token = END_OF_TEXT
    return extended


ENDS = {
    CHAT_TEMPLATE: TURN_END,
    WIDE: TURN_END,
    NARROW: TURN_END,
    PHI: "<|end|>",
    GEMMA: "<end_of_turn>",
    MISTRAL: END_OF_TEXT,
    GLM: "<|user|>",
    PLAIN: None,
    NO_CHATS: None,
    None: None,
}
ENDS_NAMED = ["ours", "wide", "narrow", "phi", "gemma", "mistral", "glm", "plain", "refusing"]


@pytest.mark.parametrize(("template", "expected"), ENDS.items(), ids=[*ENDS_NAMED, "none"])
def test_the_token_that_ends_a_turn(
    many: PreTrainedTokenizerFast, template: str | None, expected: str | None
) -> None:
    changed = copy.deepcopy(many)
    changed.chat_template = template
    assert turn_end(changed) == expected
    ends = set(filter(None, (expected, END_OF_TEXT, TURN_END)))
    assert end_tokens(changed) == sorted(map(changed.convert_tokens_to_ids, ends))


def test_the_models_own_ends_are_added(many: PreTrainedTokenizerFast) -> None:
    usual, eos_id = end_tokens(many), many.convert_tokens_to_ids("<end_of_turn>")
    assert end_tokens(many, eos_id) == sorted({*usual, eos_id})
    assert end_tokens(many, [eos_id, 7]) == sorted({*usual, eos_id, 7})
    assert end_tokens(many, [len(many), -1, eos_id]) == sorted({*usual, eos_id})  # no such tokens
    assert end_tokens(many, usual[0]) == usual


def test_tokens_that_are_not_special_end_turns_too(tokenizer: PreTrainedTokenizerFast) -> None:
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(["<|done|>", "\n\n"])
    extended.eos_token = END_OF_TEXT
    extended.chat_template = LOOP + "{{ m.role }}:{{ m.content }}\n\n<|done|>{% endfor %}"
    assert turn_end(extended) == "<|done|>"
    assert extended.convert_tokens_to_ids("<|done|>") in end_tokens(extended)


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


KINDS = ("bytes", *templates.KINDS)
NAMES = tuple(templates.TEMPLATES)
CHATS = {
    "one turn": [("user", "What is 12 plus 30?"), ("assistant", "It is 42.")],
    "turns": [
        ("user", "hi"),
        ("assistant", "the cat"),
        ("user", " what is\n\nit? "),
        ("assistant", "春眠 ok"),
        ("user", "end"),
        ("assistant", "is it the end"),
    ],
    "system": [
        ("system", "be kind"),
        ("user", "1+1?"),
        ("assistant", "2"),
        ("user", "ok"),
        ("assistant", "the end"),
    ],
    "spaces": [("user", "a"), ("assistant", "\n b"), ("user", "\nc"), ("assistant", " d\n")],
    "reasoning": [
        ("user", "hi"),
        ("assistant", "<think>\nthe user\n</think>\n\nok"),
        ("user", "what"),
        ("assistant", "<think>it is</think>12"),
    ],
}


def messages(name: str) -> list[Message]:
    return [Message(role, content) for role, content in CHATS[name]]


def plain(chat: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in chat]


def squeezed(text: str) -> str:
    return "".join(text.split())


def answers(codec: ChatCodec, view: MaskedIds) -> list[tuple[list[int], list[int]]]:
    """The targets of a sample, each with all that comes before it."""
    turns, start = [], 0
    for end in range(1, len(view.ids) + 1):
        if view.targets[end - 1] and (end == len(view.ids) or not view.targets[end]):
            start = end - next(n for n in range(1, end + 1) if not view.targets[end - 1 - n])
            turns.append((view.ids[:start], view.ids[start:end]))
    return turns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("marks", [False, True], ids=["unmarked", "marked"])
def test_training_is_what_inference_sends_and_expects(
    tokenizer: PreTrainedTokenizerFast, kind: str, name: str, marks: bool
) -> None:
    templated = templates.tokenizer(kind, name, marks, tokenizer)
    codec = ChatCodec(templated)
    end = codec.template.turn_end
    for chat in (messages(which) for which in CHATS):
        if name == "gemma2" and chat[0].role == "system":
            with pytest.raises(DataError, match="System role not supported"):
                codec.plan_chat(chat)
            continue
        asked = [(i, m) for i, m in enumerate(chat) if m.role == "assistant"]
        learnt = [answer for view in views(codec, chat) for answer in answers(codec, view)]
        assert len(learnt) == len(asked)
        for (index, message), (sent, reply) in zip(asked, learnt, strict=True):
            by_transformers = templated.apply_chat_template(
                plain(chat[:index]), add_generation_prompt=True, return_dict=False
            )
            assert sent == by_transformers == codec.encode_prompt(chat[:index])
            text = templated.decode(reply, skip_special_tokens=False)
            assert text.endswith(end)
            assert reply[-1] == templated.convert_tokens_to_ids(end)
            assert reply.count(reply[-1]) == 1
            content = message.content.removeprefix("<think>" if name == "r1-opened" else "")
            assert squeezed(text.removesuffix(end)).endswith(squeezed(content))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_chat_has_the_ids_of_apply_chat_template(
    tokenizer: PreTrainedTokenizerFast, kind: str, name: str
) -> None:
    templated = templates.tokenizer(kind, name, False, tokenizer)
    chat = messages("one turn")
    (view,) = views(ChatCodec(templated), chat)
    full = templated.apply_chat_template(plain(chat), return_dict=False)
    if name == "r1-opened":  # whose history lacks the reasoning that its prompt opens
        assert squeezed(templated.decode(view.ids)).endswith("<think></think>Itis42.<eos>")
    elif name == "plain":  # whose history lacks the token that ends a reply
        assert (templated.decode(view.ids[:-1]), view.ids[-1]) == (
            templated.decode(full).removesuffix("\n"),
            templated.eos_token_id,
        )
    elif name == "glm":
        assert view.ids == [*full, templated.convert_tokens_to_ids("<|user|>")]
    else:
        assert view.ids == full[: len(view.ids)]
        assert templated.decode(full[len(view.ids) :]).strip() in ("", "<|endoftext|>")


@pytest.mark.parametrize("name", NAMES)
def test_answers_share_a_sample_where_a_prompt_goes_on_from_the_last(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    codec = ChatCodec(templates.tokenizer("bytes", name, False, tokenizer))
    samples = views(codec, messages("turns"))
    apart = name in ("qwen3", "r1-opened", "plain")
    assert len(samples) == (3 if apart else 1)


def test_qwen3_drops_reasoning_of_earlier_turns_only(tokenizer: PreTrainedTokenizerFast) -> None:
    templated = templates.tokenizer("bytes", "qwen3", True, tokenizer)
    first, second = views(ChatCodec(templated), messages("reasoning"))
    assert templated.decode(first.ids).endswith("<think>\nthe user\n</think>\n\nok<|im_end|>")
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    assert templated.decode(second.ids).startswith(head)
    assert templated.decode(second.ids).endswith("<think>\nit is\n</think>\n\n12<|im_end|>")


@pytest.mark.parametrize("name", ["r1", "r1-opened"])
def test_r1_learns_the_reasoning_that_its_template_drops(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    templated = templates.tokenizer("bytes", name, False, tokenizer)
    first, second = views(ChatCodec(templated), messages("reasoning"))
    assert templated.decode(first.ids) == (
        "<bos><|User|>hi<|Assistant|><think>\nthe user\n</think>\n\nok<eos>"
    )
    history = "<bos><|User|>hi<|Assistant|>\n\nok<eos><|User|>what<|Assistant|>"
    reply = "<think>\nit is</think>12<eos>" if "opened" in name else "<think>it is</think>12<eos>"
    assert templated.decode(second.ids) == history + reply


def test_mistral_tells_the_systems_text_with_the_last_question(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    templated = templates.tokenizer("first", "mistral", False, tokenizer)
    first, second = views(ChatCodec(templated), messages("system"))
    assert templated.decode(first.ids) == "<s>[INST] be kind\n\n1+1?[/INST] 2</s>"
    expected = "<s>[INST] 1+1?[/INST] 2</s>[INST] be kind\n\nok[/INST] the end</s>"
    assert templated.decode(second.ids) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_users_say_forges_no_turn(
    tokenizer: PreTrainedTokenizerFast, kind: str, name: str
) -> None:
    templated = templates.tokenizer(kind, name, False, tokenizer)
    codec = ChatCodec(templated)
    tokens = [t.content for t in templated.added_tokens_decoder.values() if t.content.strip()]
    special = set(templated.all_special_ids) | set(templated.convert_tokens_to_ids(tokens))
    written = [t for t in codec.encode_prompt([Message("user", "x")]) if t in special]
    for token in tokens:
        if token not in codec.template.control:
            assert token in templates.NOT_SPECIAL  # and the template does not write it
            continue
        for text in (token, f"a{token}b", f"{token}\n{token[:-1]}{token}{token[1:]}"):
            ids = codec.encode_prompt([Message("user", text)])
            assert [t for t in ids if t in special] == written
            decoded = "".join(templated.decode(ids, skip_special_tokens=False).split())
            assert "".join(text.split()) in decoded
            (view,) = views(codec, [Message("user", text), Message("assistant", "ok")])
            assert view.ids[: len(ids)] == ids
            assert [t for t in view.ids[: len(ids)] if t in special] == written


def test_what_systems_say_forges_no_turn_and_assistants_keep_their_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    codec = ChatCodec(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = [Message("system", "<|im_end|>"), Message("user", "a<|im_end|>")]
    assert codec.encode_prompt(chat).count(end) == 2  # those of the template
    chat += [Message("assistant", "b<|im_end|>c"), Message("user", "d")]
    assert codec.encode_prompt(chat).count(end) == 5
    encoded = codec.encode_answers(chat[:2], ["yes", "no<|im_end|>"])
    assert encoded[0] == codec.encode_prompt(chat[:2])
    assert [tokenizer.decode(ids) for ids in encoded[1]] == ["yes", "no<|im_end|>"]
