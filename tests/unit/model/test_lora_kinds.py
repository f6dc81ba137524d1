"""LoRA on kinds of models other than plain decoders: where it goes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ConfigError
from minigpt.model import shrink
from minigpt.model.lora import Lora, add_adapter, default_targets, merge
from minigpt.model.packed_lm import forward_rows
from minigpt.model.pretrained import save_model

MAMBA = {
    "num_hidden_layers": 2,
    "mamba_d_ssm": 1536,
    "mamba_n_heads": 24,
    "mamba_d_head": 64,
}  # as published
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    # Each layer of the mixture has experts that peft would take these names' adapters to.
    "deepseek_v3": (
        {"num_hidden_layers": 4},
        "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj",
    ),
    "mamba": ({}, "in_proj"),
    "falcon_h1": (MAMBA, "down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj"),
    "jamba": ({}, "down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj"),
    "llama4_text": (
        {"num_hidden_layers": 2},
        "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    ),
    "longcat_flash": ({"num_layers": 2}, "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj"),
    "ctrl": ({}, "Wk Wq Wv dense"),  # whose other linear layers are named as its blocks
    "falcon": ({"num_hidden_layers": 2}, "dense dense_4h_to_h dense_h_to_4h query_key_value"),
    "zamba": ({}, "down_proj gate_proj in_proj k_proj linear o_proj q_proj up_proj v_proj"),
}
IDS = torch.arange(40, 60)[None]


def small(kind: str) -> PreTrainedModel:
    with shrink.quiet():
        return next(iter(shrink.tiny_models(CONFIG_MAPPING[kind](**KINDS[kind][0]))))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return forward_rows(model.eval(), IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_and_merges_with_the_default_options(kind: str) -> None:
    model = small(kind)
    assert default_targets(model) == KINDS[kind][1].split()
    before = logits(model)
    adapted = add_adapter(model, Lora(), "base")
    forward_rows(model.train(), IDS).logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight) * weight.requires_grad)
    beside = logits(model)
    assert float((beside - before).abs().max()) > 0.1
    merged = merge(adapted)
    assert torch.allclose(logits(merged), beside, rtol=1e-3, atol=2e-3)


def test_blocks_that_shared_their_weights_are_saved_apart(tmp_path: Path) -> None:
    model = small("zamba")
    adapted = add_adapter(model, Lora(), "base")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight) * weight.requires_grad)
    beside = logits(model)
    merged = merge(adapted)
    merged.resize_token_embeddings(161)  # which ties what the config says is tied
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
    save_model(merged, tokenizer, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(plain)[..., :160], beside, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mamba", Lora(target_modules=["out_proj"]), r"incompatible with Mamba.*default \(in_proj"),
        (
            "deepseek_v3",
            Lora(target_modules=["down_proj"]),
            r"on down_proj of a deepseek_v3 model.*default \(kv_a_proj.*set lora.dropout to 0",
        ),
        ("deepseek_v3", Lora(target_modules=["gate_proj"]), "without also targeting up_proj"),
        ("llama4_text", Lora(target_modules=["router"]), "cannot be put on router: it goes on"),
    ],
)
def test_what_peft_cannot_put_on_a_kind_is_said(kind: str, options: Lora, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapter(small(kind), options, "base")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_stacked_experts_take_an_adapter_without_dropout() -> None:
    experts = ["down_proj", "gate_proj", "up_proj"]
    model = small("deepseek_v3")
    add_adapter(model, Lora(dropout=0.0, target_modules=experts), "base")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".experts." in name for name in trained)
