from __future__ import annotations

from pathlib import Path

import pytest

from minigpt.cli.parser import replaced_options, with_file_names
from minigpt.cli.trainer import run
from minigpt.errors import ConfigError, ModelError


def arguments(sources: list[str], directory: Path) -> list[str]:
    """Write each source that is a config to a file; the others are options."""
    args = ["fit"]
    for number, source in enumerate(sources):
        if source.startswith("--"):
            args += source.split()
        else:
            file = directory / f"{number}.yaml"
            file.write_text(source)
            args += ["--config", str(file)]
    return args


@pytest.mark.parametrize(
    ("sources", "replaced"),
    [
        (["trainer: {max_steps: 280}"], None),
        (["trainer: {max_steps: 280}", "--trainer.max_epochs 3"], "max_steps"),
        (["trainer: {max_steps: 280}", "--trainer.max_epochs=3"], "max_steps"),
        (["trainer: {max_steps: 280}", "trainer: {max_epochs: 3}"], "max_steps"),
        (
            ["trainer: {max_steps: 9}", "trainer: {max_epochs: 3}", "--trainer.max_steps 8"],
            "max_epochs",
        ),
        (["trainer: {max_epochs: 3}", "--trainer.max_steps 10"], "max_epochs"),
        (["trainer: {max_epochs: 3, max_steps: 10}"], None),
        (["trainer: {max_epochs: 3, max_steps: 10}", "--seed_everything 1"], None),
        (["trainer: {max_epochs: 3}", "--trainer.max_steps -1"], None),
        (["trainer: {max_steps: 280}", "--trainer.max_epochs null"], None),
        (["trainer: {max_steps: 280}", "--trainer.max_epochs 3 --trainer.max_steps 10"], None),
        (["trainer: {max_steps: 280}", "trainer: null", "--trainer.precision null"], None),
        (["run_dir: here", "--trainer.max_epochs"], None),
        (["trainer: {max_steps: 280}", "--trainer={max_epochs:3}"], None),  # no mapping in YAML
        (["trainer: {max_steps: 280}", '--trainer={"max_epochs":3}'], "max_steps"),
        (["trainer: {max_steps: 280}", '--trainer {"max_epochs":3}'], "max_steps"),
        (["trainer: {max_steps: 280}", '--trainer={"max_epochs":-1}'], None),
        (["trainer: {max_steps: 280}", "--trainer={max_epochs"], None),
    ],
)
def test_the_limit_of_a_run_that_is_given_last_replaces_the_other(
    sources: list[str], replaced: str | None, tmp_path: Path
) -> None:
    expected = [] if replaced is None else [f"trainer.{replaced}"]
    assert list(replaced_options(arguments(sources, tmp_path))) == expected


def test_validation_by_steps_and_by_batches_replace_each_other(tmp_path: Path) -> None:
    sources = ["trainer: {val_check_interval: 70}", "--validate.every 10 --trainer.max_epochs 1"]
    assert replaced_options(arguments(sources, tmp_path)) == {
        "trainer.val_check_interval": "validate.every"
    }
    sources = ["validate: {every: epoch}", "trainer: {val_check_interval: 70}"]
    assert replaced_options(arguments(sources, tmp_path)) == {
        "validate.every": "trainer.val_check_interval"
    }


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--data.init_args.train", "a", "b"], ["--data.init_args.train", '["a", "b"]']),
        (["--data.val", "a", "b", "c", "--x", "d", "e"], ["--data.val", '["a", "b", "c"]']),
        (["--data.init_args.train", "a"], ["--data.init_args.train", "a"]),
        (["--data.init_args.train=a", "b"], ["--data.init_args.train=a", "b"]),
        (["--data.init_args.predict", "a", "b"], ["--data.init_args.predict", "a", "b"]),
        (["--data.init_args.train", "--x", "a", "b"], ["--data.init_args.train"]),
    ],
)
def test_several_files_behind_an_option_are_its_list(args: list[str], expected: list[str]) -> None:
    other_args = args[args.index("--x") :] if "--x" in args else []
    assert with_file_names(["fit", *args]) == ["fit", *expected, *other_args]


def test_a_section_in_a_file_replaces_too(tmp_path: Path) -> None:
    file = tmp_path / "trainer.yaml"
    file.write_text("max_epochs: 3")
    args = arguments(["trainer: {max_steps: 280}"], tmp_path)
    assert list(replaced_options([*args, "--trainer", str(file)])) == ["trainer.max_steps"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--trainer.logger", "NoLogger"],
            "--trainer.logger: there is no class NoLogger. Lightning",
        ),
        (
            ["--trainer.callbacks", "[{class_path: NoCallback}]"],
            "--trainer.callbacks: there is no class NoCallback. Lightning",
        ),
        (["--trainer.logger", "CSVLoger"], "there is no class CSVLoger. Did you mean CSVLogger? "),
        (
            ["--trainer.logger", "lightning.pytorch.loggers.CSVLoger"],
            "no class lightning.pytorch.loggers.CSVLoger. Did you mean CSVLogger? ",
        ),
        (["--model", "SFTModul"], "there is no class SFTModul. Did you mean SFTModule? The stages"),
    ],
)
def test_an_unknown_class_is_named(args: list[str], message: str, tmp_path: Path) -> None:
    config = arguments(["model: SFTModule", "data: SFTDataModule"], tmp_path)
    with pytest.raises(ConfigError) as refused:
        run([*config, *args])
    assert message in str(refused.value)
    assert "Expected" not in str(refused.value)


def test_an_exam_may_be_one_name(tmp_path: Path) -> None:
    """The run is missing, which is the first thing to be refused once the options are read."""
    config = arguments(["model: SFTModule", "data: SFTDataModule"], tmp_path)
    args = ["--data.init_args.exam", str(tmp_path / "x.jsonl"), "--run_dir", str(tmp_path / "none")]
    args += ["--model.init_args.init_from", "none"]
    with pytest.raises(ModelError, match="There is no trained model"):
        run(["test", *config[1:], *args])
