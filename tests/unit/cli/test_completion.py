"""The shell completes verbs, options and their choices by the printed script."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt.cli.completion import SHELLS, choices_of, options_of
from minigpt.cli.verbs import COMMANDS, TRAINER_VERBS

Minigpt = Callable[..., Any]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash."""
    from minigpt.cli.completion import shell_script

    file = tmp_path_factory.mktemp("completion") / "minigpt"
    file.write_text(shell_script("bash"))
    return file


def complete(script: Path, *words: str) -> list[str]:
    """Return what bash offers for the last word of a command line."""
    line = f"""
        source {shlex.quote(str(script))}
        COMP_WORDS=({shlex.join(words)})
        COMP_CWORD={len(words) - 1}
        function=$(complete -p minigpt | sed "s/.*-F \\([^ ]*\\).*/\\1/")
        $function minigpt {shlex.quote(words[-1])} {shlex.quote(words[-2])} 2>/dev/null
        printf "%s\\n" "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["fi"], {"fit"}),
        ([""], {*TRAINER_VERBS, *COMMANDS}),
        (["fit", "--model.init_args.schedule.n"], {"--model.init_args.schedule.name"}),
        (["fit", "--model.init_args.schedule.name", ""], {"wsd", "cosine"}),
        (["validate", "--data.init_args.on_bad_row", "s"], {"skip"}),
        (["data", ""], {"check", "stats", "show", "convert", "fetch"}),
        (["data", "check", "--ki"], {"--kind"}),
        (["export", "gguf", "--acc"], {"--accept_differences"}),
        (["generate", "--weights", ""], {"fp32", "bf16", "int8"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
    ],
)
def test_bash_offers(script: Path, words: list[str], offered: set[str]) -> None:
    assert set(complete(script, "minigpt", *words)) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_the_verb_prints_a_script(shell: str, minigpt: Minigpt) -> None:
    outcome = minigpt("completion", shell)
    assert outcome.status == 0
    assert "init_args" in outcome.out


def test_another_shell_is_refused(minigpt: Minigpt) -> None:
    outcome = minigpt("completion", "cmd")
    assert outcome.status == 2
    assert "invalid choice: 'cmd'" in outcome.err


def test_without_shtab_it_is_named(minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    outcome = minigpt("completion", "bash")
    assert outcome.status == 2
    assert "pip install 'minigpt[completion]'" in outcome.err


def test_options_of_a_schema() -> None:
    word = {"type": "string"}
    nested = {"type": "object", "properties": {"name": word, "$schema": word}}
    forms = [{"type": "null"}, {"$ref": "#/$defs/Nested"}, {"properties": {"size": word}}]
    schema = {"properties": {"one": word, "two": {"anyOf": forms}}, "$defs": {"Nested": nested}}
    assert [name for name, _ in options_of(schema)] == ["one", "two.name", "two.size"]


@pytest.mark.parametrize(
    ("schema", "choices"),
    [
        ({"type": "boolean"}, ["true", "false"]),
        ({"enum": ["a", "b"]}, ["a", "b"]),
        ({"anyOf": [{"type": "null"}, {"enum": [1]}]}, ["null", "1"]),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"type": "integer"}, None),
        ({}, None),
    ],
)
def test_choices_of_an_option(schema: dict[str, object], choices: list[str] | None) -> None:
    assert choices_of(schema) == choices
