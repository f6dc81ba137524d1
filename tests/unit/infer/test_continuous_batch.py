"""Continuous batching: the same ids as transformers, alone and together with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ConfigError, ModelError
from minigpt.infer.continuous_batch import ContinuousBatch, Delta
from minigpt.infer.engine import Engine, Sampling
from minigpt.infer.native import FusedWeights, NativeDecoder, is_native
from minigpt.model.cached import TransformersDecoder

NATIVE = ("qwen3", "llama")
OTHERS = ("qwen2", "gpt2", "gemma2", "mistral")
TIE = 1e-4  # logits closer than this may come in either order


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tokenizers.load(tiny.tokenizer(tmp_path_factory.mktemp("infer") / "tokenizer"))


def endless(family: str, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Engine:
    """An engine whose replies end at their longest length only."""
    model = tiny.model(family, **changes)
    model.config._attn_implementation = "sdpa" if family != "gemma2" else "eager"
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    engine = Engine(model, tokenizer)
    engine.ends = set()
    return engine


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=rng).tolist()
    return [torch.randint(4, 280, (n,), generator=rng).tolist() for n in lengths]


def decode(
    engine: Engine, ids: Sequence[list[int]], samplings: Sequence[Sampling], slots: int
) -> list[list[Delta]]:
    batch = ContinuousBatch(engine, slots)
    deltas: dict[int, list[Delta]] = {
        batch.add(prompt, sampling): [] for prompt, sampling in zip(ids, samplings, strict=True)
    }
    while not batch.idle:
        step = batch.step()
        assert len(step) <= slots
        for delta in step:
            deltas[delta.request].append(delta)
    return list(deltas.values())


def ids_of(deltas: Sequence[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.ids]


def generate(model: PreTrainedModel, prompts: Sequence[list[int]], **options: Any) -> Any:
    """Return what transformers' `generate` decodes, padded on the left."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[1] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    options = {"do_sample": False, "pad_token_id": 1, **options}
    out: Any = model.generate(tokens, attention_mask=mask, **options)  # type: ignore[operator]
    return out[:, longest:].tolist()


@torch.no_grad()
def same_up_to_a_tie(
    model: PreTrainedModel, prompt: list[int], ours: list[int], other: list[int]
) -> bool:
    for at, (a, b) in enumerate(zip(ours, other, strict=True)):
        if a != b:
            logits = model(torch.tensor([prompt + ours[:at]])).logits[0, -1]
            return bool((logits[a] - logits[b]).abs() < TIE)
    return True


@pytest.mark.parametrize(
    ("family", "count"), [*((f, 200) for f in NATIVE), *((f, 40) for f in OTHERS)]
)
def test_greedy_ids_are_those_of_transformers(
    family: str, count: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine, prompt_ids = endless(family, tokenizer), prompts(count)
    decoder = NativeDecoder if family in NATIVE else TransformersDecoder
    assert isinstance(engine.decoder(), decoder)
    decoded = decode(engine, prompt_ids, [Sampling(max_new_tokens=12)] * count, slots=7)
    expected: list[list[int]] = []
    for start in range(0, count, 40):
        expected += generate(engine.model, prompt_ids[start : start + 40], max_new_tokens=12)
    for prompt, deltas, other in zip(prompt_ids, decoded, expected, strict=True):
        assert same_up_to_a_tie(engine.model, prompt, ids_of(deltas), other)
    assert len({tuple(ids_of(deltas)) for deltas in decoded}) > count / 4  # not all are the same


def test_untied_heads_and_bf16_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = endless("llama", tokenizer, tie_word_embeddings=False)
    prompt_ids = prompts(8)
    samplings = [Sampling(max_new_tokens=6)] * 8
    exact = decode(engine, prompt_ids, samplings, slots=8)
    assert [ids_of(d) for d in exact] == generate(engine.model, prompt_ids, max_new_tokens=6)
    engine.model.to(torch.bfloat16)  # type: ignore[arg-type]
    rough = decode(engine, prompt_ids, samplings, slots=8)
    near = [a == b for e, r in zip(exact, rough, strict=True) for a, b in zip(e, r, strict=True)]
    assert sum(near) > len(near) / 2
    with torch.autocast("cpu", torch.bfloat16):
        decoder: Any = engine.decoder()
    assert decoder.weights.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_steps_have_the_logits_of_the_model(
    family: str, rows: int, dtype: torch.dtype, off: float, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = endless(family, tokenizer).model
    prompt_ids = [[5, 9, 7], [8] * 9, [6, 5]][:rows]
    decoder = NativeDecoder(FusedWeights(model, dtype))
    decoder.admit(prompt_ids)
    for token in (11, 12, 13):
        prompt_ids = [[*ids, token] for ids in prompt_ids]
        logits = decoder.step([token] * rows).float()
        expected = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in prompt_ids])
        assert float((logits - expected).abs().max()) < off * float(expected.abs().max())


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_prompts_read_in_pieces_have_the_logits_of_the_model(
    family: str, dtype: torch.dtype, off: float, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = endless(family, tokenizer).model
    prompt_ids = [list(range(5, 105)), [6, 5, 9]]  # more positions than a cache begins with
    decoder = NativeDecoder(FusedWeights(model, dtype))
    for start in (0, 30, 60):
        decoder.read(prompt_ids[0][start : start + 30])
    outputs = [decoder.admit(prompt_ids, [2, 1]), decoder.step([11] * 3)]
    rows = [prompt_ids[0], *prompt_ids]
    for logits, ids in zip(outputs, (rows, [[*row, 11] for row in rows]), strict=True):
        expected = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in ids])
        assert float((logits.float() - expected).abs().max()) < off * float(expected.abs().max())


