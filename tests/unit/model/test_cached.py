"""Decoding many rows with any model's own forward: as if each were computed alone and whole."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from minigpt.model.cached import TransformersDecoder, decoding_modes
from minigpt.model.packed_lm import use_attention

SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_d_head": 8}
JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 2,
    "use_mamba_kernels": False,
}
GRIFFIN = {
    "num_hidden_layers": 3,
    "lru_width": 32,
    "attention_window_size": 32,
    "block_types": ["recurrent", "recurrent", "attention"],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # layers with a state
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("mamba", {"state_size": 4, "time_step_rank": 2}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4}),
    "qwen3_next": ("qwen3_next", LINEAR),
    "jamba": ("jamba", JAMBA),
    # a cache of its own
    "recurrent_gemma": ("recurrent_gemma", GRIFFIN),
    "rwkv": ("rwkv", {"attention_hidden_size": 32, "context_length": 64}),
    # keys and values alone; angles by the length; eager attention alone
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "cohere2": ("cohere2", {"sliding_window": 4}),
    "dynamic": ("llama", {"max_position_embeddings": 8, "rope_parameters": DYNAMIC}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 5.0}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 4}),
}


def _model(kind: str) -> PreTrainedModel:
    family, changes = KINDS[kind]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_of_any_model_are_decoded_as_if_alone(kind: str) -> None:
    model = _model(kind)
    rows = [[3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 2], [7, 2, 9, 90, 30], [11, 12]]
    alone = [list(row) for row in rows]
    for row in alone:  # greedy, with the whole text computed for each token
        for _ in range(6):
            again = model(torch.tensor([row]), use_cache=False)
            row.append(int(again.logits[0, -1].argmax()))
    with use_attention(model, "sdpa"):
        runner = TransformersDecoder(model, decoding_modes(model)[0])
        logits = runner.admit(rows[:3])
        together = rows[:3]
        for step in range(6):
            for row, token in zip(together, logits.argmax(-1).tolist(), strict=True):
                row.append(token)
            if step == 2:  # the last row takes the place of one that leaves
                runner.drop(0)
                together[0] = together.pop()
            logits = runner.step([row[-1] for row in together])
            if step == 0:  # one comes later
                late = runner.admit(rows[3:])
                together = [*together, rows[3]]
                logits = torch.cat([logits, late])
    for row, expected in zip(rows, alone, strict=True):
        assert row == expected[: len(row)]
    assert len(rows[1]) == len(alone[1])
