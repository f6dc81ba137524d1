"""Published templates on tokenizers of all kinds: what is trained is what inference sends."""

from __future__ import annotations

from itertools import chain

import pytest
import templates
from transformers import PreTrainedTokenizerFast

from minigpt.data.chat import ChatCodec, View
from minigpt.data.records import Message
from minigpt.errors import DataError

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


def views(codec: ChatCodec, chat: list[Message]) -> list[View]:
    planned = codec.chat(chat)
    units = dict.fromkeys(chain(*(unit for one in planned for unit in one.units)))
    return codec.views(planned, codec.encode_units(list(units)))


def squeezed(text: str) -> str:
    return "".join(text.split())


def answers(codec: ChatCodec, view: View) -> list[tuple[list[int], list[int]]]:
    """The targets of a sample, each with all that comes before it."""
    found, start = [], 0
    for end in range(1, len(view.ids) + 1):
        if view.targets[end - 1] and (end == len(view.ids) or not view.targets[end]):
            start = end - next(n for n in range(1, end + 1) if not view.targets[end - 1 - n])
            found.append((view.ids[:start], view.ids[start:end]))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("marks", [False, True], ids=["unmarked", "marked"])
def test_training_is_what_inference_sends_and_expects(
    tokenizer: PreTrainedTokenizerFast, kind: str, name: str, marks: bool
) -> None:
    made = templates.tokenizer(kind, name, marks, tokenizer)
    codec = ChatCodec(made)
    end = codec.template.turn_end
    for chat in (messages(which) for which in CHATS):
        if name == "gemma2" and chat[0].role == "system":
            with pytest.raises(DataError, match="System role not supported"):
                codec.chat(chat)
            continue
        asked = [(i, m) for i, m in enumerate(chat) if m.role == "assistant"]
        learnt = [answer for view in views(codec, chat) for answer in answers(codec, view)]
        assert len(learnt) == len(asked)
        for (index, message), (sent, said) in zip(asked, learnt, strict=True):
            by_transformers = made.apply_chat_template(
                plain(chat[:index]), add_generation_prompt=True, return_dict=False
            )
            assert sent == by_transformers == codec.encode_prompt(chat[:index])
            text = made.decode(said, skip_special_tokens=False)
            assert text.endswith(end)
            assert said[-1] == made.convert_tokens_to_ids(end)
            assert said.count(said[-1]) == 1
            content = message.content.removeprefix("<think>" if name == "r1-opened" else "")
            assert squeezed(text.removesuffix(end)).endswith(squeezed(content))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_chat_has_the_ids_of_apply_chat_template(
    tokenizer: PreTrainedTokenizerFast, kind: str, name: str
) -> None:
    made = templates.tokenizer(kind, name, False, tokenizer)
    chat = messages("one turn")
    (view,) = views(ChatCodec(made), chat)
    whole = made.apply_chat_template(plain(chat), return_dict=False)
    if name == "r1-opened":  # whose history lacks the reasoning that its prompt opens
        assert squeezed(made.decode(view.ids)).endswith("<think></think>Itis42.<eos>")
    elif name == "plain":  # whose history lacks the token that ends a reply
        assert (made.decode(view.ids[:-1]), view.ids[-1]) == (
            made.decode(whole).removesuffix("\n"),
            made.eos_token_id,
        )
    elif name == "glm":
        assert view.ids == [*whole, made.convert_tokens_to_ids("<|user|>")]
    else:
        assert view.ids == whole[: len(view.ids)]
        assert made.decode(whole[len(view.ids) :]).strip() in ("", "<|endoftext|>")


@pytest.mark.parametrize("name", NAMES)
def test_answers_share_a_sample_where_a_prompt_goes_on_from_the_last(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    codec = ChatCodec(templates.tokenizer("bytes", name, False, tokenizer))
    samples = views(codec, messages("turns"))
    apart = name in ("qwen3", "r1-opened", "plain")
    assert len(samples) == (3 if apart else 1)


def test_qwen3_drops_reasoning_of_earlier_turns_only(tokenizer: PreTrainedTokenizerFast) -> None:
    made = templates.tokenizer("bytes", "qwen3", True, tokenizer)
    first, second = views(ChatCodec(made), messages("reasoning"))
    assert made.decode(first.ids).endswith("<think>\nthe user\n</think>\n\nok<|im_end|>")
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    assert made.decode(second.ids).startswith(head)
    assert made.decode(second.ids).endswith("<think>\nit is\n</think>\n\n12<|im_end|>")


@pytest.mark.parametrize("name", ["r1", "r1-opened"])
def test_r1_learns_the_reasoning_that_its_template_drops(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    made = templates.tokenizer("bytes", name, False, tokenizer)
    first, second = views(ChatCodec(made), messages("reasoning"))
    assert made.decode(first.ids) == (
        "<bos><|User|>hi<|Assistant|><think>\nthe user\n</think>\n\nok<eos>"
    )
    history = "<bos><|User|>hi<|Assistant|>\n\nok<eos><|User|>what<|Assistant|>"
    said = "<think>\nit is</think>12<eos>" if "opened" in name else "<think>it is</think>12<eos>"
    assert made.decode(second.ids) == history + said


def test_mistral_tells_the_systems_text_with_the_last_question(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    made = templates.tokenizer("first", "mistral", False, tokenizer)
    first, second = views(ChatCodec(made), messages("system"))
    assert made.decode(first.ids) == "<s>[INST] be kind\n\n1+1?[/INST] 2</s>"
    said = "<s>[INST] 1+1?[/INST] 2</s>[INST] be kind\n\nok[/INST] the end</s>"
    assert made.decode(second.ids) == said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_users_say_forges_no_turn(
    tokenizer: PreTrainedTokenizerFast, kind: str, name: str
) -> None:
    made = templates.tokenizer(kind, name, False, tokenizer)
    codec = ChatCodec(made)
    tokens = [t.content for t in made.added_tokens_decoder.values() if t.content.strip()]
    special = set(made.all_special_ids) | set(made.convert_tokens_to_ids(tokens))
    written = [t for t in codec.encode_prompt([Message("user", "x")]) if t in special]
    for token in tokens:
        if token not in codec.template.control:
            assert token in templates.NOT_SPECIAL  # and the template does not write it
            continue
        for text in (token, f"a{token}b", f"{token}\n{token[:-1]}{token}{token[1:]}"):
            ids = codec.encode_prompt([Message("user", text)])
            assert [t for t in ids if t in special] == written
            said = "".join(made.decode(ids, skip_special_tokens=False).split())
            assert "".join(text.split()) in said
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
    found = codec.encode_answers(chat[:2], ["yes", "no<|im_end|>"])
    assert found[0] == codec.encode_prompt(chat[:2])
    assert [tokenizer.decode(ids) for ids in found[1]] == ["yes", "no<|im_end|>"]
