"""The transformers export: what plain transformers and peft make of it is what we compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from tiny_runs import assert_refused
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from minigpt.data import tokenizer as tokenizers
from minigpt.data.chat import ChatCodec
from minigpt.data.formats import Message
from minigpt.data.tokenizer import load as load_tokenizer
from minigpt.errors import ConfigError, ModelError
from minigpt.export import gguf, hf
from minigpt.export.card import Card
from minigpt.files import OLD, STAGING, atomic_directory, atomic_file, staging, write_manifest
from minigpt.infer.engine import Engine, Sampling
from minigpt.model.architecture import fit_vocabulary
from minigpt.model.lora import Lora, add_adapter, save_adapter
from minigpt.model.pretrained import load_model, save_model

Minigpt = Callable[..., Any]
IDS = torch.arange(40)[None]
CHAT = [{"role": r, "content": f"{r} 你好\n"} for r in ("system", "user", "assistant", "user")]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return out


def test_a_run_loads_in_plain_transformers(minigpt: Minigpt, trained: Path, tmp_path: Path) -> None:
    run, out = trained / "sft", tmp_path / "exports" / "sft"
    outcome = minigpt("export", "hf", "--model", run, "--output_dir", out)
    assert (outcome.status, outcome.err) == (0, "")
    assert "texts_with_equal_ids: 3000 of 3000" in outcome.out
    assert "max_logit_difference: 0\n" in outcome.out
    model = AutoModelForCausalLM.from_pretrained(out)
    engine = Engine.load(run)
    assert float((logits(model) - logits(engine.model)).abs().max()) <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(out)
    for ask in (False, True):
        texts = [
            t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=ask)
            for t in (tokenizer, engine.tokenizer)
        ]
        assert texts[0] == texts[1]
    assert tokenizer.get_vocab() == engine.tokenizer.get_vocab()
    assert tokenizer.all_special_ids == engine.tokenizer.all_special_ids
    reply = engine.complete([(Message("user", "the cat"),)], Sampling(max_new_tokens=8))[0]
    ids = torch.tensor([engine.encode((Message("user", "the cat"),))])
    generated = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :].tolist()
    assert generated[: len(reply.ids)] == reply.ids


SFT = [("hf", "sft"), ("gguf", "sft")]


@pytest.mark.parametrize(("kind", "run"), SFT)
def test_exports_are_computed_on_the_cpu(
    kind: str,
    run: str,
    minigpt: Minigpt,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    outcome = minigpt("export", kind, "--model", trained / run, "--output_dir", tmp_path / "out")
    assert (outcome.status, outcome.err) == (0, "")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "run", "more"),
    [*((*one, ()) for one in SFT), ("hf", "lora", ()), ("hf", "lora", ("--keep_adapter",))],
)
def test_exports_where_there_is_a_gpu(
    kind: str, run: str, more: tuple[str, ...], minigpt: Minigpt, trained: Path, tmp_path: Path
) -> None:
    assert Engine.load(trained / run).model.device.type == "cuda"
    options = ("--model", trained / run, "--output_dir", tmp_path / "out", *more)
    outcome = minigpt("export", kind, *options)
    assert (outcome.status, outcome.err) == (0, "")


def test_what_older_stacks_read(minigpt: Minigpt, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "sft"
    assert minigpt("export", "hf", "--model", trained / "sft", "--output_dir", out).status == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["torch_dtype"], config["rope_theta"]) == ("float32", 10000.0)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    # transformers 4 wants a mapping under the newer name, and fails on a list.
    assert "extra_special_tokens" not in config
    assert set(config["additional_special_tokens"]) == {"<|endoftext|>", "<|im_start|>"}
    assert config["model_max_length"] == 128
    assert "generation -%}" not in config["chat_template"]
    assert config["chat_template"] == (out / "chat_template.jinja").read_text()
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in out.iterdir())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_families(
    family: str, tied: bool, saved: Callable[..., Path], tmp_path: Path
) -> None:
    model = saved(family, tie_word_embeddings=tied)
    numbers = hf.export_hf(str(model), tmp_path / "out", Card("x", str(model)))
    assert numbers["max_logit_difference"] <= 1e-5
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(again, logits(load_model(model, "sdpa")))


def gemma(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """BOS before each text, and turns that end with another token than eos."""
    tokenizer = tiny.with_bos(tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
        "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return tokenizer


def test_every_end_token_and_bos_are_exported(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = saved("llama", gemma)
    GenerationConfig(eos_token_id=[1, 9], temperature=0.5, do_sample=True).save_pretrained(model)
    numbers = hf.export_hf(str(model), tmp_path / "out", Card("x", ""))
    config, tokenizer = GenerationConfig.from_pretrained(tmp_path / "out"), load_tokenizer(model)
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert {1, 9, turn, tokenizer.eos_token_id} <= set(config.eos_token_id)
    assert (config.temperature, numbers["end_tokens"]) == (0.5, config.eos_token_id)
    assert numbers["text_start"] == [tokenizer.bos_token_id]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the").input_ids == [
        *Engine.load(model).encode("the"),
        tokenizer.eos_token_id,
    ]


def test_a_model_without_a_template(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer(tmp_path / "model", template=False)
    out = tmp_path / "out"
    numbers = hf.export_hf(str(tmp_path / "model"), out, Card("x", ""))
    assert numbers["chats_rendered_equal"] == "0 of 0"
    assert AutoTokenizer.from_pretrained(out).chat_template is None


@pytest.mark.parametrize("named", [False, True])
def test_an_adapter_is_merged(minigpt: Minigpt, trained: Path, tmp_path: Path, named: bool) -> None:
    lora, out = trained / "lora", tmp_path / "merged"
    arguments = ["--model", trained / "sft", "--adapter", lora] if named else ["--model", lora]
    assert minigpt("export", "hf", *arguments, "--output_dir", out).status == 0
    beside = Engine.load(lora, merged=False)
    base = logits(load_model(trained / "sft", "sdpa"))
    merged = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(merged, logits(beside.model), rtol=1e-4, atol=1e-4)
    assert float((merged - base).abs().max()) > 1e-3
    assert not (out / "adapter_config.json").exists()


def test_an_adapter_is_kept_for_plain_peft(minigpt: Minigpt, trained: Path, tmp_path: Path) -> None:
    lora, out = trained / "lora", tmp_path / "adapter"
    arguments = ["--model", lora, "--output_dir", out, "--keep_adapter"]
    assert minigpt("export", "hf", *arguments).status == 0
    base = AutoModelForCausalLM.from_pretrained(trained / "sft" / "hf")
    adapted = PeftModel.from_pretrained(base, str(out))
    assert torch.equal(logits(adapted), logits(Engine.load(lora, merged=False).model))
    assert not list(out.glob("model*"))
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert ends == GenerationConfig.from_pretrained(trained / "sft" / "hf").eos_token_id
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    assert "base_model:" not in card
    assert str(trained) not in card
    notes = tmp_path / ".adapter-20261128" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    named = minigpt("export", "hf", *arguments, "--base_model_name", "me/sft", "--overwrite")
    assert named.status == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/sft"
    assert "base_model: me/sft" in (out / "README.md").read_text()
    assert notes.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [notes.parent.name, "adapter"]


def test_no_adapter_to_keep(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adapter to keep"):
        hf.export_hf(str(trained / "sft"), tmp_path / "out", Card("x", ""), keep_adapter=True)


def test_an_adapter_on_a_grown_base_is_kept_with_its_rows(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
    small = tiny.model("llama", vocab_size=275)
    save_model(small, tokenizer, tmp_path / "base")
    fit_vocabulary(small, tokenizer)
    adapted = add_adapter(small, Lora(r=2), str(tmp_path / "base"))
    save_adapter(adapted, tokenizer, tmp_path / "lora")
    numbers = hf.export_hf(
        str(tmp_path / "lora"), tmp_path / "out", Card("out", ""), keep_adapter=True
    )
    assert numbers["max_logit_difference"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    lines = card.split("```")[1].replace('"path/to/the/base"', repr(str(tmp_path / "base")))
    names: dict[str, Any] = {}
    exec(lines.replace('"out"', repr(str(tmp_path / "out"))), names)  # as a user would
    ids = torch.arange(280)[None]
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(ids).logits, adapted.eval()(ids).logits)
    hf.export_hf(str(tmp_path / "lora"), tmp_path / "merged", Card("x", ""))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 280


def spoil_weights(engine: Any) -> None:
    with torch.no_grad():
        engine.model.get_output_embeddings().weight[7].add_(0.01)


def spoil_tokens(engine: Any) -> None:
    engine.tokenizer.add_tokens([AddedToken("\n", normalized=False)])


def spoil_ends(engine: Any) -> None:
    engine.model.generation_config.eos_token_id = None


def spoil_start(engine: Any) -> None:
    engine.tokenizer.backend_tokenizer.post_processor = None


def spoil_template(engine: Any) -> None:
    engine.tokenizer.chat_template = engine.tokenizer.chat_template.replace("\n", "")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, "logits differ"),
        (spoil_tokens, "token ids differ"),
        (spoil_template, "chats are rendered otherwise"),
    ],
)
def test_a_failed_check_leaves_nothing(
    spoil: Callable[[Any], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    trained: Path,
    tmp_path: Path,
) -> None:
    """What is spoilt after the model was observed is found in the export."""
    spoil_after_observing(monkeypatch, spoil)
    with pytest.raises(ModelError, match=message):
        hf.export_hf(str(trained / "sft"), tmp_path / "out", Card("x", ""))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(spoil_ends, "replies end with .*, 9"), (spoil_start, "a text begins with")],
)
def test_a_lost_end_or_start_is_found(
    spoil: Callable[[Any], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    saved: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = saved("llama", gemma)
    GenerationConfig(eos_token_id=[1, 9]).save_pretrained(model)
    spoil_after_observing(monkeypatch, spoil)
    with pytest.raises(ModelError, match=message):
        hf.export_hf(str(model), tmp_path / "out", Card("x", ""))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_chats_that_inference_sends_as_other_ids_are_found(
    kind: str, monkeypatch: pytest.MonkeyPatch, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Texts and rendered chats are equal all the same."""
    encode = ChatCodec.encode_prompt

    def with_one_more(codec: ChatCodec, messages: Any) -> list[int]:
        return [*encode(codec, messages), *codec.encode(["\n"])[0]]

    model = str(saved("qwen3"))
    exports = {"hf": hf.export_hf, "gguf": gguf.export_gguf}
    numbers = exports[kind](model, tmp_path / "good", Card("x", ""))
    assert numbers["chats_with_equal_ids"] == "3 of 3"
    monkeypatch.setattr(ChatCodec, "encode_prompt", with_one_more)
    with pytest.raises(ModelError, match=r"ids of chats differ.*chats_with_equal_ids 0 of 3"):
        exports[kind](model, tmp_path / "out", Card("x", ""))
    assert not (tmp_path / "out").exists()


