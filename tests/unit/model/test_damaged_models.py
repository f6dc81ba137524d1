"""Damaged models and adapters: each is loaded, or refused in one paragraph."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import damage
import pytest
import tiny
from hypothesis import strategies as st

from minigpt.__main__ import main
from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import Message
from minigpt.errors import MiniGPTError, ModelError
from minigpt.infer.engine import Engine, Sampling
from minigpt.model.lora import ADAPTER, Lora, add_adapter, save_adapter
from minigpt.model.pretrained import base_of, find_model, load_config, load_model, save_model

SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TOKEN: dict[str, Any] = {"id": 300, "content": "x", "special": True}
TOKEN |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
# Values that once gave tracebacks, hangs or aborts.
BAD_VALUES: list[tuple[str, str, Any]] = [
    ("config.json", "hidden_act", "nope"),
    ("config.json", "hidden_act", 5),
    ("config.json", "hidden_size", 0),
    ("config.json", "hidden_size", 10**12),
    ("config.json", "num_hidden_layers", 10**9),
    ("config.json", "num_hidden_layers", -1),
    ("config.json", "num_attention_heads", 0),
    ("config.json", "num_attention_heads", 3),
    ("config.json", "num_key_value_heads", 0),
    ("config.json", "num_key_value_heads", "two"),
    ("config.json", "vocab_size", 10**9),
    ("config.json", "vocab_size", None),
    ("config.json", "vocab_size", "many"),
    ("config.json", "max_position_embeddings", "long"),
    ("config.json", "max_position_embeddings", -5),
    ("config.json", "max_position_embeddings", [1]),
    ("config.json", "attention_dropout", 2),
    ("config.json", "rms_norm_eps", "small"),
    ("config.json", "rope_parameters", {"rope_type": "linear"}),
    ("config.json", "rope_parameters", {"rope_type": "nope", "rope_theta": 1.0}),
    ("config.json", "rope_parameters", 7),
    ("config.json", "layer_types", ["nope", "nope"]),
    ("config.json", "layer_types", 3),
    ("config.json", "dtype", "float7"),
    ("config.json", "model_type", None),
    ("config.json", "model_type", ["qwen3"]),
    ("config.json", "model_type", "t5"),
    ("config.json", "architectures", 5),
    ("config.json", "quantization_config", {"quant_method": "nope"}),
    ("generation_config.json", "eos_token_id", "x"),
    ("generation_config.json", "eos_token_id", [[1]]),
    ("generation_config.json", "eos_token_id", 2**70),
    ("generation_config.json", "eos_token_id", {"a": 1}),
    ("tokenizer_config.json", "chat_template", 5),
    ("tokenizer_config.json", "eos_token", {"a": 1}),
    ("tokenizer_config.json", "eos_token", ["a"]),
    ("tokenizer_config.json", "tokenizer_class", 5),
    ("tokenizer_config.json", "added_tokens_decoder", {"x": 1}),
    ("tokenizer_config.json", "extra_special_tokens", 7),
    ("tokenizer_config.json", "model_max_length", "long"),
    ("tokenizer.json", "model", None),
    ("tokenizer.json", "pre_tokenizer", {"type": "nope"}),
    ("tokenizer.json", "added_tokens", [{"id": 2**40, "content": "x"}]),
    ("tokenizer.json", "added_tokens", [TOKEN | {"id": 2**31}]),
    ("tokenizer.json", "added_tokens", [TOKEN | {"content": ""}]),
]
TEMPLATES = (
    "{{ nope(1) }}",
    "{% for a in",
    "{{ 1 / 0 }}",
    "{{ messages[7]['x'] }}",
    "{{ messages | nope }}",
    "{{ messages[0].content.foo.bar }}",
    "{{ 'a' * 10**12 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all of its files, the chat template among them."""
    root = tmp_path_factory.mktemp("sound")
    tokenizer = tokenizers.load(tiny.tokenizer(root / "tokenizer"))
    model = tiny.model("qwen3")
    save_model(model, tokenizer, root / "model")
    adapted = add_adapter(tiny.model("qwen3"), Lora(r=2), str(root / "model"))
    save_adapter(adapted, tokenizer, root / "adapter")
    return root


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound / "model", tmp_path / "model"))


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound / "adapter", tmp_path / "adapter"))


def change(file: Path, key: str, value: Any) -> None:
    content = json.loads(file.read_text())
    content[key] = value
    file.write_text(json.dumps(content))


def use(model: Path) -> None:
    """Do what `generate`, `chat` and the start of `fit` do."""
    load_config(model)
    engine = Engine.load(model)
    engine.complete([(Message("user", "the cat"),), "the"], Sampling(2))


