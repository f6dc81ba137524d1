"""Training in chat templates other than ours, and in one that the config names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import templates
import tiny
import tiny_runs
from transformers import AutoTokenizer

from minigpt.__main__ import main
from minigpt.cli.trainer import run
from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import Message
from minigpt.errors import ConfigError, TokenizerError
from minigpt.export import check
from minigpt.infer.engine import Engine
from minigpt.infer.gguf import Gguf

REPOSITORY = Path(__file__).parents[2]


def published(directory: Path, name: str) -> Path:
    """Save a tiny model with a tokenizer and a template as they are published."""
    tokenizer = tokenizers.load(tiny.tokenizer(directory / "own"))
    templated = templates.tokenizer("bytes", name, False, tokenizer)
    model = tiny.model("qwen3", vocab_size=len(templated), max_position_embeddings=1024)
    model.save_pretrained(directory / name)
    tokenizers.save(templated, directory / name)
    return directory / name


@pytest.mark.parametrize("name", ["qwen3", "glm", "mistral"])
def test_the_bundled_chats_train_a_model_with_a_published_template(
    name: str, tmp_path: Path
) -> None:
    start, out = published(tmp_path, name), tmp_path / "run"
    options = [
        *("--config", str(REPOSITORY / "configs/sft.yaml")),
        *("--model.init_args.init_from", str(start), "--run_dir", str(out)),
        *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2"),
        *("--trainer.accelerator", "cpu", "--data.init_args.cache_dir", str(tmp_path / "cache")),
        *("--data.init_args.train", str(REPOSITORY / "data/mini/sft.jsonl")),
        *("--data.init_args.val", str(REPOSITORY / "data/mini/sft_val.jsonl")),
        *("--data.init_args.exam", "null", "--model.init_args.sample_prompts", "[hi]"),
        *("--model.init_args.sampling.max_new_tokens", "4"),
    ]
    run(["fit", *options])
    assert tiny_runs.metrics(out, "val/loss")
    saved = AutoTokenizer.from_pretrained(out / "hf").chat_template
    assert saved.strip() == templates.source(name, False).strip()


@pytest.mark.parametrize("stage", ["sft", "dpo", "lora"])
def test_a_template_from_a_file_is_used_and_travels_with_the_run(
    stage: str,
    world: Path,
    fit: tiny_runs.Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "TEXTS", 50)
    file, run_dir = tmp_path / "mine.jinja", tmp_path / "run"
    file.write_text(templates.source("yi", False).replace("\\n' -}}", ": ' -}}"))
    begun = "<|im_start|>assistant: "
    trained = fit(stage, "run", model__init_args__chat_template=str(file)).datamodule
    engine = Engine.load(run_dir)
    assert engine.tokenizer.chat_template == file.read_text()
    learnt = trained.train_subsets[0].store.tokens[:].tolist()
    assert begun in engine.tokenizer.decode(learnt)
    assert "<|im_start|>assistant\n" not in engine.tokenizer.decode(learnt)
    hf, gguf = tmp_path / "hf", tmp_path / "gguf"
    for kind, output_dir in (("hf", hf), ("gguf", gguf)):
        assert main(["export", kind, "--model", str(run_dir), "--output_dir", str(output_dir)]) == 0
    exported = AutoTokenizer.from_pretrained(hf)
    chat = [{"role": "user", "content": "the cat"}]
    prompt = exported.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith(begun)
    (written,) = gguf.glob("*.gguf")
    question = [Message("user", "the cat")]
    assert Gguf(written).encode(question) == engine.encode(question)
    assert engine.tokenizer.decode(engine.encode(question)) == prompt


def test_named_templates(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "own"))
    template = tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "short": "{{ messages[-1].content }}"}
    tokenizer.save_pretrained(tmp_path / "named")
    assert tokenizers.load(tmp_path / "named").chat_template == template
    assert (
        tokenizers.load(tmp_path / "named", "short").chat_template == "{{ messages[-1].content }}"
    )
    with pytest.raises(ConfigError, match=r"long is neither a file.*has: default, short"):
        tokenizers.load(tmp_path / "named", "long")
    tokenizer.chat_template = {"one": template, "short": template}
    tokenizer.save_pretrained(tmp_path / "nameless")
    loaded = tokenizers.load(tmp_path / "nameless")
    with pytest.raises(TokenizerError, match=r"several chat templates \(one, short\)"):
        Engine(tiny.model("qwen3"), loaded)
    listed = tmp_path / "named" / "tokenizer_config.json"  # as older files have it
    config = json.loads(listed.read_text())
    config["chat_template"] = [
        {"name": "default", "template": template},
        {"name": "b", "template": "x"},
    ]
    listed.write_text(json.dumps(config))
    for file in (tmp_path / "named").glob("**/*.jinja"):
        file.unlink()
    assert tokenizers.load(tmp_path / "named").chat_template == template


def test_a_tokenizer_file_that_cuts_and_pads_is_read_whole(tmp_path: Path) -> None:
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "own"))
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.backend_tokenizer.save(str(tmp_path / "own" / "tokenizer.json"))
    backend = tokenizers.load(tmp_path / "own").backend_tokenizer
    assert len(backend.encode("the cat sat").ids) > 2
    assert len(backend.encode_batch_fast(["a", "the cat sat"])[0].ids) == 1
