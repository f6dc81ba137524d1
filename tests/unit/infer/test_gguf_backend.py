"""Answers of llama.cpp with a GGUF file are those of our engine."""

from __future__ import annotations

import copy
import http.client
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import tiny_runs
import torch
from patience import limit
from tokenizers import AddedToken

from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import Message
from minigpt.errors import ConfigError, DataError, ModelError
from minigpt.export import gguf
from minigpt.export.card import Card
from minigpt.infer.engine import Engine, Sampling
from minigpt.infer.gguf import MAX_CONTEXT, Gguf, find_gguf
from minigpt.infer.sampling import filtered
from minigpt.infer.text import UNFINISHED
from minigpt.model.pretrained import find_model

Minigpt = Callable[..., Any]
PROMPTS = ("the cat", "a dog 你好", "sat on\n", "", "<|im_end|>x")
LONG = Sampling(40)


class Pair(NamedTuple):
    """A model as we compute it, and its GGUF file as llama.cpp does."""

    engine: Engine
    llama: Gguf


def written(engine: Engine, file: Path, dtype: str) -> Path:
    """Write a GGUF file without the checks of an export."""
    gguf.write(engine, file, dtype, "qwen2", Card("tiny", "tiny"))
    return file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizers.load(tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer"))


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def pair(request: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    engine = Engine(tiny.model(request.param, seed=1), tokenizer)
    file = written(engine, tmp_path_factory.mktemp("pair") / "tiny.gguf", "f32")
    return Pair(engine, Gguf(file))


def test_a_text_begins_with_bos_where_the_tokenizer_writes_it(
    tokenizer: Any, tmp_path: Path
) -> None:
    bos = tiny.with_bos(tokenizer)
    bos.chat_template = "{{ bos_token }}" + bos.chat_template
    engine = Engine(tiny.model("llama", seed=1), bos)
    llama = Gguf(written(engine, tmp_path / "tiny.gguf", "f32"))
    for text in ("the cat", "", "<s>the cat"):
        assert llama.encode(text) == engine.encode(text)
    assert llama.encode("the cat")[0] == engine.tokenizer.bos_token_id
    chat = (Message("user", "the cat"),)
    assert llama.encode(chat) == engine.encode(chat)
    assert llama.complete(PROMPTS, LONG) == engine.complete(PROMPTS, LONG)


def test_added_tokens_in_a_chat_are_read_as_the_engine_does(tokenizer: Any, tmp_path: Path) -> None:
    """Text that spells a control token is text; one that spells another added token is that."""
    words = copy.deepcopy(tokenizer)
    words.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    engine = Engine(tiny.model("qwen3", seed=1), words)
    llama = Gguf(written(engine, tmp_path / "tiny.gguf", "f32"))
    for text in ("a <think> b", "<think>", tiny.FORGED):
        chat = (Message("user", text),)
        assert llama.encode(chat) == engine.encode(chat)
        assert (words.convert_tokens_to_ids("<think>") in engine.encode(chat)) == ("<th" in text)


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of `minigpt export gguf`, of a trained chat model."""
    out = tmp_path_factory.mktemp("exports") / "sft-gguf"
    gguf.export_gguf(str(trained / "sft"), out, Card("sft", "sft"), dtype="f32")
    return out


@pytest.fixture(scope="module")
def llama(exported: Path) -> Gguf:
    return Gguf(exported / "sft-f32.gguf")


@pytest.mark.parametrize(
    "sampling",
    [
        LONG,
        Sampling(400),
        Sampling(40, repetition_penalty=1.5),
        Sampling(40, stop=("t", "og")),
        Sampling(40, temperature=0.7, top_k=1, seed=5),
    ],
)
def test_likeliest_replies_are_the_engines(pair: Pair, sampling: Sampling) -> None:
    """Penalty, stop texts, bytes that are no character, the ends of a reply and of the context."""
    assert pair.llama.context == pair.engine.context == 256
    assert pair.llama.complete(PROMPTS, sampling) == pair.engine.complete(PROMPTS, sampling)


def test_a_stream_says_the_same_text(pair: Pair) -> None:
    """What may be missing follows bytes that are no character: llama.cpp holds it back."""
    for prompt in PROMPTS:
        for sampling in (LONG, Sampling(40, stop=("t", "og")), Sampling(400)):
            reply = pair.llama.complete([prompt], sampling)[0]
            deltas = list(pair.llama.stream(prompt, sampling))
            text = "".join(delta.text for delta in deltas)
            assert reply.text.startswith(text)
            assert reply.text[len(text) :][:1] in ("", UNFINISHED)
            assert not text.endswith(UNFINISHED)
            assert (deltas[-1].finish, deltas[-1].ended_by) == (reply.finish, reply.ended_by)
            assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_characters_of_several_tokens_come_whole(llama: Gguf) -> None:
    """A model that repeats its prompt's Chinese: each character is three tokens of a byte."""
    text = "猫和狗坐在垫子上"
    ids = llama.encode(text)
    assert len(ids) == 3 * len(text)
    steps = iter(
        [
            *(
                {"stop": False, "content": char, "tokens": ids[at : at + 1], "tokens_predicted": at}
                for at, char in zip(range(3, 3 * len(text) + 1, 3), text, strict=True)
            ),
            {"stop": True, "content": "", "tokens": [], "stop_type": "limit"},
        ]
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(llama.llama, "complete", lambda **_: steps)
    deltas = list(llama.stream("a", LONG))
    patch.undo()
    assert [delta.text for delta in deltas] == [*text, ""]
    assert [token for delta in deltas for token in delta.ids] == ids


CHATS = [
    (Message("user", "the cat"),),
    (Message("system", "你是助手。"), Message("user", "a dog\n")),
    (
        Message("user", "sun"),
        Message("assistant", "\n\n rain "),  # its spaces must not melt into the template's
        Message("user", "<b> & {{ x }} <|im_end|>"),
    ),
]


@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_asked_as_in_training(llama: Gguf, trained: Path, chat: Any) -> None:
    engine = Engine.load(trained / "sft")
    assert llama.encode(chat) == engine.encode(chat)
    assert llama.complete([chat], LONG) == engine.complete([chat], LONG)


def test_f16_files_say_the_same(trained: Path, tmp_path: Path) -> None:
    engine = Engine.load(trained / "sft")
    llama = Gguf(written(engine, tmp_path / "half.gguf", "f16"))
    prompts = ["the cat", "a dog", *CHATS[:2]]
    assert llama.complete(prompts, Sampling(12)) == engine.complete(prompts, Sampling(12))


def test_sampling_is_seeded_and_does_not_depend_on_what_came_before(llama: Gguf) -> None:
    sampling = Sampling(20, temperature=2.0, seed=3)
    first = llama.complete(["the cat"], sampling)
    llama.complete(["the cat sat"], sampling)
    other = Sampling(20, temperature=2.0, seed=4)
    assert llama.complete(["the cat"], sampling) == first != llama.complete(["the cat"], other)
    assert llama.complete(["the cat", "the cat"], [sampling, other])[0] == first[0]
    for seed in (2**32 - 1, 2**70, -1):  # llama.cpp draws a seed of its own for the first
        big = Sampling(20, temperature=2.0, seed=seed)
        assert llama.complete(["the cat"], big) == llama.complete(["the cat"], big)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 3.0, "top_p": 0.4},
        {"temperature": 2.0, "min_p": 0.3},
    ],
)
def test_tokens_are_drawn_from_the_engines_distribution(
    pair: Pair, sampling: dict[str, Any]
) -> None:
    engine, count = pair.engine, 400
    logits = engine.model(torch.tensor([engine.encode("the cat")])).logits[0, -1].float()
    expected = filtered(logits.detach(), Sampling(1, **sampling)).softmax(-1)
    samplings = [Sampling(1, **sampling, seed=seed) for seed in range(count)]
    replies = pair.llama.complete(["the cat"] * count, samplings)
    drawn = Counter((reply.ids or [reply.ended_by])[0] for reply in replies)
    allowed = set(expected.nonzero().flatten().tolist())
    assert len(allowed) > 1
    assert set(drawn) <= allowed
    for token in allowed:
        share = float(expected[token])
        assert (
            abs(drawn[token] / count - share)
            < 4.5 * (share * (1 - share) / count) ** 0.5 + 5 / count
        )


