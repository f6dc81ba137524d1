"""What a reader sees: whole characters, no stop texts, and nothing lost."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.infer.text import UNFINISHED, Pieces, TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tokenizers.load(tiny.tokenizer(tmp_path_factory.mktemp("text") / "tokenizer"))


def sentencepiece() -> PreTrainedTokenizerFast:
    """A vocabulary with bytes to fall back on and spaces as Llama 2 has them."""
    words = ["<unk>", "▁the", "▁cat", "s", "▁"]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(token) for token in ids), stream.end()]


def test_characters_come_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "你好 the cat 🙂👩‍👩‍👧 é"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # most characters are several tokens
    released = pieces(TextStream(tokenizer), ids)
    assert "".join(released) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in released)
    assert released[0] == ""


@given(ids=st.lists(st.integers(0, 279), max_size=40))
def test_any_tokens_give_the_text_of_all(
    tokenizer: PreTrainedTokenizerFast, ids: list[int]
) -> None:
    expected = tokenizer.decode(ids, skip_special_tokens=True).rstrip(UNFINISHED)
    assert "".join(pieces(TextStream(tokenizer), ids)) == expected


@pytest.mark.parametrize("missing", [1, 2])
def test_a_text_that_is_cut_off_ends_with_a_whole_character(
    tokenizer: PreTrainedTokenizerFast, missing: int
) -> None:
    ids = tokenizer.encode("the cat 你好", add_special_tokens=False)
    assert tokenizer.decode(ids[:-missing]).endswith(UNFINISHED)
    released = pieces(TextStream(tokenizer, ["never"]), ids[:-missing])
    assert "".join(released) == "the cat 你"


PARTS = [[1], [2], [3], [4], *([5 + byte for byte in text.encode()] for text in "é你🙂")]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=30))
def test_vocabularies_that_strip_the_first_space(parts: list[list[int]]) -> None:
    tokenizer, ids = sentencepiece(), [token for part in parts for token in part]
    expected = tokenizer.decode(ids).rstrip(UNFINISHED)
    assert "".join(pieces(TextStream(tokenizer), ids)) == expected


TEXTS = st.text(alphabet="abcE你", max_size=24)


@given(text=TEXTS, stop=st.lists(st.text(alphabet="abE你", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_text(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]
) -> None:
    stream = TextStream(tokenizer, stop)
    released, emitted = [], ""
    for token in tokenizer.encode(text, add_special_tokens=False):
        released.append(stream.add(token))
        emitted += released[-1]
        assert not any(one in emitted for one in stop)
        if stream.stopped:
            break
    released.append(stream.end())
    # The one that is complete first counts; of those that are so at once, the longest.
    ends = [(at + len(one), at) for one in stop if (at := text.find(one)) >= 0]
    assert "".join(released) == (text[: min(ends)[1]] if ends else text)
    assert stream.stopped == bool(ends)


def test_a_stop_text_that_does_not_come_is_released(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, ["END"])
    ids = tokenizer.encode("aEN", add_special_tokens=False)
    assert pieces(stream, ids) == ["a", "", "", "EN"]


def test_tokens_as_text_and_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = Pieces(tokenizer)
    ids = tokenizer.encode("你 the", add_special_tokens=False)
    assert bytes(b for token in ids for b in pieces.bytes(token)).decode() == "你 the"
    end = tokenizer.convert_tokens_to_ids(tokenizers.TURN_END)
    assert isinstance(end, int)
    assert (pieces.text(end), bytes(pieces.bytes(end))) == (tokenizers.TURN_END, b"<|im_end|>")
    sentencepieces = Pieces(sentencepiece())
    assert sentencepieces.bytes(5 + 0xE4) == [0xE4]
    assert bytes(sentencepieces.bytes(1)) == b"the"
