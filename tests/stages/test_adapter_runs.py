"""Runs that train an adapter of each kind, on a base that lacks the chat's tokens, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from peft import AutoPeftModelForCausalLM
from tiny_runs import Fit

from minigpt.data import tokenizer as tokenizers
from minigpt.infer.engine import Engine
from minigpt.model.pretrained import save_model


@pytest.mark.parametrize("stage", ["lora", "dpo"])
def test_rslora_and_dora_are_switches_of_the_config(
    stage: str, fit: Fit, world: Path, tmp_path: Path
) -> None:
    losses = []
    for name, switches in (("plain", {}), ("both", {"rslora": True, "dora": True})):
        fit(stage, name, model__init_args__lora={"dropout": 0.0, **switches})
        losses.append(tiny_runs.metrics(tmp_path / name))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)  # a fresh adapter changes nothing
    assert losses[0] != losses[1]
    plain: Any = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "both" / "hf"))
    config = plain.peft_config["default"]
    assert (config.use_rslora, config.use_dora) == (True, True)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        right = plain.eval()(ids).logits
        ours = Engine.load(tmp_path / "both", merged=False, device="cpu").model(ids).logits
        assert torch.equal(ours, right)
        with plain.disable_adapter():
            off = plain(ids).logits
        base = Engine.load(world / "sft", device="cpu").model(ids).logits
    assert torch.equal(off, base)


def test_a_base_without_the_chats_tokens_is_trained_and_loads_with_plain_peft(
    fit: Fit, tmp_path: Path
) -> None:
    bare = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer", template=False))
    save_model(tiny.model("llama", vocab_size=len(bare)), bare, tmp_path / "base")
    long = {"data__init_args__max_length": 256, "data__init_args__tokens_per_batch": 1024}
    fit("lora", model__init_args__init_from=str(tmp_path / "base"), **long)
    plain: Any = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "run" / "hf"))
    engine = Engine.load(tmp_path / "run", merged=False, device="cpu")
    assert len(engine.tokenizer) > len(bare)
    ids = torch.arange(len(engine.tokenizer))[None]
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, engine.model(ids).logits)