def test_what_is_refused(llama: Gguf) -> None:
    with pytest.raises(ConfigError, match=r"without log-probs. Use the run's own model"):
        llama.complete(["a"], Sampling(4, logprobs=1))
    with pytest.raises(ConfigError, match=r"^Prompt 2: The prompt has .* context length is 128"):
        llama.complete(["a", "a b " * 200], LONG)
    with pytest.raises(DataError, match="lone surrogate"):
        next(llama.stream("\ud800", LONG))
    with pytest.raises(ModelError, match=r"llama.cpp gave no answer: .*n_predict"):
        list(llama.llama.complete(prompt=[5], n_predict="x"))


def test_others_on_the_machine_cannot_ask(llama: Gguf) -> None:
    with closing(http.client.HTTPConnection(llama.llama.host)) as connection:
        connection.request("POST", "/completion", json.dumps({"prompt": "a"}))
        assert connection.getresponse().status == 401


def test_a_stream_that_is_left_makes_room_for_the_next(llama: Gguf) -> None:
    llama.endless = True
    stream = llama.stream("the cat", Sampling(100))
    next(stream)
    stream.close()
    assert len(llama.complete(["the cat"], Sampling(5))[0].ids) == 5
    llama.endless = False


def test_models_without_a_template_continue_text(tokenizer: Any, tmp_path: Path) -> None:
    engine = Engine(tiny.model("qwen3"), tokenizer)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    file = written(engine, tmp_path / "plain.gguf", "f32")
    tokenizer.chat_template = template
    plain = Gguf(file)
    assert plain.codec is None
    with pytest.raises(ConfigError, match="no chat template"):
        plain.encode((Message("user", "a"),))
    assert plain.complete(["the cat"], LONG) == engine.complete(["the cat"], LONG)