def spoil_after_observing(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], None]) -> None:
    observe = hf.observe

    def spoilt(engine: Engine) -> Any:
        expected = observe(engine)
        spoil(engine)
        return expected

    monkeypatch.setattr(hf, "observe", spoilt)


MARKED = "{%- for m in messages -%}A{BEGIN}B{{ m['content'] }}C{END}D{%- endfor -%}"


@pytest.mark.parametrize("begin", ["{% generation %}", " {%- generation -%} ", "{%generation-%}\n"])
@pytest.mark.parametrize("end", ["\n  {% endgeneration %}\n", " {%- endgeneration %}\n x"])
def test_marks_go_with_the_space_that_they_swallow(
    begin: str, end: str, saved: Callable[..., Path]
) -> None:
    template = MARKED.replace("{BEGIN}", begin).replace("{END}", end)
    tokenizer = tokenizers.load(saved("llama"))
    tokenizer.chat_template = template
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    hf.use_plain_template(tokenizer)
    assert "generation" not in tokenizer.chat_template
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == rendered


def test_a_template_that_needs_its_marks_is_refused(saved: Callable[..., Path]) -> None:
    tokenizer = tokenizers.load(saved("llama"))
    tokenizer.chat_template = (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    )
    with pytest.raises(ConfigError, match="renders chats otherwise"):
        hf.use_plain_template(tokenizer)


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("notes", [], "no place for an export: it holds notes.txt"),
        ("notes", ["--overwrite"], "no place for an export: it holds notes.txt"),
        ("notes/notes.txt", ["--overwrite"], "no place for an export: it holds notes.txt"),
        ("done", [], "already holds an export. Choose another place, or replace it with"),
        ("sft", ["--overwrite"], "holds the model itself"),
        ("sft/hf", ["--overwrite"], "holds the model itself"),
        ("new", ["--base_model_name", "x"], "goes with --keep_adapter"),
        ("notes/notes.txt/new", [], "Cannot write to"),
        ("new", ["--results", "none.json"], "none.json cannot be read"),
        ("new", ["--results", "list.json"], "list.json holds no JSON object"),
    ],
)
def test_places_that_are_taken(
    minigpt: Minigpt,
    monkeypatch: pytest.MonkeyPatch,
    trained: Path,
    tmp_path: Path,
    path: str,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "sft", "sft", ignore=shutil.ignore_patterns("checkpoints"))
    for name in ("notes/notes.txt", "done/model.safetensors", "list.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("[1]")
    write_manifest(Path("done"))
    before = sorted(tmp_path.rglob("*"))
    outcome = minigpt("export", "hf", "--model", "sft", "--output_dir", path, *more)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("minigpt: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_replaces_nothing_but_an_export(minigpt: Minigpt, tmp_path: Path) -> None:
    """What was added, and what was changed since, is named, up to five of it."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "README.md"):
        (out / name).write_text(name)
    write_manifest(out)
    (out / "README.md").write_text("a card that was written by hand")
    for name in ("a.gguf", "b.safetensors", "notes/c.txt", "d_config.json", "e.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    arguments = ["export", "hf", "--model", "none", "--output_dir", out]
    for more in ((), ("--overwrite",)):
        names = "README.md, a.gguf, b.safetensors, d_config.json, e.txt and more"
        assert_refused(
            minigpt(*arguments, *more), f"{out} is no place for an export: it holds {names}"
        )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_of_two_exports_to_one_path_the_second_is_refused(
    kind: str, minigpt: Minigpt, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["export", kind, "--model", trained / "sft", "--output_dir", out]
    with atomic_directory(out):
        assert_refused(minigpt(*arguments), f"Another process is writing {out}")
    if kind == "gguf":
        file = tmp_path / "out.gguf"
        arguments = ["export", kind, "--model", trained / "sft", "--output", file]
        with atomic_file(file, exclusive=True) as partial:
            assert_refused(minigpt(*arguments), f"Another process is writing {file}")
            partial.touch()


def test_what_a_killed_export_moved_aside_is_back_even_if_the_next_one_fails(
    minigpt: Minigpt, tmp_path: Path
) -> None:
    out, killed = tmp_path / "out", tmp_path / f"{STAGING}killed"
    with staging(out) as private:
        shutil.copytree(private, killed)
    (killed / OLD).mkdir()
    (killed / OLD / "config.json").write_text("earlier")
    write_manifest(killed / OLD)
    assert_refused(
        minigpt("export", "hf", "--model", "none", "--output_dir", out, "--overwrite"), "none"
    )
    assert (out / "config.json").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
