"""Adapters of plain peft, of each kind it makes: computed as peft does, or refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ModelError
from minigpt.export.card import Card
from minigpt.export.hf import export_hf
from minigpt.infer.engine import Engine
from minigpt.infer.native import is_native
from minigpt.model.architecture import fit_vocabulary
from minigpt.model.lora import Lora, add_adapter, load_adapter, save_adapter
from minigpt.model.pretrained import load_model, save_model

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),  # tied
}
# Q is a layer, E the embedding, D another layer and N a norm, by their names in each base.
KINDS: dict[str, dict[str, Any]] = {
    "one layer": {"target_modules": ["Q"]},
    "all linear layers": {"target_modules": "all-linear"},
    "by pattern": {"target_modules": r".*\.1\..*Q"},
    "one of the layers": {"target_modules": ["Q"], "layers_to_transform": [1]},
    "head saved": {"target_modules": ["Q"], "modules_to_save": ["lm_head"]},
    "embedding saved": {"target_modules": ["Q"], "modules_to_save": ["E"]},
    "both saved": {"target_modules": ["Q"], "modules_to_save": ["E", "lm_head"]},
    "both saved and tied": {
        "target_modules": ["Q"],
        "modules_to_save": ["E"],
        "ensure_weight_tying": True,
    },
    "norms saved": {"target_modules": ["Q"], "modules_to_save": ["N"]},
    "embedding": {"target_modules": ["Q", "E"]},
    "embedding, head saved": {"target_modules": ["Q", "E"], "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["Q", "lm_head"]},
    "embedding and head": {"target_modules": ["Q", "E", "lm_head"]},
    "embedding, tied": {"target_modules": ["Q", "E"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["Q"], "trainable_token_indices": [1, 2, 30]},
    "dora": {"target_modules": ["Q"], "use_dora": True},
    "rslora": {"target_modules": ["Q"], "use_rslora": True},
    "ranks and scales by layer": {
        "target_modules": ["Q", "D"],
        "rank_pattern": {"Q": 2},
        "alpha_pattern": {"Q": 5},
    },
    "all biases": {"target_modules": ["Q"], "bias": "all"},
    "biases of its layers": {"target_modules": ["Q"], "bias": "lora_only"},
    "pissa": {"target_modules": ["Q"], "init_lora_weights": "pissa"},
    "parameters": {"target_modules": [], "target_parameters": ["P"]},
}
NAMES = {"Q": "q_proj", "E": "embed_tokens", "D": "down_proj", "N": "input_layernorm"}
GPT2_NAMES = {"Q": "c_attn", "E": "wte", "D": "c_proj", "N": "ln_1"}
PARAMETERS = {"P": "mlp.up_proj.weight"}
GPT2_PARAMETERS = {"P": "mlp.c_fc.weight"}
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = tokenizers.load(tiny.tokenizer(root / "tokenizer"))
    for name, (family, changes) in BASES.items():
        save_model(tiny.model(family, **changes), tokenizer, root / name)
    return {name: root / name for name in BASES}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model.eval()(IDS, use_cache=False).logits
    return out


def named(value: Any, base: str) -> Any:
    """Put a base's names for the letters in a setting."""
    gpt2 = base == "gpt2"
    names = {**(GPT2_NAMES if gpt2 else NAMES), **(GPT2_PARAMETERS if gpt2 else PARAMETERS)}
    if isinstance(value, list):
        return [named(one, base) for one in value]
    if isinstance(value, dict):
        return {names[key]: one for key, one in value.items()}
    if isinstance(value, str) and value.endswith("Q"):
        return value[:-1] + names["Q"]
    return names.get(value, value) if isinstance(value, str) else value