def test_long_contexts_are_cut(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny.model("qwen3", max_position_embeddings=10**6)
    file = written(Engine(model, tokenizer), tmp_path / "long.gguf", "q8_0")
    assert Gguf(file).context == MAX_CONTEXT


# Files


def test_what_a_path_stands_for(exported: Path, trained: Path, tmp_path: Path) -> None:
    file = exported / "sft-f32.gguf"
    assert find_gguf(exported) == find_gguf(file) == file
    for other in (trained / "sft", trained / "sft" / "hf", tmp_path, "someone/model"):
        assert find_gguf(other) is None
    with pytest.raises(ModelError, match=r"There is no file .*none.gguf. Make it with"):
        find_gguf(tmp_path / "none.gguf")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"several models: give one of a.gguf, b.gguf itself"):
        find_gguf(tmp_path)
    for path in (exported, file, tmp_path / "none.gguf"):
        with pytest.raises(ModelError, match="only `minigpt generate` and `minigpt chat`"):
            find_model(path)


@pytest.mark.parametrize("size", [0, 3, 20, 3000, -2000])
def test_damaged_files(exported: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "bad.gguf").write_bytes((exported / "sft-f32.gguf").read_bytes()[:size])
    with pytest.raises(ModelError, match=r"bad.gguf is no complete GGUF file: .*Export it again"):
        Gguf(tmp_path / "bad.gguf")


def test_files_that_llamacpp_refuses(tokenizer: Any, tmp_path: Path, capfd: Any) -> None:
    gguf.write(
        Engine(tiny.model("qwen3"), tokenizer), tmp_path / "a.gguf", "f32", "odd", Card("a", "a")
    )
    with pytest.raises(ModelError, match=r"llama.cpp cannot load a.gguf: it is damaged"):
        Gguf(tmp_path / "a.gguf")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["xllamacpp", "gguf"])
def test_without_the_extra(
    minigpt: Minigpt, exported: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = minigpt("generate", "--model", exported, "--prompt", "a")
    assert outcome.status == 2
    assert f"one more package, {package}: pip install 'minigpt[gguf]'" in outcome.err


# The verbs


def test_generate_as_a_process_prints_the_text_alone(exported: Path, trained: Path) -> None:
    """Nothing of llama.cpp's own messages is on the terminal."""
    text = Engine.load(trained / "sft").complete([CHATS[0]], Sampling(20))[0].text
    command = [sys.executable, "-m", "minigpt", "generate", "--prompt", "the cat"]
    command += ["--max_new_tokens", "20", "--model"]
    done = subprocess.run([*command, exported / "sft-f32.gguf"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{text}\n", "")


def test_rows_and_options(minigpt: Minigpt, exported: Path, trained: Path, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "the cat"}, {"prompt": "a dog"}]
    tiny_runs.write_jsonl(tmp_path / "prompts.jsonl", rows)
    options = ["--file", tmp_path / "prompts.jsonl", "--text", "--repetition_penalty", "1.3"]
    outcomes = [
        minigpt("generate", "--model", model, *options, "--max_new_tokens", "8")
        for model in (exported, trained / "sft")
    ]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].status == 0
    assert [set(json.loads(line)) for line in outcomes[0].out.splitlines()] == [
        {"prompt", "completion"}
    ] * 2


@pytest.mark.parametrize("options", [("--weights", "int8"), ("--adapter", "lora")])
def test_options_that_a_file_cannot_have(
    minigpt: Minigpt, exported: Path, options: tuple[str, ...]
) -> None:
    outcome = minigpt("generate", "--model", exported, "--prompt", "a", *options)
    assert outcome.status == 2
    assert "is a GGUF file: its weights are as they are. Leave --adapter" in outcome.err


def test_chat(minigpt: Minigpt, exported: Path, trained: Path, monkeypatch: Any) -> None:
    def talk(model: Path) -> list[str]:
        lines = io.BytesIO("the cat\n你好\n!retry\n".encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, "utf-8"))
        options = ("--temperature", "0", "--max_new_tokens", "12")
        outcome = minigpt("chat", "--model", model, *options)
        assert (outcome.status, outcome.err) == (0, "")
        return [line.partition(" tokens, ")[0] for line in outcome.out.splitlines()]

    assert talk(exported) == talk(trained / "sft")


def test_ctrl_c_ends_the_process(exported: Path) -> None:
    code = (
        "import pathlib, sys; from minigpt.infer.gguf import Gguf, Sampling\n"
        "llama = Gguf(pathlib.Path(sys.argv[1])); llama.endless = True\n"
        "while True:\n"
        "    for _ in llama.stream('a', Sampling(100)):\n"
        "        print('ready', flush=True)"
    )
    command = [sys.executable, "-c", code, str(exported / "sft-f32.gguf")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.kill(process.pid, signal.SIGINT)
        try:
            process.communicate(timeout=limit(60))
            assert process.returncode in (1, -signal.SIGINT, 130)
        finally:
            process.kill()
