"""Likelihoods, against the model's own plain forward."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import tiny
import torch

from minigpt.data.formats import Text
from minigpt.data.tokenizer import load
from minigpt.errors import DataError
from minigpt.evaluate import likelihood
from minigpt.evaluate.likelihood import bits_per_byte, continuation, score
from minigpt.infer.engine import Engine

PAIRS = [([5, 6, 7], [8, 9]), ([3], [4] * 12), ([40, 41], [42]), ([9] * 20, [1, 2, 3])]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer."""
    root = tmp_path_factory.mktemp("likelihood")
    tiny.tokenizer(root / "tokenizer")
    return root


def engine(root: Path, family: str = "qwen3") -> Engine:
    return Engine(tiny.model(family), load(root / "tokenizer"))


def test_answers_that_cannot_share_the_angles_of_their_prompt(root: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny.model("llama", max_position_embeddings=8, rope_parameters=rope)
    scaled = Engine(model, load(root / "tokenizer"))
    for samples in (tiny.preferences([(4, 3, 4)]), tiny.texts([32])):
        assert len(list(likelihood.batches(scaled, samples))) == 1
    for samples, limit in ((tiny.preferences([(4, 5, 3)]), 8), (tiny.texts([33]), 32)):
        with pytest.raises(DataError, match=f"tokens are more than the {limit} that the model"):
            list(likelihood.batches(scaled, samples))


def plainly(model: Engine, context: list[int], targets: list[int]) -> tuple[float, bool]:
    """Score one continuation with nothing but the model's forward."""
    with torch.no_grad():
        logits = model.model(torch.tensor([context + targets])).logits[0, len(context) - 1 : -1]
    labels = torch.tensor(targets)
    logp = logits.float().log_softmax(-1).gather(1, labels[:, None]).sum()
    return float(logp), bool((logits.argmax(-1) == labels).all())


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tokens", [4096, 8])
def test_scores_are_the_models_own(
    root: Path, monkeypatch: pytest.MonkeyPatch, family: str, tokens: int
) -> None:
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", tokens)
    model = engine(root, family)
    pairs = list(PAIRS)
    with torch.no_grad():  # one that greedy decoding would say
        best = int(model.model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    pairs.append(([5, 6, 7], [best]))
    sums, greedy = map(list, zip(*score(model, pairs), strict=True))
    expected = [plainly(model, *pair) for pair in pairs]
    assert sums == pytest.approx([logp for logp, _ in expected], abs=1e-4)
    assert greedy == [same for _, same in expected]
    assert greedy[-1]


def test_a_sample_longer_than_the_model_reads_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"257 tokens are more than the 256 .*Shorten the row"):
        score(engine(root), [([1], [2] * 256)], "x.jsonl")


def test_a_token_across_the_border_belongs_to_the_continuation(root: Path) -> None:
    model = engine(root)
    ids = model.encode("the cat")
    assert continuation(model, "the", " cat") == (model.encode("the"), ids[1:])
    for cut in range(1, 7):
        start, targets = continuation(model, "the cat"[:cut], "the cat"[cut:])
        assert start + targets in (ids, model.encode("") + ids)
        assert targets
    assert continuation(model, "", "the cat") == (model.encode(""), ids)


def test_bits_per_byte_of_text(root: Path, tmp_path: Path) -> None:
    model = engine(root)
    texts = ["the cat sat on the log", "猫 sat", "the dog"]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    nats, size, tokens = 0.0, 0, 0
    for text in texts:
        ids = [*model.encode(text), 0]
        nats -= plainly(model, ids[:1], ids[1:])[0]
        first = len(model.tokenizer.decode(ids[:1]).encode())
        size += len(text.encode()) - (1 if text[0] == "猫" else first)
        tokens += len(ids) - 1
    scores = bits_per_byte(model, str(file), 512)
    assert scores["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert (scores["bits_per_byte"].n, scores["loss"].n) == (size, tokens)
    assert scores["loss"].value == pytest.approx(nats / tokens, rel=1e-5)


def test_bos_stands_before_a_text_and_is_not_counted(root: Path, tmp_path: Path) -> None:
    plain = engine(root)
    model = Engine(tiny.model("llama"), tiny.with_bos(plain.tokenizer))
    start = [model.tokenizer.bos_token_id]
    assert model.encode("the cat") == start + plain.encode("the cat")
    assert model.encode("<s>the cat") == model.encode("the cat")
    assert model.encode("") == start
    assert continuation(model, "", "the cat") == (start, plain.encode("the cat"))
    assert continuation(model, "the", " cat") == (model.encode("the"), plain.encode(" cat"))
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"text": "the cat sat"}))
    targets = [*plain.encode("the cat sat"), 0]
    scores = bits_per_byte(model, str(file), 512)
    nats = -plainly(model, start, targets)[0]
    assert scores["loss"].value == pytest.approx(nats / len(targets), rel=1e-5)
    assert (scores["loss"].n, scores["bits_per_byte"].n) == (len(targets), len("the cat sat"))


def test_a_text_file_in_another_encoding_or_compressed(tmp_path: Path) -> None:
    chinese = "从前有一座山，山里有一座庙。\n\n庙里有我们的故事。\n"
    for name, content in (
        ("a.txt", chinese.encode("gbk")),
        ("b.txt.gz", gzip.compress(chinese.encode())),
    ):
        (tmp_path / name).write_bytes(content)
        ((record, _),) = likelihood.documents(str(tmp_path / name))
        assert record == Text(chinese)


def test_a_text_file_is_one_document_cut_into_windows(root: Path, tmp_path: Path) -> None:
    model = engine(root)
    file = tmp_path / "t.txt"
    file.write_text("the cat sat on the mat and the dog sat on the log")
    ids = [*model.encode(file.read_text()), 0]
    nats = sum(-plainly(model, [ids[i]], ids[i + 1 : i + 4])[0] for i in range(0, len(ids) - 1, 3))
    scores = bits_per_byte(model, str(file), 4)
    assert scores["loss"].value == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
