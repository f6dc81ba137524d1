"""Recipes: their headers say what is needed, their commands exist, and each one trains."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import yaml

from minigpt.__main__ import main
from minigpt.cli import data as data_verbs
from minigpt.cli import trainer as cli
from minigpt.data import tokenizer as tokenizers
from minigpt.datatools.fetch import CORPORA
from minigpt.model.pretrained import save_model
from minigpt.runs.checkpoints import CheckpointOptions

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
FIELDS = ["Data", "Run", "Hardware", "Time", "Memory", "Rates"]
MEASURED = {
    "poems",
    "security",
    "security_dpo",
}  # whose time, memory and score are measured; the others' are computed
MEASURED_APART = {("hub_lora", "Memory")}  # in a recipe whose other numbers are computed
ROWS = {
    "PretrainDataModule": {"text": "the cat sat on the mat near the log " * 4},
    "SFTDataModule": {"prompt": "the cat", "completion": "sat on it"},
    "DPODataModule": {"prompt": "the cat", "chosen": "sat on it", "rejected": "ran and ran"},
}
# Beside configs/quick.yaml, what makes any recipe small: two layers of a tiny width, or a tiny
# local model of the same kind in place of the hub's, and one process on the CPU.
SMALL = """
model: {init_args: {sampling: {max_new_tokens: 2}}}
trainer: {max_steps: 2, accelerator: cpu, devices: 1, strategy: auto, precision: 32-true}
validate: {every: 2}
"""
KINDS = {"Qwen": "qwen3", "HuggingFaceTB": "llama"}  # of the hub's models, by their owner


def read(recipe: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return config


def header(recipe: Path) -> str:
    """Return a recipe's comment without its marks, and with commands on one line each."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = [line[1:].strip() for line in lines if line.startswith("#")]
    return re.sub(r" \\\n", " ", "\n".join(comment))


def commands(recipe: Path) -> list[list[str]]:
    """Return the command lines of a header, each without `minigpt`."""
    command_lines = re.findall(r"^(?:Run +)?minigpt (.+)$", header(recipe), re.MULTILINE)
    return [shlex.split(command) for command in command_lines]


def training_files(config: dict[str, Any]) -> list[str]:
    files = config["data"]["init_args"]["train"]
    return [files] if isinstance(files, str) else list(files)


