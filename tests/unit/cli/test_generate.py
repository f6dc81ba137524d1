from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import tiny_runs
import torch
from safetensors.torch import load_file

from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import Message
from minigpt.data.tokenizer import CHAT_TEMPLATE
from minigpt.infer.continuous_batch import ContinuousBatch
from minigpt.infer.engine import Delta, Engine, Sampling
from minigpt.infer.native import NativeDecoder
from minigpt.model.cached import TransformersDecoder

Minigpt = Callable[..., Any]
SHORT = ("--max_new_tokens", "6")


class Call(NamedTuple):
    """A call of the engine, and the texts that it yielded."""

    engine: Engine
    prompt: str | Sequence[Message]
    sampling: Sampling
    texts: list[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls of the engine, with its real replies."""
    recorded: list[Call] = []
    stream = Engine.stream

    def spy(self: Engine, prompt: Any, sampling: Sampling) -> Iterator[Delta]:
        recorded.append(Call(self, prompt, sampling, []))
        for delta in stream(self, prompt, sampling):
            recorded[-1].texts.append(delta.text)
            yield delta

    monkeypatch.setattr(Engine, "stream", spy)
    return recorded


USER, SYSTEM = Message("user", "the cat"), Message("system", "a dog")


@pytest.mark.parametrize(
    ("args", "prompts"),
    [
        (["--prompt", "the cat"], (USER,)),
        (["--prompt", "the cat", "--system", "a dog"], (SYSTEM, USER)),
        (["--prompt", "the cat", "--text"], "the cat"),
    ],
)
def test_the_engine_gets_the_prompt_of_the_options(
    minigpt: Minigpt, trained: Path, calls: list[Call], args: list[str], prompts: object
) -> None:
    outcome = minigpt("generate", "--model", trained / "sft", *args, *SHORT)
    assert (outcome.status, outcome.err) == (0, "")
    (call,) = calls
    assert call.prompt == prompts
    assert outcome.out == "".join(call.texts) + "\n"
    assert len(call.texts) > 1
    assert call.sampling == Sampling(max_new_tokens=6)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_prompt_from_standard_input(
    minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch, trained: Path, calls: list[Call]
) -> None:
    stdin(monkeypatch, "你好 cat\n".encode())
    assert minigpt("generate", "--model", trained / "sft", *SHORT).status == 0
    assert calls[0].prompt == (Message("user", "你好 cat"),)


def test_sampling_options(minigpt: Minigpt, trained: Path, calls: list[Call]) -> None:
    free = ["--temperature", 0.5, "--top_k", 3, "--top_p", 0.9, "--seed", 4, *SHORT]
    free += ["--min_p", 0.1, "--repetition_penalty", 1.2, "--stop", "x", "--stop", "yz"]
    assert minigpt("generate", "--model", trained / "sft", "--prompt", "a", *free).status == 0
    assert calls[0].sampling == Sampling(6, 0.5, 3, 0.9, 4, 0.1, 1.2, ("x", "yz"))
    assert calls[0].engine.model.dtype == torch.float32


def test_weights_may_be_smaller(minigpt: Minigpt, trained: Path, calls: list[Call]) -> None:
    for weights in ("bf16", "int8"):
        args = ("--model", trained / "sft", "--prompt", "a", "--weights", weights, *SHORT)
        assert minigpt("generate", *args).status == 0
    assert calls[0].engine.model.dtype == torch.bfloat16
    assert [call.engine.int8 for call in calls] == [False, True]


def test_a_file_of_text_is_the_prompt(
    minigpt: Minigpt, trained: Path, tmp_path: Path, calls: list[Call]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("你好\n the cat\n", encoding="utf-8")
    assert minigpt("generate", "--model", trained / "sft", "--file", file, *SHORT).status == 0
    assert calls[0].prompt == (Message("user", "你好\n the cat"),)


@pytest.mark.parametrize("more", [(), ("--text",), ("--system", "a dog")])
def test_a_file_of_rows_is_completed_row_by_row(
    minigpt: Minigpt, trained: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    chat = [{"role": "system", "content": "猫"}, {"role": "user", "content": "a mat"}]
    rows: list[Any] = [{"prompt": "the cat", "mark": 1}, {"messages": chat}, {"prompt": "a log"}]
    tiny_runs.write_jsonl(file := tmp_path / "prompts.jsonl", rows)
    outcome = minigpt("generate", "--model", trained / "sft", "--file", file, *more, *SHORT)
    assert (outcome.status, outcome.err) == (0, "")
    rows_out = [json.loads(line) for line in outcome.out.splitlines()]
    assert [{k: v for k, v in row.items() if k != "completion"} for row in rows_out] == rows
    before = (SYSTEM,) if "--system" in more else ()
    messages = tuple(Message(turn["role"], turn["content"]) for turn in chat)
    prompts: list[Any] = [
        text if "--text" in more else (*before, Message("user", text))
        for text in ("the cat", "a log")
    ]
    prompts.insert(1, messages)
    replies = Engine.load(trained / "sft").complete(prompts, Sampling(max_new_tokens=6))
    assert [row["completion"] for row in rows_out] == [reply.text for reply in replies]


def test_prompts_of_tables(minigpt: Minigpt, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt,id\nthe cat,1\n")
    (folder / "b.tsv").write_text("prompt\tid\na dog\t2\n")
    for given, ids in ((folder / "a.csv", "1"), (folder, "12"), (f"{folder}/*.tsv", "2")):
        outcome = minigpt("generate", "--model", trained / "sft", "--file", given, *SHORT)
        assert outcome.status == 0
        rows = [json.loads(line) for line in outcome.out.splitlines()]
        assert [row["id"] for row in rows] == list(ids)
        assert all("completion" in row for row in rows)


def test_rows_are_printed_as_they_are_done(
    minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch, trained: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": text} for text in ("the cat and a dog", "a log", "rain")]
    tiny_runs.write_jsonl(file := tmp_path / "prompts.jsonl", rows)
    monkeypatch.setattr("minigpt.infer.engine.SLOTS", {"cpu": 1})
    ended, step = [], ContinuousBatch.step

    def interrupted(self: ContinuousBatch) -> list[Delta]:
        if len(ended) == 2:
            raise KeyboardInterrupt
        deltas = step(self)
        ended.extend(delta for delta in deltas if delta.finish)
        return deltas

    monkeypatch.setattr(ContinuousBatch, "step", interrupted)
    outcome = minigpt("generate", "--model", trained / "sft", "--file", file, *SHORT)
    assert (outcome.status, outcome.err) == (130, "minigpt: interrupted\n")
    rows_out = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["prompt"] for row in rows_out] == ["the cat and a dog", "a log"]


def test_replies_come_in_order_whatever_ends_first(
    monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    engine = Engine.load(trained / "sft")
    prompts = ["the cat " * n for n in (9, 1, 5, 2, 7)]
    sampling = [Sampling(n) for n in (1, 9, 2, 6, 3)]
    expected = engine.complete(prompts, sampling)
    monkeypatch.setattr("minigpt.infer.engine.SLOTS", {"cpu": 2})
    assert list(engine.replies(prompts, sampling)) == expected
    assert not engine.complete([], Sampling())


def test_sampling_is_seeded(minigpt: Minigpt, trained: Path) -> None:
    def generate(seed: int) -> str:
        free = ("--temperature", "5", "--seed", seed, "--max_new_tokens", "20")
        return str(minigpt("generate", "--model", trained / "sft", "--prompt", "a", *free).out)

    assert generate(1) == generate(1) != generate(2)


@pytest.mark.parametrize("form", ["--model {lora}", "--model {sft} --adapter {lora}"])
def test_adapter_is_merged(minigpt: Minigpt, trained: Path, calls: list[Call], form: str) -> None:
    models = form.format(lora=trained / "lora", sft=trained / "sft").split()
    assert minigpt("generate", *models, "--prompt", "the cat", *SHORT).status == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    base = Engine.load(trained / "sft").model.state_dict()[name]
    adapter = load_file(trained / "lora" / "hf" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name.replace('weight', f'lora_{x}.weight')}"] for x in "AB")
    merged = calls[0].engine.model.state_dict()[name]
    torch.testing.assert_close(merged, base + 4 * b @ a)  # alpha 32, r 8
    assert not torch.equal(merged, base)


def test_an_adapter_beside_the_weights_says_the_same(trained: Path) -> None:
    prompts, sampling = ["the cat", "a dog and", "rain"], Sampling(max_new_tokens=12)
    merged = Engine.load(trained / "lora")
    beside = Engine.load(trained / "lora", merged=False)
    assert (type(merged.decoder()), type(beside.decoder())) == (NativeDecoder, TransformersDecoder)
    assert beside.complete(prompts, sampling) == merged.complete(prompts, sampling)


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
        (("--model", "sft", "--prompt", "a", "--min_p", "1"), ["min_p must lie in [0, 1)"]),
        (("--model", "sft", "--prompt", "a", "--stop", ""), ["stop text must not be empty"]),
        (("--model", "sft", "--prompt", "a", "--file", "b"), ["not allowed with"]),
        (("--model", "sft", "--file", "none.txt"), ["Cannot read none.txt: No such file"]),
        (("--model", "sft", "--file", "none.jsonl"), ["none.jsonl: cannot be read: No such file"]),
        (("--model", "sft", "--file", "long.jsonl"), ["Prompt 2: ", "context length is 128"]),
        (("--model", "sft", "--prompt", "a " * 200), ["the model's context length is 128"]),
        (("--model", "sft", "--prompt", "a", "--weights", "int4"), ["invalid choice: 'int4'"]),
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
    tiny_runs.write_jsonl(trained / "long.jsonl", [{"prompt": "a"}, {"prompt": "a " * 200}])
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
    models = ("--model", other, "--adapter", trained / "lora")
    outcome = minigpt("generate", *models, "--prompt", "a")
    assert outcome.status == 2
    assert "was trained on other weights" in outcome.err


def test_model_without_a_template_continues_text_only(minigpt: Minigpt, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tiny.model("llama").save_pretrained(plain)
    tiny.tokenizer(plain, template=False)
    assert minigpt("generate", "--model", plain, "--text", "--prompt", "a", *SHORT).status == 0
    outcome = minigpt("generate", "--model", plain, "--prompt", "a")
    assert outcome.status == 2
    assert "no chat template" in outcome.err


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE + "{# of others #}"])
def test_a_users_message_opens_no_turn(
    minigpt: Minigpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    model = tmp_path / "model"
    tiny.model("qwen3").save_pretrained(model)
    tokenizer = tokenizers.load(tiny.tokenizer(model))
    tokenizer.chat_template = template
    tokenizers.save(tokenizer, model)
    prompts = tiny.recorded_prompts(monkeypatch)
    assert minigpt("generate", "--model", model, "--prompt", tiny.FORGED, *SHORT).status == 0
    assert prompts == [tiny.asked_as_text(tokenizer, tiny.FORGED)]


def test_a_model_whose_layers_have_states_completes_a_file(
    minigpt: Minigpt, tmp_path: Path
) -> None:
    model = tmp_path / "lfm2"
    tiny.model("lfm2", layer_types=["conv", "full_attention"]).save_pretrained(model)
    tiny.tokenizer(model)
    prompts = ["the cat", "a dog sits on the mat and then"]
    tiny_runs.write_jsonl(file := tmp_path / "prompts.jsonl", [{"prompt": p} for p in prompts])
    options = ("--file", file, "--temperature", "0", *SHORT)
    outcome = minigpt("generate", "--model", model, *options)
    assert outcome.status == 0, outcome.err
    engine = Engine.load(model)
    alone = [
        engine.complete([[Message("user", prompt)]], Sampling(6, temperature=0))[0].text
        for prompt in prompts
    ]
    assert [json.loads(line)["completion"] for line in outcome.out.splitlines()] == alone


def test_tokenizer_larger_than_the_model(minigpt: Minigpt, trained: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    tiny.model("qwen3", vocab_size=300).save_pretrained(small)
    for file in (trained / "tokenizer").iterdir():
        (small / file.name).write_bytes(file.read_bytes())
    outcome = minigpt("generate", "--model", small, "--prompt", "a")
    assert outcome.status == 2
    assert "The tokenizer has 320 tokens but the model only 300" in outcome.err
