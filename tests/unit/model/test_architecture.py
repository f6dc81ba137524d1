"""Models on disk: what is written, what plain transformers makes of it, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minigpt.data import tokenizer as tokenizers
from minigpt.data.chat import install_template
from minigpt.errors import ModelError, TokenizerError
from minigpt.model.architecture import (
    Architecture,
    build_native,
    cast_weights,
    check_vocabulary,
    count_parameters,
    embedding_rows,
    fit_vocabulary,
)
from minigpt.model.packed_lm import PACKED, PackedLM, target_logits
from minigpt.model.pretrained import find_model, load_model, save_model

SMALL = Architecture(
    hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=48, rope_theta=5000.0
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedLM, Path]:
    """A native model after it was wrapped for training, and the directory it was saved in."""
    root = tmp_path_factory.mktemp("build")
    tokenizer = tokenizers.load(tiny.tokenizer(root / "tokenizer"))
    lm = PackedLM(build_native(SMALL, tokenizer)).eval()
    save_model(lm.hf, tokenizer, root / "run" / "hf")
    return lm, root / "run"


def test_plain_transformers_gives_our_logits(saved: tuple[PackedLM, Path]) -> None:
    lm, run = saved
    plain = AutoModelForCausalLM.from_pretrained(run / "hf").eval()
    batch = tiny.batch([30])
    batch.input_ids.remainder_(280)
    with torch.no_grad():
        theirs = plain(batch.input_ids[None]).logits
        ours = target_logits(lm.hf, batch, packed=True)
    assert type(plain).__name__ == "Qwen3ForCausalLM"
    assert float((ours - theirs[:, batch.predict_at]).abs().max()) <= 1e-5


def test_the_config_speaks_to_older_stacks(saved: tuple[PackedLM, Path]) -> None:
    hf = saved[1] / "hf"
    config = json.loads((hf / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["rope_theta"] == 5000.0
    assert PACKED not in json.dumps(config)
    tokenizer = json.loads((hf / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_tokenizer_and_the_ends_of_an_answer_travel_along(
    saved: tuple[PackedLM, Path],
) -> None:
    hf = saved[1] / "hf"
    tokenizer = AutoTokenizer.from_pretrained(hf)
    ends = tokenizer.convert_tokens_to_ids([tokenizers.END_OF_TEXT, tokenizers.TURN_END])
    generation = GenerationConfig.from_pretrained(hf)
    assert generation.eos_token_id == sorted(ends)
    assert generation.pad_token_id == tokenizer.convert_tokens_to_ids(tokenizers.PAD)
    assert tokenizer.chat_template == tokenizers.CHAT_TEMPLATE


def test_casting_leaves_what_transformers_holds_in_fp32() -> None:
    model = tiny.model("llama")
    model._keep_in_fp32_modules_strict = {"mlp.gate_proj"}
    cast_weights(model, torch.bfloat16)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"model.layers.{n}.mlp.gate_proj.weight" for n in range(2)}


def test_a_tied_head_is_saved_once(saved: tuple[PackedLM, Path]) -> None:
    names = load_file(saved[1] / "hf" / "model.safetensors")
    assert "lm_head.weight" not in names
    assert sum(x.numel() for x in names.values()) == count_parameters(saved[0])[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_any_family_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
    save_model(model, tokenizer, tmp_path / "hf")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        again = load_model(tmp_path, "sdpa")(ids).logits
        assert torch.equal(again, model(ids).logits)


def test_a_given_state_is_saved_instead_of_the_models(
    saved: tuple[PackedLM, Path], tmp_path: Path
) -> None:
    lm, run = saved
    state = {name: torch.ones_like(x) for name, x in lm.hf.state_dict().items()}
    save_model(lm.hf, tokenizers.load(run / "hf"), tmp_path / "hf", state)
    assert all((p == 1).all() for p in load_model(tmp_path / "hf").parameters())


# Finding


def test_a_run_and_its_hf_directory_are_the_same_model(saved: tuple[PackedLM, Path]) -> None:
    assert find_model(saved[1]) == find_model(saved[1] / "hf") == saved[1] / "hf"


@pytest.mark.parametrize(
    ("directory", "command"),
    [
        ("outputs/sft", "minigpt fit --config configs/sft.yaml"),
        ("outputs/dpo-2", "minigpt fit --config configs/dpo.yaml"),
        ("./lora", "minigpt fit --config configs/lora.yaml"),
        ("runs/of/mine", "minigpt fit --config configs/pretrain.yaml"),
    ],
)
def test_a_missing_model_names_the_command_that_makes_it(
    directory: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as error:
        find_model(directory)
    assert command in str(error.value)
    assert "make pipeline" in str(error.value)


def test_a_hub_id_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("someone/model") == "someone/model"
    with pytest.raises(ModelError, match="someone/model cannot be loaded"):
        load_model("someone/model")


# Damage


def damage(directory: Path, damage_kind: str) -> None:
    weights = directory / "model.safetensors"
    if damage_kind == "cut":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif damage_kind == "garbage":
        weights.write_bytes(b"no weights" * 100)
    elif damage_kind == "missing":
        weights.unlink()
    elif damage_kind == "empty":
        weights.write_bytes(b"")
    elif damage_kind == "incomplete":
        state = load_file(weights)
        del state["model.norm.weight"]
        save_file(state, weights, {"format": "pt"})
    elif damage_kind == "shapes":
        state = load_file(weights)
        state["model.norm.weight"] = torch.ones(7)
        save_file(state, weights, {"format": "pt"})
    elif damage_kind == "config":
        (directory / "config.json").write_text("{")
    else:
        (directory / "config.json").write_text('{"model_type": "bert"}')


@pytest.mark.parametrize(
    "damage_kind",
    ["cut", "garbage", "missing", "empty", "incomplete", "shapes", "config", "other model"],
)
def test_a_damaged_model_is_a_model_error(
    damage_kind: str, saved: tuple[PackedLM, Path], tmp_path: Path
) -> None:
    save_model(saved[0].hf, tokenizers.load(saved[1] / "hf"), tmp_path / "hf")
    damage(tmp_path / "hf", damage_kind)
    with pytest.raises(
        ModelError, match=r"hf (cannot be loaded: \S|is refused, for .*tokens after it)"
    ):
        load_model(tmp_path)


# Vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_grow_with_the_tokenizer(tied: bool, tmp_path: Path) -> None:
    model = tiny.model("llama", tie_word_embeddings=tied, vocab_size=260)
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "bare", template=False))
    assert install_template(tokenizer)
    old = model.get_input_embeddings().weight.detach().clone()
    fit_vocabulary(model, tokenizer)
    weight = model.get_input_embeddings().weight
    assert len(weight) == len(model.get_output_embeddings().weight) == len(tokenizer) > 260
    assert torch.equal(weight[:260], old)
    assert model.config.vocab_size == len(tokenizer)
    check_vocabulary(embedding_rows(model), tokenizer)


def test_new_rows_are_the_same_each_time(tmp_path: Path) -> None:
    """An adapter is trained on a grown base; its reader grows the base again."""
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
    grown = []
    for seed in (1, 2):
        model = tiny.model("llama", vocab_size=260)
        torch.manual_seed(seed)
        fit_vocabulary(model, tokenizer)
        grown.append(model.get_input_embeddings().weight)
        assert len(torch.unique(grown[-1][260:], dim=0)) == len(tokenizer) - 260
    assert torch.equal(*grown)


def test_a_padded_vocabulary_is_left_alone(tmp_path: Path) -> None:
    model = tiny.model("llama")
    fit_vocabulary(model, tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer")))
    assert len(model.get_input_embeddings().weight) == tiny.VOCABULARY


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
    message = f"has {len(tokenizer)} tokens but the model only {len(tokenizer) - 1}"
    with pytest.raises(ModelError, match=message):
        check_vocabulary(len(tokenizer) - 1, tokenizer)


def test_a_missing_tokenizer_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="minigpt tokenizer train"):
        tokenizers.load(tmp_path / "nothing")


# Whole or not at all


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_others_is_never_run_nor_asked_about(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_when_asked(prompt: str = "") -> str:
        pytest.fail(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", fail_when_asked)
    save_model(tiny.model("llama"), tokenizers.load(tiny.tokenizer(tmp_path / "t")), tmp_path / "m")
    (tmp_path / "m" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((tmp_path / "m" / file).read_text())
    auto = {
        "AutoConfig": "own.A",
        "AutoModelForCausalLM": "own.B",
        "AutoTokenizer": [None, "own.C"],
    }
    config |= {"model_type": "own", "tokenizer_class": "Own", "auto_map": auto}
    (tmp_path / "m" / file).write_text(json.dumps(config))
    load, error = (load_model, ModelError)
    if file == "tokenizer_config.json":
        load, error = (tokenizers.load, TokenizerError)
    with pytest.raises(error, match=r"m cannot be loaded: .*code of others is never run here"):
        load(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


def pickled(model: Path) -> None:
    torch.save(load_file(model / "model-00001-of-00005.safetensors"), model / "pytorch_model.bin")
    for file in model.glob("model*"):
        file.unlink()


def without_shards(model: Path) -> None:
    for number in (2, 4):
        (model / f"model-0000{number}-of-00005.safetensors").unlink()


def without_any(model: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()


def without_index(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()


def pointer(model: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (model / "model-00003-of-00005.safetensors").write_text(text)


def damaged_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (pickled, r"its weights are in pytorch_model.bin. Pickled .* can run code"),
        (without_shards, "2 of its 5 files of weights are missing, such as model-00002"),
        (without_any, r"no file of weights \(model.safetensors\) in it"),
        (without_index, "index.json, which names its 5 files of weights, is missing"),
        (pointer, "model-00003-of-00005.safetensors is a pointer of Git LFS.*git lfs pull"),
        (damaged_index, "index.json is damaged"),
    ],
)
def test_weights_that_are_not_there_are_refused_with_the_reason(
    harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "m", max_shard_size="25KB")
    load_model(tmp_path / "m")
    harm(tmp_path / "m")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "m")