@pytest.mark.parametrize(("file", "key", "value"), BAD_VALUES)
def test_a_damaged_value_is_refused_or_read(model: Path, file: str, key: str, value: Any) -> None:
    change(model / file, key, value)
    with suppress(MiniGPTError):
        damage.assert_one_paragraph(lambda: use(model))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails_is_refused(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(MiniGPTError, match="template"):
        damage.assert_one_paragraph(lambda: use(model))


def test_a_template_that_never_ends_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.data.chat.RENDER_SECONDS", 0.3)
    loop = "{% for i in range(99999) %}"
    (model / "chat_template.jinja").write_text(loop * 3 + "{% endfor %}" * 3)
    with pytest.raises(MiniGPTError, match=r"template does not end: a chat takes more than 0\.3"):
        use(model)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux counts what is taken")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 4000000000 }}",
        "{% set ns = namespace(text='aaaa') %}{% for i in range(40) %}"
        "{% set ns.text = ns.text ~ ns.text %}{% endfor %}{{ ns.text }}",
    ],
)
def test_a_template_that_takes_all_memory_is_refused(
    template: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.data.chat.RENDER_MEMORY", 1 << 26)
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(MiniGPTError, match="template does not end: a chat takes more than 20 sec"):
        use(model)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(a|aa)+$", "(x+x+)+y"])
def test_a_pattern_of_exponential_time_ends(
    pattern: str, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library that searches gives up after so many steps, and its panic is no traceback."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    change(model / "tokenizer.json", "pre_tokenizer", split | {"invert": False})
    prompt = ("--text", "--max_new_tokens", "1", "--prompt", "a" * 60 + "!")
    status = main(["generate", "--model", str(model), *prompt])
    err = capfd.readouterr().err
    assert "Traceback" not in err
    if status:
        assert status == 2
        assert "minigpt: The tokenizer cannot read a text: Onig: Regex search error" in err


@damage.counts
def test_damaged_models(model: Path, sound: Path, count: int) -> None:
    undamaged = {name: (sound / "model" / name).read_bytes() for name in SMALL_FILES}
    weights = (sound / "model" / "model.safetensors").read_bytes()
    damaged = [
        damage.damaged_json(json.loads(content)).map(lambda new, name=name: (name, new))
        for name, content in undamaged.items()
    ]
    large_files = [("model.safetensors", weights), ("tokenizer.json", undamaged["tokenizer.json"])]
    template = "chat_template.jinja"
    large_files.append((template, (sound / "model" / template).read_bytes()))
    damaged += [
        damage.damaged_bytes(content, 2000).map(lambda new, name=name: (name, new))
        for name, content in large_files
    ]

    def read(example: tuple[str, bytes]) -> None:
        name, content = example
        before = (model / name).read_bytes()
        (model / name).write_bytes(content)
        try:
            use(model)
        finally:
            (model / name).write_bytes(before)

    damage.assert_read_or_refused(count, st.one_of(damaged), read)


@damage.counts
def test_damaged_adapters(adapter: Path, sound: Path, count: int) -> None:
    config = json.loads((adapter / ADAPTER).read_text())
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    damaged = st.one_of(
        damage.damaged_json(config).map(lambda new: (ADAPTER, new)),
        damage.damaged_json({"weights": "abc"}).map(lambda new: ("base.json", new)),
        damage.damaged_json({"type": "yarn", "factor": 2}).map(lambda n: ("rope_scaling.json", n)),
        damage.damaged_bytes(weights, 1500).map(lambda new: ("adapter_model.safetensors", new)),
    )

    def read(example: tuple[str, bytes]) -> None:
        name, content = example
        before = (adapter / name).read_bytes() if (adapter / name).exists() else None
        (adapter / name).write_bytes(content)
        try:
            Engine.load(adapter)
        finally:
            if before is None:
                (adapter / name).unlink()
            else:
                (adapter / name).write_bytes(before)

    damage.assert_read_or_refused(count, damaged, read)


@pytest.mark.parametrize("through", [0, 2])
def test_an_adapter_that_names_itself_as_base_is_refused(
    adapter: Path, tmp_path: Path, through: int
) -> None:
    links = [adapter, *(tmp_path / f"link{number}" for number in range(through))]
    for link in links[1:]:
        shutil.copytree(adapter, link)
    for link, base in zip(links, [*links[1:], links[0]], strict=True):
        change(link / ADAPTER, "base_model_name_or_path", str(base))
    for read in (base_of, load_model, load_config, Engine.load):
        with pytest.raises(ModelError, match="is named as a base of itself"):
            damage.assert_one_paragraph(lambda read=read: read(adapter))


@pytest.mark.parametrize("rank", [10**12, -1, "x"])
def test_a_rank_that_no_matrix_has_is_refused(adapter: Path, rank: Any) -> None:
    change(adapter / ADAPTER, "r", rank)
    with pytest.raises(ModelError, match=str(adapter)):
        Engine.load(adapter)


@pytest.mark.parametrize("name", [*SMALL_FILES, "model.safetensors", "special_tokens_map.json"])
def test_a_pipe_in_place_of_a_file_is_refused(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(MiniGPTError):
        damage.assert_one_paragraph(lambda: use(model))


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "a\nb/c", "\ud800", "a/b/c/d"])
def test_a_name_that_no_model_has_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    reads: list[Callable[[str], object]] = [find_model, load_model, tokenizers.load]
    for read in reads:
        with pytest.raises(MiniGPTError):
            read(name)
