"""Loading an engine: in each kind of weights, what plain transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from minigpt.data import tokenizer as tokenizers
from minigpt.infer.engine import Engine
from minigpt.infer.native import NativeDecoder
from minigpt.model.pretrained import save_model

LENGTH = 200  # angles that are off grow with the position


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_bf16_weights_are_those_of_plain_transformers(family: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
    save_model(tiny.model(family), tokenizer, tmp_path / "model")
    engine = Engine.load(tmp_path / "model", weights="bf16", device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    ids = torch.arange(LENGTH).remainder(280)
    theirs = plain(ids[None]).logits
    assert torch.equal(engine.model(ids[None]).logits, theirs)
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in engine.model.named_buffers())
    decoder = engine.decoder()
    if isinstance(decoder, NativeDecoder):  # other matmuls, and so other rounding
        ours = decoder.admit([ids.tolist()])[0].float().log_softmax(-1)
        exact = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        right = exact(ids[None]).logits[0, -1].log_softmax(-1)
        bound = 2 * float((theirs[0, -1].float().log_softmax(-1) - right).abs().max())
        assert float((ours - right).abs().max()) <= max(bound, 0.02)