@pytest.fixture(autouse=True)
def _peft_warns_of_tied_layers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make(base: Path, directory: Path, config: Any, spread: float = 0.05) -> PeftModel:
    """An adapter as plain peft makes and saves it, with weights that all do something."""
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(spread * torch.randn_like(weight))
    adapted.save_pretrained(str(directory))
    return adapted  # type: ignore[no-any-return]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_lora_is_computed_as_peft_does(
    kind: str, base: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    settings = {name: named(value, base) for name, value in KINDS[kind].items()}
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    right = logits(make(bases[base], tmp_path / "adapter", config))
    assert float((right - logits(load_model(bases[base], "sdpa"))).abs().max()) > 0.05

    engine = Engine.load(tmp_path / "adapter", merged=False, device="cpu")
    assert torch.equal(logits(engine.model), right)
    assert not is_native(engine.model)  # whose weights are not all of it
    merged = load_model(tmp_path / "adapter", "sdpa")
    assert torch.allclose(logits(merged), right, atol=2e-5)
    save_model(merged, engine.tokenizer, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(plain), right, atol=2e-5)

    assert engine.adapter is not None
    save_adapter(engine.adapter, engine.tokenizer, tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(bases[base])
    again = PeftModel.from_pretrained(plain, str(tmp_path / "again"))
    assert torch.equal(logits(again), right)


REFUSED: dict[str, tuple[Any, str]] = {
    "ia3": (
        IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
        "of the kind IA3",
    ),
    "loha": (LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "of the kind LOHA"),
    "prompt": (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "of the kind PROMPT_TUNING",
    ),
    "prefix": (
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "of the kind PREFIX_TUNING",
    ),
    "classifier": (
        LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj"]),
        "made for the task TOKEN_CLS",
    ),
    "layers": (
        LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]
        ),
        "made with layer_replication",
    ),
    "activated": (
        LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1, 2]
        ),
        "made with alora_invocation_tokens",
    ),
    "bias": (
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True),
        "cannot be merged into its base: .*no bias",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_are_refused_by_name(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config, message = REFUSED[kind]
    make(bases["llama"], tmp_path, config)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_a_pickled_adapter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapted = make(bases["llama"], tmp_path, LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(str(tmp_path), safe_serialization=False)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled \(adapter_model.bin\).*save_pretrained"):
        load_model(tmp_path)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases without rows for the special tokens."""
    root = tmp_path_factory.mktemp("grown")
    tokenizer = tokenizers.load(tiny.tokenizer(root / "tokenizer"))
    for name, (family, changes) in BASES.items():
        model = tiny.model(family, vocab_size=len(tokenizer) - 2, **changes)
        save_model(model, tokenizer, root / name)
    return root


@pytest.mark.parametrize("base", BASES)
def test_new_rows_are_the_same_after_any_seed(base: str, grown: Path) -> None:
    models = []
    for seed in (1, 2):
        model = load_model(grown / base, "sdpa")
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        fit_vocabulary(model, tokenizers.load(grown / "tokenizer"))
        assert torch.equal(torch.random.get_rng_state(), state)
        models.append(model)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    new: Any = models[0].get_input_embeddings().weight
    assert 0.01 < float(new[-2:].std()) < 0.03
    head: Any = models[0].get_output_embeddings().weight
    assert (head is new) == models[0].config.tie_word_embeddings
    assert head is not new or torch.equal(head, new)


@pytest.mark.parametrize("options", [Lora(), Lora(rslora=True), Lora(dora=True)])
@pytest.mark.parametrize("base", BASES)
def test_an_adapter_with_new_rows_loads_with_plain_peft(
    options: Lora, base: str, grown: Path, tmp_path: Path
) -> None:
    tokenizer = tokenizers.load(grown / "tokenizer")
    model = load_model(grown / base, "sdpa")
    fit_vocabulary(model, tokenizer)
    adapted = add_adapter(model, options, str(grown / base))
    with torch.no_grad():
        for weight in adapted.parameters():
            weight.add_(0.05 * torch.randn_like(weight) * weight.requires_grad)
    ids = torch.arange(len(tokenizer) - 30, len(tokenizer))[None]
    with torch.no_grad():
        right = adapted.eval()(ids).logits
    save_adapter(adapted, tokenizer, tmp_path / "hf")

    auto: Any = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "hf"))
    base_model: Any = AutoModelForCausalLM.from_pretrained(grown / base)
    base_model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "hf")))
    by_hand: Any = PeftModel.from_pretrained(base_model, str(tmp_path / "hf"))
    ours = Engine.load(tmp_path, merged=False, device="cpu").model
    for loaded in (auto, by_hand, ours):
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, right)
    with torch.no_grad():
        merged = load_model(tmp_path, "sdpa").eval()(ids).logits
    assert torch.allclose(merged, right, atol=2e-5)


def with_a_hole(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Give the end of a turn an id behind some that no token has."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    token = next(token for token in spec["added_tokens"] if token["content"] == "<|im_end|>")
    token["id"] = spec["model"]["vocab"][token["content"]] = len(tokenizer) + 20
    return tokenizers.wrap(Tokenizer.from_str(json.dumps(spec)))


def test_an_adapter_with_new_rows_above_a_hole(
    grown: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_a_hole(tokenizers.load(grown / "tokenizer"))
    rows = tokenizers.id_count(tokenizer)
    assert rows == len(tokenizer) + 21
    model = load_model(grown / "llama", "sdpa")
    fit_vocabulary(model, tokenizer)
    adapted = add_adapter(model, Lora(), str(grown / "llama"))
    save_adapter(adapted, tokenizer, tmp_path / "hf")
    assert "AutoPeftModelForCausalLM cannot load this adapter: it" in caplog.text
    assert f"resize_token_embeddings({rows})" in caplog.text
    with pytest.raises(RuntimeError, match="size mismatch"):
        AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "hf"))
    numbers = export_hf(str(tmp_path / "hf"), tmp_path / "out", Card("x", ""), keep_adapter=True)
    assert numbers["max_logit_difference"] == 0


@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_new_rows_are_saved_from_gathered_weights(base: str, grown: Path, tmp_path: Path) -> None:
    """As FSDP2 gathers them: each weight under its name in the model, tied ones twice."""
    tokenizer = tokenizers.load(grown / "tokenizer")
    model = load_model(grown / base, "sdpa")
    fit_vocabulary(model, tokenizer)
    adapted = add_adapter(model, Lora(), str(grown / base))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_adapter(adapted, tokenizer, tmp_path, weights)
    plain: Any = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path))
    assert torch.equal(logits(plain), logits(adapted))


def test_an_adapter_that_lacks_its_rows_is_refused(grown: Path, tmp_path: Path) -> None:
    """A base whose tokenizer has no more tokens than rows, and an adapter with more tokens."""
    small = tokenizers.load(tiny.tokenizer(tmp_path / "small", template=False))
    save_model(tiny.model("llama", vocab_size=len(small)), small, tmp_path / "base")
    tokenizer = tokenizers.load(tmp_path / "base")
    tokenizer.add_tokens(["<new>", "<other>"])
    model = load_model(tmp_path / "base")
    save_adapter(add_adapter(model, Lora(), str(tmp_path / "base")), tokenizer, tmp_path / "hf")
    with pytest.raises(ModelError, match=r"does not hold the rows between.*Train it again"):
        load_model(tmp_path / "hf")


def test_rows_that_plain_peft_saved_are_read_without_a_tokenizer(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """A user's base that was resized by hand, so that peft saved its embedding."""
    plain: Any = AutoModelForCausalLM.from_pretrained(bases["llama"])
    plain.resize_token_embeddings(325)
    adapted = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(str(tmp_path))
    loaded = load_adapter(load_model(bases["llama"], "sdpa"), tmp_path, bases["llama"])
    assert torch.equal(logits(loaded), logits(adapted))
    assert logits(loaded).shape[-1] == 325


def test_a_layer_that_the_base_lacks_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    make(bases["llama"], tmp_path, LoraConfig(task_type="CAUSAL_LM"))
    base = str(bases["llama"])
    shorter = tiny.model("llama", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"another base: the model has no layer for its .*\.1\."):
        load_adapter(shorter, tmp_path, base)
    wider = tiny.model("llama", hidden_size=64, head_dim=16)
    with pytest.raises(ModelError, match=r"another base: size mismatch for .*q_proj"):
        load_adapter(wider, tmp_path, base)


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_config_that_is_no_object_is_damaged(
    content: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    make(bases["llama"], tmp_path, LoraConfig(task_type="CAUSAL_LM"))
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"adapter_config.json is damaged"):
        load_model(tmp_path)