@pytest.fixture(params=RECIPES, ids=lambda recipe: recipe.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    chosen: Path = request.param
    return chosen


def test_the_header_says_what_a_run_takes(recipe: Path) -> None:
    fields = re.findall(r"^# ([A-Z]\w+)  ", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    measured = recipe.stem in MEASURED
    assert fields == [*FIELDS, *(["Score"] if measured else [])]
    comment = header(recipe)
    for field in ("Time", "Memory"):
        (text,) = re.findall(rf"^{field} +(.+)$", comment, re.MULTILINE)
        is_measured = measured or (recipe.stem, field) in MEASURED_APART
        assert ("measured" if is_measured else "comput") in text or "estimate" in text
    assert re.search(r"MIT|Apache-2\.0|CC|your own", comment, re.IGNORECASE)
    assert read(recipe)["run_dir"] == f"outputs/{recipe.stem}"
    assert not (CONFIGS / recipe.name).exists()  # the demo's run would be in the way


def test_the_commands_of_the_header_exist(recipe: Path) -> None:
    config, lines = read(recipe), commands(recipe)
    fetched = set()
    for verb, *options in lines:
        if verb == "data":
            args = data_verbs.parser().parse_args(options)
            if args.action == "fetch":
                assert args.name in CORPORA
                fetched.add(f"data/public/{args.name}.jsonl")
    assert ["fit", "--config", f"configs/recipes/{recipe.name}"] in lines
    start = config["model"]["init_args"]
    if "tokenizer" in start:
        (line,) = (line for line in lines if line[0] == "tokenizer")
        assert line[line.index("--output_dir") + 1] == start["tokenizer"]
    for file in training_files(config):
        is_named = file in re.findall(r"[\w./]+", header(recipe))
        assert file in fetched or (ROOT / file).is_file() or is_named
    for other in re.findall(r"(?<![\w/])\w+\.yaml", header(recipe)):
        assert (CONFIGS / "recipes" / other).is_file()


def test_nothing_of_the_demo_is_in_a_recipe_of_other_data(recipe: Path) -> None:
    if not recipe.stem.startswith("security"):  # which go on from the demo's chats
        demo = r"data/(?!public)\w|Mira|Tolan|米拉|outputs/(tokenizer|pretrain|sft)\b|\b2,?048 tok"
        assert not re.search(demo, recipe.read_text(encoding="utf-8"))
        assert "exam" not in read(recipe)["data"]["init_args"]


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_steps_are_the_same_on_several_devices(devices: int, recipe: Path) -> None:
    data = read(recipe)["data"]["init_args"]
    if "tokens_per_step" in data:
        at_a_time = devices * data["tokens_per_batch"]
        most = re.search(r"steps are longer on more than (\d) devices", header(recipe))
        is_exact = data["tokens_per_step"] % at_a_time == 0
        assert is_exact == (most is None or devices <= int(most[1]))


def steps_of_the_header(recipe: Path) -> int | None:
    """Return the optimizer steps of a run on the data that the header names, where it does."""
    config, said = read(recipe), header(recipe)
    if "max_steps" in config["trainer"]:
        return int(config["trainer"]["max_steps"])
    if rows := re.search(r"for ([\d,]+) rows of (\d+) tokens", said):
        tokens = int(rows[1].replace(",", "")) * int(rows[2])
    elif millions := re.search(r"(\d+)M tokens", said):
        tokens = int(millions[1]) * 1_000_000
    else:
        return None
    epochs: int = config["trainer"]["max_epochs"]
    return epochs * tokens // int(config["data"]["init_args"]["tokens_per_step"])


def test_a_checkpoint_is_saved_before_the_end(recipe: Path) -> None:
    if not recipe.stem.startswith("security"):  # whose runs take minutes
        steps = steps_of_the_header(recipe)
        every = read(recipe).get("checkpoint", {}).get("every", CheckpointOptions().every)
        assert steps is None or 2 * every < steps


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_data(tmp_path_factory.mktemp("recipes")) / "tokenizer"


def stand_in(config: dict[str, Any], tokenizer: Path) -> dict[str, Any]:
    """Make the data, the tokenizer and the model that a recipe names; return the small overlay."""
    row = ROWS[config["data"]["class_path"]]
    for name in training_files(config):
        path = Path(name) if Path(name).suffix else Path(name, "some.jsonl")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            tiny_runs.write_jsonl(path, [row] * 60)
    small: dict[str, Any] = yaml.safe_load(SMALL)
    options = config["model"]["init_args"]
    if "tokenizer" in options:
        Path(options["tokenizer"]).parent.mkdir(exist_ok=True)
        Path(options["tokenizer"]).symlink_to(tokenizer)
        sizes = {**tiny_runs.ARCHITECTURE, "max_positions": 256}
        small["model"]["init_args"]["architecture"] = sizes
    else:
        start = Path(options["init_from"])
        model = tiny.model(KINDS.get(start.parent.name, "qwen3"))
        save_model(model, tokenizers.load(tokenizer), start)
    return small


def test_two_steps_of_a_recipe(
    recipe: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data").mkdir()
    for bundled in (ROOT / "data").iterdir():
        (tmp_path / "data" / bundled.name).symlink_to(bundled)
    overlay = tmp_path / "small.yaml"
    overlay.write_text(yaml.safe_dump(stand_in(read(recipe), tokenizer)))
    files = (recipe, CONFIGS / "quick.yaml", overlay)
    more = ("--run_dir", "outputs/run")
    with monkeypatch.context() as patch:  # the recipe as it is, instantiated only
        patch.setattr(cli.MiniGPTCLI, "_run_subcommand", lambda *_: None)
        unchanged = cli.run(["fit", "--config", str(recipe), "--trainer.accelerator", "cpu"])
    assert str(unchanged.run_dir) == f"outputs/{recipe.stem}"
    assert main(["fit", *(f"--config={file}" for file in files), *more]) == 0
    summary = json.loads((tmp_path / "outputs/run/summary.json").read_text())
    assert summary["steps"] == 2
    assert any((tmp_path / "outputs/run/hf").glob("*.safetensors"))
