"""LoRA: where it goes, what it leaves alone, and that it survives merging and saving."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ConfigError, ModelError
from minigpt.infer.engine import Engine
from minigpt.model.architecture import checkpoint_activations, fit_vocabulary
from minigpt.model.lora import (
    BASE,
    Lora,
    add_adapter,
    linear_layers,
    load_adapter,
    merge,
    save_adapter,
)
from minigpt.model.optimizer import OptimizerOptions, build_optimizer
from minigpt.model.packed_lm import PackedLM
from minigpt.model.pretrained import load_model, save_model

FAMILIES = ("llama", "qwen2", "gpt2")
TARGETS = {
    "llama": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    "qwen2": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    "gpt2": "c_attn c_fc c_proj",
}
NO_DROPOUT = Lora(r=4, alpha=16, dropout=0.0)
SWITCHES = {
    "lora": NO_DROPOUT,
    "rslora": replace(NO_DROPOUT, rslora=True),
    "dora": replace(NO_DROPOUT, dora=True),
    "both": replace(NO_DROPOUT, rslora=True, dora=True),
}
IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    tokenizer = tokenizers.load(tiny.tokenizer(root / "tokenizer"))
    for family in FAMILIES:
        save_model(tiny.model(family), tokenizer, root / family)
    return {family: root / family for family in FAMILIES}


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    out: Tensor = model.eval()(IDS, use_cache=False).logits
    return out


def trained(base: Path, checkpointing: bool = False, options: Lora = NO_DROPOUT) -> PeftModel:
    """An adapter after a few steps on a packed batch; the base's attention is plain again."""
    torch.manual_seed(0)
    model = load_model(base)
    lm = PackedLM(model)
    adapted = add_adapter(model, options, str(base))
    if checkpointing:
        checkpoint_activations(model)
    lm.train()
    optimizer = build_optimizer(lm, OptimizerOptions(lr=0.01))
    for _ in range(3):
        optimizer.zero_grad()
        lm(tiny.batch([20, 9])).backward()
        optimizer.step()
    model.config._attn_implementation = "sdpa"
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_adapter_is_on_all_linear_layers_but_the_head(family: str, tied: bool) -> None:
    model = tiny.model(family, tie_word_embeddings=tied)
    assert linear_layers(model) == TARGETS[family].split()
    add_adapter(model, NO_DROPOUT, "base")
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert len(adapted) == 2 * (4 if family == "gpt2" else 7)
    assert not any("lm_head" in n or "embed" in n or "wte" in n for n in adapted)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.lora_{side}.default.weight" for layer in adapted for side in "AB"
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_every_lora_b(
    family: str, checkpointing: bool, bases: dict[str, Path]
) -> None:
    adapted = trained(bases[family], checkpointing)
    updates = {n: p for n, p in adapted.named_parameters() if ".lora_B" in n}
    assert updates
    assert all(p.grad is not None and p.grad.any() and p.any() for p in updates.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing(family: str, bases: dict[str, Path]) -> None:
    model = load_model(bases[family], "sdpa")
    before = logits(model)
    assert torch.equal(logits(add_adapter(model, NO_DROPOUT, "base")), before)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_off_is_the_base_and_merged_is_the_adapter(
    family: str, switches: str, bases: dict[str, Path]
) -> None:
    adapted = trained(bases[family], options=SWITCHES[switches])
    with_adapter = logits(adapted)
    base = logits(load_model(bases[family], "sdpa"))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    assert float((with_adapter - base).abs().max()) > 0.1
    merged = merge(adapted)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.allclose(logits(merged), with_adapter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_the_same_for_plain_peft_and_for_us(
    family: str, switches: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapted = trained(bases[family], options=SWITCHES[switches])
    before = logits(adapted)
    save_adapter(adapted, tokenizers.load(bases[family]), tmp_path / "hf")
    plain = PeftModel.from_pretrained(load_model(bases[family], "sdpa"), str(tmp_path / "hf"))
    assert torch.equal(logits(plain), before)
    ours = load_adapter(load_model(bases[family], "sdpa"), tmp_path / "hf", bases[family])
    assert torch.equal(logits(ours), before)
    merged = load_model(tmp_path, "sdpa")  # a run directory; it names its base itself
    assert torch.allclose(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_rslora_and_dora_compute_what_they_say() -> None:
    """Against the papers: alpha / sqrt(r), and rows of W + BA scaled to a learnt length."""
    torch.manual_seed(0)
    options = SWITCHES["both"]
    adapted = add_adapter(tiny.model("llama"), options, "base")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    length = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        b.normal_()
        length.mul_(1.5)
        x = torch.randn(3, a.shape[1])
        weight = layer.base_layer.weight + options.alpha / options.r**0.5 * b @ a
        right = x @ (length[:, None] * weight / weight.norm(dim=1, keepdim=True)).T
        assert torch.allclose(layer(x), right, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_a_grown_base_reloads(bases: dict[str, Path], tmp_path: Path) -> None:
    """A base without our special tokens gets rows for them; the reader makes the same rows."""
    base = tmp_path / "base"
    small = tiny.model("llama", vocab_size=278)
    save_model(small, tokenizers.load(bases["llama"]), base)
    tokenizer = tokenizers.load(bases["llama"])
    model = load_model(base, "sdpa")
    fit_vocabulary(model, tokenizer)
    assert len(model.get_input_embeddings().weight) > 278
    adapted = add_adapter(model, NO_DROPOUT, str(base))
    before = logits(adapted)
    save_adapter(adapted, tokenizer, tmp_path / "hf")
    assert torch.equal(logits(load_model(tmp_path, "sdpa")), before)


@pytest.mark.parametrize(
    ("family", "target"),
    [("llama", "query"), ("llama", "lm_head"), ("llama", "embed_tokens"), ("gpt2", "wte")],
)
def test_unknown_layers_the_head_and_the_embedding_are_refused(family: str, target: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be put on {target}.*This model has: "):
        add_adapter(tiny.model(family), Lora(target_modules=[target]), "base")


def test_chosen_layers_only() -> None:
    model = tiny.model("llama")
    add_adapter(model, Lora(target_modules=["q_proj"]), "base")
    assert all("q_proj" in n for n, p in model.named_parameters() if p.requires_grad)


def other(kind: str) -> PreTrainedModel:
    if kind == "wider":
        return tiny.model("llama", hidden_size=64, head_dim=16, intermediate_size=96)
    if kind == "shorter":
        return tiny.model("llama", num_hidden_layers=1)
    return tiny.model("gpt2")


@pytest.mark.parametrize("kind", ["wider", "shorter", "gpt2"])
def test_an_adapter_on_another_base_is_refused(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapted = add_adapter(load_model(bases["llama"]), NO_DROPOUT, "base")
    save_adapter(adapted, tokenizers.load(bases["llama"]), tmp_path / "hf")
    with pytest.raises(ModelError, match=r"another base|cannot be loaded"):
        load_adapter(other(kind), tmp_path / "hf", "base")


@pytest.fixture
def on_a_base(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A run with an adapter, and the base that it names, which is trained again afterwards."""
    base, tokenizer = tmp_path / "base", tokenizers.load(bases["llama"])
    save_model(tiny.model("llama"), tokenizer, base)
    adapted = add_adapter(load_model(base), NO_DROPOUT, str(base))
    save_adapter(adapted, tokenizer, tmp_path / "run" / "hf")
    load_model(tmp_path / "run")
    Engine.load(str(tmp_path / "run"))
    again = load_model(base)
    again.get_input_embeddings().weight.data[7] += 0.01
    save_model(again, tokenizer, base)
    return tmp_path / "run"


def test_an_adapter_is_not_put_on_a_base_that_was_trained_again(
    on_a_base: Path, bases: dict[str, Path]
) -> None:
    match = f"at {on_a_base / 'hf'} was trained on other weights than those in .*base .*again"
    with pytest.raises(ModelError, match=match):
        load_model(on_a_base)
    with pytest.raises(ModelError, match=match):
        Engine.load(str(on_a_base), merged=False)
    with pytest.raises(ModelError, match=match):
        Engine.load(str(on_a_base.with_name("base")), str(on_a_base))


def test_a_base_that_was_moved_with_its_adapter_is_found(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    run, base, tokenizer = (
        tmp_path / "a/run",
        tmp_path / "a/base/hf",
        tokenizers.load(bases["llama"]),
    )
    save_model(tiny.model("llama"), tokenizer, base)
    save_adapter(add_adapter(load_model(base), NO_DROPOUT, str(base)), tokenizer, run / "hf")
    before = load_model(run).state_dict()
    (tmp_path / "a").rename(tmp_path / "b")
    run = tmp_path / "b/run"
    after = load_model(run).state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    save_model(tiny.model("llama", seed=1), tokenizer, tmp_path / "b/base/hf")
    with pytest.raises(ModelError, match="was trained on other weights"):
        load_model(run)
    (tmp_path / "b/base").rename(tmp_path / "b/other")
    gone = rf"base of the adapter at {run / 'hf'} is not at {base} any more\. .*--model BASE"
    with pytest.raises(ModelError, match=gone):
        load_model(run)


def test_an_exported_adapter_still_knows_its_base(on_a_base: Path, bases: dict[str, Path]) -> None:
    save_model(load_model(bases["llama"]), tokenizers.load(bases["llama"]), on_a_base / "../base")
    engine = Engine.load(str(on_a_base), merged=False)  # the base is back
    assert engine.adapter is not None
    save_adapter(engine.adapter, engine.tokenizer, on_a_base / "copy")
    assert (on_a_base / "copy" / BASE).read_bytes() == (on_a_base / "hf" / BASE).read_bytes()


def test_an_adapter_without_a_record_of_its_base_loads(on_a_base: Path) -> None:
    (on_a_base / "hf" / BASE).unlink()  # as plain peft writes it
    merged, base = load_model(on_a_base), load_model(on_a_base.with_name("base"))
    assert merged.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", BASE])
@pytest.mark.parametrize("content", [b"", b"neither weights nor JSON " * 50])
def test_a_damaged_adapter_is_a_model_error(
    name: str, content: bytes, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapted = add_adapter(load_model(bases["llama"]), NO_DROPOUT, str(bases["llama"]))
    save_adapter(adapted, tokenizers.load(bases["llama"]), tmp_path / "hf")
    (tmp_path / "hf" / name).write_bytes(content)
    with pytest.raises(ModelError, match="hf"):
        load_model(tmp_path)


def test_an_adapter_without_all_its_weights_is_a_model_error(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapted = add_adapter(load_model(bases["llama"]), NO_DROPOUT, str(bases["llama"]))
    save_adapter(adapted, tokenizers.load(bases["llama"]), tmp_path / "hf")
    weights = tmp_path / "hf" / "adapter_model.safetensors"
    save_file(dict([*load_file(weights).items()][:5]), weights)
    with pytest.raises(ModelError, match="missing adapter keys"):
        load_model(tmp_path)


def test_a_given_state_is_saved_instead_of_the_adapters(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(bases["llama"])
    adapted = add_adapter(model, NO_DROPOUT, str(bases["llama"]))
    state = {name: torch.ones_like(x) for name, x in model.state_dict().items()}
    save_adapter(adapted, tokenizers.load(bases["llama"]), tmp_path, state)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 28
    assert all((value == 1).all() for value in saved.values())


def test_a_missing_adapter_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no adapter in"):
        load_adapter(tiny.model("llama"), tmp_path, "base")
