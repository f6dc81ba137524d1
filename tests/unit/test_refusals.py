"""What `minigpt fit` says to bad input, and what becomes of run directories."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import damage
import pytest
import tiny_runs
import yaml
from tiny_runs import assert_refused
from transformers import AutoModelForCausalLM

from minigpt.cli.parser import check_configs, with_file_names
from minigpt.cli.verbs import TRAINER_VERBS
from minigpt.data import tokenizer as tokenizers

Minigpt = Callable[..., Any]


# Rows


def chat(*turns: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


LONG = "the cat " * 90
BAD_ROWS: dict[str, tuple[bytes | str, str, str]] = {  # row, field, a fragment of the message
    "not json": ("{oops", "", "invalid JSON at column 2"),
    "wrong keys": ('{"foo": 1}', "", "not a chat row: its keys are ['foo']. Accepted are"),
    "wrong type": (chat(("user", 5)), "messages[0].content", "must be a string, not a number"),
    "bad utf-8": (
        b'{"messages": "\xff"}',
        "",
        "byte 15 of the line is neither UTF-8 nor Chinese in GB18030. Convert",
    ),
    "roles": (chat(("user", "a"), ("user", "b")), "messages[1].role", "'user' where 'assistant'"),
    "no assistant": (chat(("user", "a")), "messages[0].role", "no assistant message"),
    "special token": (
        chat(("user", "a"), ("assistant", "b<|im_end|>")),
        "messages[1].content",
        "holds the special token '<|im_end|>'. Remove it",
    ),
    "surrogate": (
        chat(("user", "\ud800"), ("assistant", "b")),
        "messages[0].content",
        "lone surrogate",
    ),
}


def rows_file(trained: Path, tmp_path: Path, *rows: bytes | str) -> Path:
    """The good rows of the sample, and some more."""
    file = tmp_path / "rows.jsonl"
    more = [row if isinstance(row, bytes) else row.encode() for row in rows]
    file.write_bytes((trained / "sft.jsonl").read_bytes() + b"\n".join(more) + b"\n")
    return file


@pytest.mark.parametrize(("row", "field", "fragment"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row(
    fit: Minigpt, trained: Path, tmp_path: Path, row: bytes | str, field: str, fragment: str
) -> None:
    file = rows_file(trained, tmp_path, row)
    outcome = fit("sft", data__init_args__train=str(file))
    assert_refused(outcome, f"{file}:49:{field}".rstrip(":"), fragment)
    assert [path.name for path in (tmp_path / "run").glob("[!.]*")] == ["status.json"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 2
    assert fit("sft").status == 0  # nothing blocks a second try


def test_empty_file(fit: Minigpt, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    file = str(tmp_path / "rows.jsonl")
    assert_refused(
        fit("sft", data__init_args__train=file), file, "holds no rows", "one JSON object on each"
    )


def test_missing_file(fit: Minigpt) -> None:
    assert_refused(fit("sft", data__init_args__train="none.jsonl"), "none.jsonl", "Check")


def test_long_rows_are_cut_and_counted(fit: Minigpt, trained: Path, tmp_path: Path) -> None:
    file = rows_file(trained, tmp_path, chat(("user", "the"), ("assistant", LONG)))
    before = fit("sft", "--overwrite=true", data__init_args__cache_dir=str(tmp_path / "stores"))
    after = fit("sft", "--overwrite=true", data__init_args__train=str(file))
    cut = r"rows\.jsonl: 49 rows, .* (\d+) rows cut to the maximum length"
    uncut = r"sft\.jsonl: 48 rows, .* (\d+) rows cut to the maximum length"
    counts = [re.search(p, o.err) for p, o in ((uncut, before), (cut, after))]
    numbers = [int(match[1]) for match in counts if match]
    assert numbers[1] == numbers[0] + 1


def test_bad_rows_can_be_skipped(fit: Minigpt, trained: Path, tmp_path: Path) -> None:
    file = rows_file(trained, tmp_path, "{oops")
    outcome = fit("sft", data__init_args__train=str(file), data__init_args__on_bad_row="skip")
    assert outcome.status == 0
    assert f"skipped 1 bad rows: 1 bad_json (first {file}:49)" in outcome.err


def test_too_many_skipped_rows_stop_the_run(fit: Minigpt, trained: Path, tmp_path: Path) -> None:
    file = rows_file(trained, tmp_path, "{oops", chat(("user", "a")), "{oops", "{}")
    options = {"data__init_args__train": str(file), "data__init_args__on_bad_row": "skip"}
    last = assert_refused(
        fit("sft", **options), f"2 bad_json (first {file}:49)", "more than 5.0% of 52 rows"
    )
    assert "1 no_assistant" in last
    assert fit("sft", **options, data__init_args__max_bad_share=0.1).status == 0


# Models and tokenizers


@pytest.mark.parametrize("init_from", ["outputs/pretrain", "./none", "/none/such"])
def test_missing_model(
    fit: Minigpt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, init_from: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(
        fit("sft", model__init_args__init_from=init_from),
        f"no trained model in {init_from}",
        "minigpt fit --config configs/pretrain.yaml",
    )


def test_missing_tokenizer(fit: Minigpt) -> None:
    assert_refused(
        fit("pretrain", model__init_args__tokenizer="outputs/none"),
        "no tokenizer at outputs/none",
        "minigpt tokenizer train",
    )


def test_tokenizer_larger_than_the_model(fit: Minigpt, trained: Path, tmp_path: Path) -> None:
    small = AutoModelForCausalLM.from_pretrained(trained / "sft" / "hf")
    small.resize_token_embeddings(300)
    small.save_pretrained(tmp_path / "small")
    outcome = fit(
        "sft",
        model__init_args__init_from=str(tmp_path / "small"),
        model__init_args__tokenizer=str(trained / "tokenizer"),
    )
    assert_refused(
        outcome, "The tokenizer has 320 tokens but the model only 300", "saved with the model"
    )


def test_tokenizer_of_other_tokens(fit: Minigpt, trained: Path, tmp_path: Path) -> None:
    other = tokenizers.load(trained / "tokenizer")
    other.add_tokens(["another"])
    tokenizers.save(other, tmp_path / "other")
    outcome = fit("sft", model__init_args__tokenizer=str(tmp_path / "other"))
    assert_refused(
        outcome,
        "The tokenizer given has 321 tokens, the model's own 320",
        "Leave the tokenizer out",
    )


def test_damaged_model(fit: Minigpt, trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "damaged"
    model.mkdir()
    for file in (trained / "sft" / "hf").iterdir():
        content = file.read_bytes()
        cut = len(content) // 2 if file.suffix == ".safetensors" else len(content)
        (model / file.name).write_bytes(content[:cut])
    assert_refused(
        fit("sft", model__init_args__init_from=str(model)), f"The model at {model} cannot be"
    )


# Configs and options


@pytest.mark.parametrize(
    ("changes", "key", "fragment"),
    [
        ({"model__init_args__foo": 1}, "model.init_args.foo", "no such option"),
        ({"model__init_args__optimizer__lrr": 1}, "model.init_args.optimizer.lrr", "mean lr?"),
        ({"model__init_args__lora": {"rr": 1}}, "model.init_args.lora.rr", "no such option"),
        ({"data__init_args__max_len": 9}, "data.init_args.max_len", "mean max_length?"),
        ({"trainer__max_step": 9}, "trainer.max_step", "mean max_steps?"),
        ({"rundir": "x"}, "rundir", "mean run_dir?"),
        (
            {"model__class_path": "SFTModul"},
            "model",
            "no class SFTModul. Did you mean SFTModule? The stages are",
        ),
        (
            {"data__class_path": "SFTModule"},
            "data",
            "no class SFTModule. Did you mean SFTDataModule? There are PretrainData",
        ),
        ({"trainer__max_steps": "many"}, "trainer.max_steps", "a whole number, but is many"),
        (
            {"model__init_args__optimizer__lr": "fast"},
            "model.init_args.optimizer.lr",
            "must be a number, but is fast",
        ),
        (
            {"model__init_args__optimizer__name": "adan"},
            "model.init_args.optimizer.name",
            "must be one of 'adamw', 'muon', but is adan",
        ),
        ({"data__init_args__train": 5}, "data.init_args.train", "a string or list or dict, but is"),
        ({"checkpoint": None}, "checkpoint", "it holds no options: give some, or leave it out"),
        ({"validate": None}, "validate", "it holds no options"),
        ({"model__init_args__optimizer": None}, "model.init_args.optimizer", "it holds no options"),
        ({"overwrite": "maybe"}, "overwrite", "must be true or false, but is maybe"),
    ],
)
def test_bad_config(
    fit: Minigpt, tmp_path: Path, changes: dict[str, Any], key: str, fragment: str
) -> None:
    outcome = fit("sft", **changes)
    config = next(tmp_path.glob("*.yaml"))
    assert "class '" not in assert_refused(outcome, f"{config}:1: {key}: ", fragment)
    assert not (tmp_path / "run").exists()


def test_a_bad_key_is_found_by_its_line_in_the_last_config(
    fit: Minigpt, minigpt: Minigpt, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("# more\ntrainer:\n  max_steps: 5\n  max_stepz: 5\n")
    assert_refused(fit("sft", "--config", overlay), f"{overlay}:4: trainer.max_stepz", "max_steps?")


@pytest.mark.parametrize(
    ("option", "fragment"),
    [
        ("--trainer.maxx_steps=3", "Did you mean max_steps?"),
        ("--model.init_args.optimizer.lrr=3", "Did you mean lr?"),
        ("--runn_dir=3", "Did you mean run_dir?"),
        ("--data.init_args.max_length=long", "must be a whole number, but is long"),
        ("--data.max_length=long", "must be a whole number, but is long"),
    ],
)
def test_bad_option(fit: Minigpt, option: str, fragment: str) -> None:
    assert_refused(fit("sft", option), f"minigpt: {option.partition('=')[0]}: ", fragment)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "cannot be read: No such file or directory. Check the name"),
        (b"model: [1, 2\nfoo: }", ":2:4: invalid YAML: "),
        (b"\tmodel: 1", ":1:1: invalid YAML: "),
        (b"hello", "this one holds 'hello'"),
        (b"", "this one holds nothing"),
        (b"trainer:", "this one holds {'trainer': None}"),
        (b"run_dir: \xff", "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}", "-c {}"])
def test_bad_config_file(
    minigpt: Minigpt, tmp_path: Path, content: bytes | None, fragment: str, form: str
) -> None:
    file = tmp_path / "stage.yaml"
    if content is not None:
        file.write_bytes(content)
    assert_refused(minigpt("fit", *form.format(file).split(" ")), f"{file}", fragment)


BOMB = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
BOMB += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in pairwise("abcdefghi")]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("\n".join(BOMB), "holds more than 100,000 values"),
        ("run_dir: &a [*a]", "holds more than 100,000 values"),
        ("[" * 5000, "nested too deeply"),
        ("x" * 2_000_000, "has more than 1,048,576 bytes"),
        ("run_dir: 2001-99-99", "month must be in 1..12"),
    ],
)
def test_a_config_without_end(
    minigpt: Minigpt, tmp_path: Path, content: str, fragment: str
) -> None:
    (tmp_path / "stage.yaml").write_text(content)
    assert_refused(
        minigpt("fit", "--config", tmp_path / "stage.yaml"), f"{tmp_path}/stage.yaml", fragment
    )


def test_a_pipe_as_config(minigpt: Minigpt, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stage.yaml")
    assert_refused(minigpt("fit", "--config", tmp_path / "stage.yaml"), "is no regular file")


@damage.counts
def test_damaged_configs(minigpt: Minigpt, trained: Path, tmp_path: Path, count: int) -> None:
    config = tiny_runs.config(trained, "sft", tmp_path / "run")
    file = tmp_path / "stage.yaml"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        check_configs(["--config", str(file)])

    text = yaml.safe_dump(config).encode()
    damage.assert_read_or_refused(
        count, damage.damaged_bytes(text) | damage.damaged_json(config), read
    )


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("null", "--data.init_args.train={}"),
        ("#c", "--data.init_args.train {}"),
        ("5", "--data.train={}"),
        ("1e3", "--data.train {}"),
        ("[a", "--data.train={}"),
        ("b: c", "--data.train={}"),
    ],
)
def test_names_of_files_that_look_like_yaml(
    fit: Minigpt,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    form: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("{oops")
    words = [word.format(name) for word in form.split()]
    assert_refused(fit("sft", *words), f"minigpt: {name}:1: invalid JSON")


def test_names_that_are_not_read_as_yaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("null", "rows"):
        Path(name).touch()
    args = ["fit", "--data.predict=null", "--model.init_from", "null", "--data.val=rows"]
    args += ["--data.train=~", "--trainer.max_steps", "null"]
    assert with_file_names(args) == [
        *("fit", "--data.predict=./null", "--model.init_from", "./null", "--data.val=rows"),
        *("--data.train=~", "--trainer.max_steps", "null"),
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "abc"),
        ("LOCAL_RANK", ""),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "1.5"),
        ("SLURM_PROCID", "²"),
        ("MASTER_PORT", "9" * 30),
    ],
)
def test_numbers_of_the_environment(
    minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    for verb in ("fit", "data"):
        assert_refused(minigpt(verb), f"The environment sets {name} to {value!r}", "Unset it")


@pytest.mark.parametrize("verb", TRAINER_VERBS)
def test_no_config(minigpt: Minigpt, verb: str) -> None:
    assert_refused(minigpt(verb), "name a config with --config FILE")


def test_half_of_an_option(fit: Minigpt) -> None:
    outcome = fit("pretrain", "--model.init_args.rope_scaling.factor", "2")
    assert_refused(outcome, "model.rope_scaling: type must be given, too")


BAD_NUMBERS = [
    ("data__init_args__tokens_per_batch", 0),
    ("data__init_args__tokens_per_batch", -5),
    ("data__init_args__tokens_per_batch", 63),
    ("data__init_args__max_length", 0),
    ("data__init_args__data_limit", 0),
    ("data__init_args__max_prompt_length", 0),
    ("data__init_args__val_share", -0.1),
    ("data__init_args__max_bad_share", 1.1),
    ("data__init_args__max_too_long_share", -0.1),
    ("data__init_args__seed", -1),
    ("data__init_args__seed", 2**70),
    ("data__init_args__num_workers", -1),
    ("data__init_args__num_workers", 10**9),
    ("seed_everything", -1),
    ("seed_everything", 2**32),
    ("trainer__max_steps", 0),
    ("trainer__max_steps", -5),
    ("trainer__max_epochs", 0),
    ("trainer__accumulate_grad_batches", 0),
    ("trainer__log_every_n_steps", 0),
    ("trainer__val_check_interval", 0),
    ("trainer__val_check_interval", 0.5),
    ("trainer__check_val_every_n_epoch", 0),
    ("checkpoint__every", 0),
    ("checkpoint__keep", 0),
    ("model__init_args__optimizer__lr", 0),
    ("model__init_args__optimizer__lr", -1e-3),
    ("model__init_args__optimizer__weight_decay", -1),
    ("model__init_args__optimizer__momentum", 1),
    ("model__init_args__schedule__warmup", -1),
    ("model__init_args__lora__r", 0),
    ("model__init_args__lora__r", -1),
    ("model__init_args__lora__alpha", 0),
    ("model__init_args__lora__dropout", 1),
    ("model__init_args__sampling__top_p", 0),
]


@pytest.mark.parametrize(("path", "value"), BAD_NUMBERS)
def test_number_out_of_range(fit: Minigpt, path: str, value: float) -> None:
    outcome = fit("lora" if "lora" in path else "sft", **{path: value})
    assert_refused(outcome, path.rpartition("__")[2], value)


def test_beta_out_of_range(fit: Minigpt, trained: Path) -> None:
    assert_refused(
        fit("dpo", model__init_args__beta=0), "model.beta must be a number above 0, but is 0"
    )


def test_a_run_without_an_end(fit: Minigpt) -> None:
    assert_refused(fit("sft", trainer__max_steps=-1), "has no end: set trainer.max_steps or")


@pytest.mark.parametrize(
    "changes",
    [{"trainer__strategy": "dpp"}, {"trainer__devices": 0}, {"trainer__accelerator": "tpu"}],
)
def test_trainer_that_cannot_be_built(fit: Minigpt, changes: dict[str, Any]) -> None:
    assert_refused(fit("sft", **changes), "minigpt: trainer: ")


def test_several_machines_without_a_launcher(fit: Minigpt) -> None:
    assert_refused(
        fit("sft", trainer__num_nodes=2), "trainer.num_nodes is 2, but no launcher", "torchrun"
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("kv_heads", 3, "a multiple of kv_heads"),
        ("head_dim", 9, "make it even"),
        ("layers", 0, "1"),
    ],
)
def test_sizes_that_do_not_go_together(fit: Minigpt, name: str, value: int, words: str) -> None:
    outcome = fit("pretrain", **{f"model__init_args__architecture__{name}": value})
    assert_refused(
        outcome, f"model.init_args.architecture.{name if value != 3 else 'heads'} ", words
    )


@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_a_callback_that_watches_what_is_not_logged(fit: Minigpt, callback: str) -> None:
    watcher = {
        "class_path": f"lightning.pytorch.callbacks.{callback}",
        "init_args": {"monitor": "val/nothing"},
    }
    assert_refused(fit("sft", trainer__callbacks=[watcher]), "minigpt: trainer: ", "val/nothing")


def test_a_logger_whose_package_is_missing(fit: Minigpt) -> None:
    outcome = fit("sft", "--trainer.logger", "nowhere_installed.Logger")
    assert_refused(outcome, "--trainer.logger: the package nowhere_installed is not installed")


@pytest.mark.parametrize("option", ["init_from", "tokenizer"])
def test_a_hub_that_is_not_reachable(fit: Minigpt, option: str) -> None:
    stage = "sft" if option == "init_from" else "pretrain"
    outcome = fit(stage, **{f"model__init_args__{option}": "some-user/some-model"})
    assert_refused(
        outcome, "some-user/some-model cannot be loaded", "is not reachable", "HF_ENDPOINT"
    )


# Run directories


def content(run_dir: Path) -> dict[str, bytes]:
    files = (p for p in run_dir.rglob("*") if p.is_file() and p.name != "status.json")
    return {str(p): p.read_bytes() for p in files}


def test_finished_run_is_refused(fit: Minigpt, tmp_path: Path) -> None:
    assert fit("sft").status == 0
    before = content(tmp_path / "run")
    last = assert_refused(
        fit("sft"), tmp_path / "run", "--ckpt_path auto", "--overwrite true", "--run_dir"
    )
    assert "already holds a run (hf, checkpoints)" in last
    assert content(tmp_path / "run") == before
    assert fit("sft", "--ckpt_path", "auto", trainer__max_steps=4).status == 0
    assert (tmp_path / "run" / "checkpoints" / "step=4").is_dir()
    assert fit("sft", "--overwrite", "true", trainer__max_steps=2).status == 0
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"data__init_args__train": "none.jsonl"},
        {"model__init_args__init_from": "./none"},
        {"data__init_args__tokens_per_batch": 1},
    ],
)
def test_a_failed_overwrite_keeps_the_old_run(
    fit: Minigpt, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert fit("sft").status == 0
    before = content(tmp_path / "run")
    assert_refused(fit("sft", "--overwrite", "true", **changes))
    assert content(tmp_path / "run") == before


def test_a_run_is_made_anew_from_its_own_config(
    fit: Minigpt, minigpt: Minigpt, tmp_path: Path
) -> None:
    assert fit("sft").status == 0
    config = tmp_path / "run" / "config.yaml"
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert minigpt("fit", "--config", config, "--overwrite", "true").status == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "run").glob("events*"))) == 1


@pytest.mark.parametrize("run_dir", ["file", "file/run"])
def test_unwritable_run_directory(fit: Minigpt, tmp_path: Path, run_dir: str) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(
        fit("sft", "--run_dir", tmp_path / run_dir), f"Cannot write to {tmp_path / run_dir}: "
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_checkpoint(fit: Minigpt) -> None:
    assert_refused(fit("sft", "--ckpt_path", "none.ckpt"), "There is no checkpoint at none.ckpt")


def test_other_verbs_take_checkpoints_that_are_whole(
    fit: Minigpt, minigpt: Minigpt, tmp_path: Path
) -> None:
    assert fit("sft").status == 0
    validate = ("validate", "--config", tmp_path / "run-fit.yaml", "--ckpt_path")
    assert "val/loss" in minigpt(*validate, "auto").err
    assert_refused(minigpt(*validate, "none"), "There is no checkpoint at none")
    newest = tmp_path / "run" / "checkpoints" / "step=3"
    (newest / "state.pt").write_bytes(b"")
    assert_refused(
        minigpt(*validate, newest), f"{newest} is damaged: state.pt has 0 bytes instead of"
    )


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_verb_that_needs_a_run(minigpt: Minigpt, fit: Minigpt, tmp_path: Path, verb: str) -> None:
    fit("sft", data__init_args__train="none.jsonl")  # writes the config and fails
    config = next(tmp_path.glob("*.yaml"))
    assert_refused(minigpt(verb, "--config", config), "no trained model", "minigpt fit")


def test_without_validation_nothing_is_said_of_losses(fit: Minigpt, tmp_path: Path) -> None:
    outcome = fit("sft", trainer__limit_val_batches=0)
    assert outcome.status == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["before"], summary["final"]) == ({}, {})
    assert "→" not in outcome.err


def test_a_lock_that_is_a_link_is_refused(fit: Minigpt, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to("../elsewhere")
    assert_refused(fit("sft"), "run/.lock is a link", "--run_dir")
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("sizes", [{"hidden_size": 10**12}, {"ffn": 10**12}])
def test_an_architecture_that_cannot_be_built(fit: Minigpt, sizes: dict[str, int]) -> None:
    changes = {f"model__init_args__architecture__{name}": size for name, size in sizes.items()}
    assert_refused(fit("pretrain", **changes), "A model of this architecture cannot be built: ")
