from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from safetensors.torch import load_file

from minigpt.data.records import Message
from minigpt.infer.engine import Engine, Reply, Sampling

Minigpt = Callable[..., Any]
SHORT = ("--max_new_tokens", "6")


class Call(NamedTuple):
    """What the engine was asked, and which engine."""

    engine: Engine
    prompts: Sequence[str | Sequence[Message]]
    sampling: Sampling
    replies: list[Reply]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is asked of the engine, and its true replies."""
    made: list[Call] = []
    complete = Engine.complete

    def spy(self: Engine, prompts: Any, sampling: Sampling) -> list[Reply]:
        replies = complete(self, prompts, sampling)
        made.append(Call(self, prompts, sampling, replies))
        return replies

    monkeypatch.setattr(Engine, "complete", spy)
    return made


USER, SYSTEM = Message("user", "the cat"), Message("system", "a dog")


@pytest.mark.parametrize(
    ("args", "asked"),
    [
        (["--prompt", "the cat"], (USER,)),
        (["--prompt", "the cat", "--system", "a dog"], (SYSTEM, USER)),
        (["--prompt", "the cat", "--text"], "the cat"),
    ],
)
def test_what_is_asked_is_what_was_given(
    minigpt: Minigpt, trained: Path, calls: list[Call], args: list[str], asked: object
) -> None:
    outcome = minigpt("generate", "--model", trained / "sft", *args, *SHORT)
    assert (outcome.status, outcome.err) == (0, "")
    (call,) = calls
    assert list(call.prompts) == [asked]
    assert outcome.out == call.replies[0].text + "\n"
    assert call.sampling == Sampling(max_new_tokens=6)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_prompt_from_standard_input(
    minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch, trained: Path, calls: list[Call]
) -> None:
    stdin(monkeypatch, "你好 cat\n".encode())
    assert minigpt("generate", "--model", trained / "sft", *SHORT).status == 0
    assert list(calls[0].prompts) == [(Message("user", "你好 cat"),)]


def test_sampling_options(minigpt: Minigpt, trained: Path, calls: list[Call]) -> None:
    free = ("--temperature", 0.5, "--top_k", 3, "--top_p", 0.9, "--seed", 4, *SHORT)
    assert minigpt("generate", "--model", trained / "sft", "--prompt", "a", *free).status == 0
    assert calls[0].sampling == Sampling(6, 0.5, 3, 0.9, 4)


def test_sampling_is_seeded(minigpt: Minigpt, trained: Path) -> None:
    def said(seed: int) -> str:
        free = ("--temperature", "5", "--seed", seed, "--max_new_tokens", "20")
        return str(minigpt("generate", "--model", trained / "sft", "--prompt", "a", *free).out)

    assert said(1) == said(1) != said(2)


@pytest.mark.parametrize("form", ["--model {lora}", "--model {sft} --adapter {lora}"])
def test_adapter_is_merged(minigpt: Minigpt, trained: Path, calls: list[Call], form: str) -> None:
    places = form.format(lora=trained / "lora", sft=trained / "sft").split()
    assert minigpt("generate", *places, "--prompt", "the cat", *SHORT).status == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    base = Engine.load(trained / "sft").model.state_dict()[name]
    adapter = load_file(trained / "lora" / "hf" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name.replace('weight', f'lora_{x}.weight')}"] for x in "AB")
    merged = calls[0].engine.model.state_dict()[name]
    torch.testing.assert_close(merged, base + 4 * b @ a)  # alpha 32, r 8
    assert not torch.equal(merged, base)


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        ((), ["arguments are required: --model", "minigpt generate --help"]),
        (("--model", "sft", "--prompt", ""), ["The prompt is empty"]),
        (("--model", "sft", "--prompt", "\udcff"), ["lone surrogate", "valid UTF-8"]),
        (("--model", "sft", "--system", "\udcff", "--prompt", "a"), ["lone surrogate"]),
        (("--model", "./none", "--prompt", "a"), ["no trained model in ./none", "minigpt fit"]),
        (("--model", "sft", "--adapter", "none", "--prompt", "a"), ["no adapter in none", "LoRA"]),
        (("--model", "sft", "--adapter", "pretrain", "--prompt", "a"), ["no adapter in pretrain"]),
        (("--model", "sft", "--prompt", "a", "--max_new_tokens", "0"), ["at least 1, but is '0'"]),
        (("--model", "sft", "--prompt", "a", "--max_new_tokens", "x"), ["at least 1, but is 'x'"]),
        (("--model", "sft", "--prompt", "a", "--temperature", "-1"), ["temperature"]),
        (("--model", "sft", "--prompt", "a", "--top_p", "0"), ["top_p must lie in (0, 1]"]),
        (("--model", "sft", "--prompt", "a", "--topk", "5"), ["unrecognized arguments: --topk"]),
    ],
)
def test_bad_input(
    minigpt: Minigpt,
    monkeypatch: pytest.MonkeyPatch,
    trained: Path,
    args: tuple[str, ...],
    fragments: list[str],
) -> None:
    monkeypatch.chdir(trained)
    outcome = minigpt("generate", *args)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("minigpt: ")
    assert outcome.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in outcome.err


def test_standard_input_that_is_not_utf8(
    minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    stdin(monkeypatch, "你好".encode("gbk"))
    outcome = minigpt("generate", "--model", trained / "sft")
    assert outcome.status == 2
    assert outcome.err == "minigpt: The text on standard input is not UTF-8. Convert it.\n"


def test_adapter_of_another_base(minigpt: Minigpt, trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny.model("gpt2").save_pretrained(other)
    tiny.tokenizer(other)
    places = ("--model", other, "--adapter", trained / "lora")
    outcome = minigpt("generate", *places, "--prompt", "a")
    assert outcome.status == 2
    assert "was trained on another base" in outcome.err
    assert "adapter_config.json" in outcome.err


def test_model_without_a_template_continues_text_only(minigpt: Minigpt, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tiny.model("llama").save_pretrained(plain)
    tiny.tokenizer(plain, template=False)
    assert minigpt("generate", "--model", plain, "--text", "--prompt", "a", *SHORT).status == 0
    outcome = minigpt("generate", "--model", plain, "--prompt", "a")
    assert outcome.status == 2
    assert "no chat template" in outcome.err


def test_tokenizer_larger_than_the_model(minigpt: Minigpt, trained: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    tiny.model("qwen3", vocab_size=300).save_pretrained(small)
    for file in (trained / "tokenizer").iterdir():
        (small / file.name).write_bytes(file.read_bytes())
    outcome = minigpt("generate", "--model", small, "--prompt", "a")
    assert outcome.status == 2
    assert "The tokenizer has 320 tokens but the model only 300" in outcome.err
