from __future__ import annotations

from pathlib import Path

import pytest

from minigpt.cli.parser import replaced_options, with_file_names


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