def test_long_prompts_hold_up_no_row(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = endless("qwen3", tokenizer, max_position_embeddings=256)
    short, long, last = [5, 9, 7], list(range(5, 85)), list(range(50, 100))
    alone = [ids_of(decode(engine, [ids], [Sampling(20)], 1)[0]) for ids in (short, long, last)]
    batch = ContinuousBatch(engine, 4, prefill=16)
    first = batch.add(short, Sampling(20))
    batch.add(list(range(90, 190)), Sampling(20))
    replies: dict[int, list[int]] = {first: [], batch.add(long, Sampling(20)): []}
    steps = []
    while not batch.idle:
        if len(steps) == 3:  # in the midst of the second prompt
            batch.cancel(2)
            replies[batch.add(last, Sampling(20))] = []
        steps.append(batch.step())
        for delta in steps[-1]:
            replies[delta.request] += delta.ids
    assert list(replies.values()) == alone
    assert [[delta.request for delta in step] for step in steps[:7]] == [[first]] * 7
    assert [len(step) for step in steps].count(3) > 5  # they end up together


def test_a_long_prompt_alone_is_read_in_several_steps(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = ContinuousBatch(endless("llama", tokenizer), 1, prefill=16)
    number = batch.add(list(range(5, 45)), Sampling(1))
    assert [batch.step(), batch.step()] == [[], []]
    assert [(delta.request, delta.finish) for delta in batch.step()] == [(number, "length")]
    assert batch.idle


def test_decoding_a_row_in_bf16_leaves_the_process_as_it_was(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = NativeDecoder(FusedWeights(endless("qwen3", tokenizer).model, torch.bfloat16))
    decoder.admit([[5, 9, 7]])
    enabled = []

    def fails(*args: Any, **kwargs: Any) -> None:
        enabled.append(torch.backends.mkldnn.enabled)
        raise RuntimeError("a matmul failed")

    monkeypatch.setattr(decoder.weights, "forward", fails)
    with pytest.raises(RuntimeError, match="a matmul failed"):
        decoder.step([11])
    assert [*enabled, torch.backends.mkldnn.enabled] == [False, True]


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_reply_does_not_depend_on_other_requests(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine, prompt_ids = endless(family, tokenizer), prompts(9)
    samplings = [
        Sampling(
            max_new_tokens=4 + n,
            temperature=0.3 * n,
            top_k=(0, 20)[n % 2],
            top_p=(1.0, 0.9, 0.8)[n % 3],
            min_p=(0.0, 0.01)[n % 2],
            repetition_penalty=(1.0, 1.3)[n // 2 % 2],
            seed=n,
        )
        for n in range(9)
    ]
    together = decode(engine, prompt_ids, samplings, slots=4)
    for prompt, sampling, deltas in zip(prompt_ids, samplings, together, strict=True):
        (alone,) = decode(engine, [prompt], [sampling], slots=1)
        assert ids_of(alone) == ids_of(deltas)
        assert "".join(d.text for d in alone) == "".join(d.text for d in deltas)
        assert len(ids_of(alone)) == sampling.max_new_tokens
    (other,) = decode(engine, prompt_ids[-1:], [Sampling(12, 2.4, seed=99)], slots=1)
    assert ids_of(other) != ids_of(together[-1])


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_what_fails_for_one_request_ends_it_alone(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine, prompt_ids = endless(family, tokenizer), prompts(5)
    alone = [ids_of(decode(engine, [p], [Sampling(8)], 1)[0]) for p in prompt_ids]
    batch = ContinuousBatch(engine, 5)
    numbers = [batch.add(ids, Sampling(8)) for ids in prompt_ids]
    deltas: dict[int, list[Delta]] = {number: [] for number in numbers}

    def step() -> None:
        for delta in batch.step():
            deltas[delta.request].append(delta)

    step()
    decode_step = batch._decoder.step
    damaged = batch._rows[1].number

    def with_nan(tokens: Sequence[int]) -> torch.Tensor:
        logits = decode_step(tokens).clone()
        rows = [row for row, request in enumerate(batch._rows) if request.number == damaged]
        logits[rows, 3] = torch.nan
        return logits

    def failing(token: int) -> str:
        raise ValueError("no such token")

    batch._decoder.step = with_nan  # type: ignore[method-assign]
    batch._rows[3].stream.add = failing  # type: ignore[method-assign]
    while not batch.idle:
        step()
    ends = [deltas[number][-1] for number in numbers]
    assert [end.finish for end in ends] == ["length", "error", "length", "error", "length"]
    assert "not finite" in str(ends[1].error)
    assert "no such token" in str(ends[3].error)
    for row in (0, 2, 4):
        assert ids_of(deltas[numbers[row]]) == alone[row]


def test_replies_of_a_damaged_model_are_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = endless("qwen3", tokenizer)
    with torch.no_grad():
        next(engine.model.parameters()).fill_(torch.nan)
    for sampling in (Sampling(4), Sampling(4, temperature=1.0)):
        with pytest.raises(ModelError, match="not finite"):
            engine.complete(["the cat"], sampling)
        with pytest.raises(ModelError, match="not finite"):
            list(engine.stream("the cat", sampling))


def test_repetition_penalty_is_that_of_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, prompt_ids = endless("qwen3", tokenizer), prompts(12)
    sampling = Sampling(max_new_tokens=12, repetition_penalty=1.7)
    together = [ids_of(deltas) for deltas in decode(engine, prompt_ids, [sampling] * 12, slots=12)]
    alone = [
        generate(engine.model, [a], max_new_tokens=12, repetition_penalty=1.7) for a in prompt_ids
    ]
    assert together == [ids for (ids,) in alone]


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_requests_come_go_and_are_cancelled(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine, prompt_ids = endless(family, tokenizer), prompts(6)
    alone = [ids_of(decode(engine, [p], [Sampling(10)], 1)[0]) for p in prompt_ids]
    batch = ContinuousBatch(engine, 3)
    decoded: dict[int, list[int]] = {}

    def step() -> None:
        for delta in batch.step():
            decoded.setdefault(delta.request, []).extend(delta.ids)

    first = [batch.add(ids, Sampling(10)) for ids in prompt_ids[:3]]
    step()
    late = [batch.add(ids, Sampling(10)) for ids in prompt_ids[3:]]
    batch.cancel(first[0])  # active; the last row moves to its slot
    batch.cancel(late[2])  # waiting
    batch.cancel(99)
    while not batch.idle:
        step()
    assert batch.step() == []
    finished = dict(zip([*first[1:], *late[:2]], alone[1:5], strict=True))
    assert decoded == {first[0]: alone[0][:1], **finished}


def test_a_prompt_must_fit_the_context_and_the_reply_is_cut_to_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    engine = endless("qwen3", tokenizer, max_position_embeddings=32)
    assert engine.context == 32
    with pytest.raises(ConfigError, match="32 tokens, but the model's context length is 32"):
        ContinuousBatch(engine, 1).add([5] * 32, Sampling())
    (deltas,) = decode(engine, [[5] * 31], [Sampling(max_new_tokens=9)], 1)
    assert (len(ids_of(deltas)), deltas[-1].finish) == (1, "length")
    (deltas,) = decode(engine, [[5] * 20], [Sampling(max_new_tokens=99)], 1)
    assert len(ids_of(deltas)) == 12


def test_the_cache_is_freed_when_there_is_nothing_to_do(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    batch = ContinuousBatch(endless("qwen3", tokenizer, max_position_embeddings=512), 8)
    decoder = batch._decoder
    assert isinstance(decoder, NativeDecoder)
    steps = []
    for _ in range(2):
        numbers = [batch.add([5] * n, Sampling(max_new_tokens=4)) for n in (400, *range(3, 10))]
        steps.append([delta.ids for delta in batch.step()])
        assert decoder.caches[0].shape[1:4:2] == (8, 464)
        batch.cancel(numbers[0])
        while not batch.idle:
            batch.step()
        assert decoder.caches == []
    assert steps[0] == steps[1]


@torch.no_grad()
def test_logprobs_are_those_of_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, prompt = endless("qwen3", tokenizer), prompts(1)[0]
    sampling = Sampling(max_new_tokens=5, temperature=2.0, top_k=3, seed=3, logprobs=4)
    quiet = Sampling(max_new_tokens=5, logprobs=0)
    deltas, greedy, none = decode(engine, [prompt] * 3, [sampling, quiet, Sampling(5)], 3)
    logits = engine.model(torch.tensor([prompt + ids_of(deltas)])).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    for row, delta in zip(expected, deltas, strict=True):
        (logprob,) = delta.logprobs
        assert [logprob.id] == delta.ids
        assert logprob.logprob == pytest.approx(float(row[logprob.id]), abs=1e-4)
        best = row.topk(4)
        assert [index for index, _, _ in logprob.top] == best.indices.tolist()
        assert [v for *_, v in logprob.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert logprob.token == tokenizer.decode([logprob.id])
    assert [delta.logprobs[0].top for delta in greedy] == [[]] * 5
    assert [delta.logprobs for delta in none] == [[]] * 5


def test_logprobs_of_a_stop_text_are_not_returned(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, sampling = (
        endless("qwen3", tokenizer),
        Sampling(16, temperature=1.0, seed=1, logprobs=0),
    )
    (full,) = engine.complete(["the cat"], sampling)
    text, counts = full.text, set[int]()
    assert full.logprobs is not None
    for at in range(len(text)):
        (reply,) = engine.complete(["the cat"], replace(sampling, stop=(text[at : at + 3],)))
        texts = [tokenizer.decode(reply.ids[:i]).rstrip("\ufffd") for i in range(len(reply.ids))]
        count = sum(len(before) < len(reply.text) for before in texts)
        assert reply.logprobs == full.logprobs[:count]
        counts.add(len(reply.ids) - count)
    assert {0, 1, 2} <= counts  # 0: a stop text that begins inside the last token


def test_int8_weights_are_near_the_exact_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.model("qwen3", hidden_size=64, intermediate_size=128)
    prompt, following = [5, 6, 7, 8], list(range(9, 40))
    logits = []
    for int8 in (False, True):
        decoder = NativeDecoder(FusedWeights(model, torch.float32, int8))
        rows = [decoder.admit([prompt])] + [decoder.step([token]) for token in following]
        logits.append(torch.cat(rows))
    assert torch.equal(logits[0][0], logits[1][0])  # prompts are read with the exact weights
    assert not torch.equal(*logits)
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert error < 0.05
    assert Engine(model, tokenizer, int8=True).complete(["a"], Sampling(3))[0].ids
    with pytest.raises(ConfigError, match="int8 weights are for Qwen3 and Llama"):
        Engine(tiny.model("gpt2"), tokenizer, int8=True)


def test_models_that_native_decoding_does_not_support() -> None:
    assert is_native(tiny.model("qwen3"))
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    assert not is_native(tiny.model("qwen3", **windows))
    assert not is_native(tiny.model("llama", attention_bias=True))
    assert not is_native(tiny.model("llama", hidden_act="gelu"))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not is_native(tiny.model("llama", rope_parameters=dynamic))


def test_weights_changed_between_calls_are_seen(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = endless("qwen3", tokenizer)
    engine.model.train()
    engine.model.config._attn_implementation = "minigpt_packed"
    before = engine.complete(["the cat"], Sampling(8))[0].ids
    assert engine.complete(["the cat"], Sampling(8))[0].ids == before
    with torch.no_grad():
        for weight in engine.model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    after = engine.complete(["the cat"], Sampling(8))[0].ids
    assert after == endless_copy(engine, tokenizer).complete(["the cat"], Sampling(8))[0].ids
    assert after != before
    assert engine.model.training
    assert engine.model.config._attn_implementation == "minigpt_packed"


def endless_copy(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> Engine:
    fresh = endless("qwen3", tokenizer)
    fresh.model.load_state_dict(engine.model.state_dict())
    return fresh
