"""The table of preference losses: each once, from one model, with options that it takes."""

from __future__ import annotations

import importlib
import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, get_args

import pytest

from minigpt.model.losses import PreferenceLoss
from minigpt.stages.preference_loss import PreferenceOptions

ROOT = Path(__file__).resolve().parents[2]
SCORES = {"sft": 0.9, "simpo": 0.85, "sigmoid": 0.88, "KTOModule": 0.87}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("preferences")


def test_all_losses_are_there_with_options_that_they_take(script: Any) -> None:
    losses = []
    for name in script.RUNS:
        options = {key.rpartition(".")[2]: v for key, v in script.choice_of(name).items()}
        loss = options.pop("loss")
        losses.append(loss)
        PreferenceOptions(loss, **({"beta": 0.1} | {k: float(v) for k, v in options.items()}))
    assert set(losses) == set(get_args(PreferenceLoss))


def test_the_table(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[dict[str, str], list[str]]] = []

    def train(args: Namespace, choice: dict[str, str], more: list[str]) -> float:
        asked.append((choice, more))
        is_kto = choice == {"model": "KTOModule"}
        assert args.config == [f"configs/{'kto' if is_kto else 'dpo'}.yaml"]
        assert args.metric == ("val/loss" if is_kto else "val/rewards/accuracy")
        if choice.get("model.init_args.loss") == "hinge":
            return math.inf
        run_dir = tmp_path / script.label(choice).replace(" ", ",")
        run_dir.mkdir()
        (run_dir / "summary.json").write_text(json.dumps({"seconds": 12.4}))
        return 0.75

    def exam_and_style(model: str | Path) -> tuple[float, float]:
        name = Path(model).name.partition(",")[0].rpartition("=")[2]
        return SCORES[name], 0.5

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "exam_and_style", exam_and_style)
    monkeypatch.setattr(script, "pair_accuracy", lambda model, reference: 0.625)
    words = ["--losses", "simpo,hinge,sigmoid,kto", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["preferences.py", *words, "--trainer.max_steps", "3"])
    script.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert table == [
        ["(before)", "-", "50.0", "90.0", "0.0", "-"],
        ["simpo", "75.0", "50.0", "85.0", "-5.0", "12"],
        ["hinge", "-", "-", "-", "-", "-"],
        ["sigmoid", "75.0", "50.0", "88.0", "-2.0", "12"],
        ["kto", "62.5", "50.0", "87.0", "-3.0", "12"],
    ]
    start = ["--model.init_args.init_from", "outputs/sft"]
    assert all(more == ["--trainer.max_steps", "3", *start] for _, more in asked)
    assert asked[0][0] == {
        "model.init_args.loss": "simpo",
        "model.init_args.beta": "2.0",
        "model.init_args.gamma": "1.0",
    }


def test_pairs_are_cut_to_what_the_models_read(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = {"trained": 128, "start": 4096, "long": 8192}
    lengths: list[int] = []

    def prefer(engine: Namespace, pairs: str, length: int, *_: object) -> dict[str, Namespace]:
        lengths.append(length)
        return {"accuracy": Namespace(value=0.5)}

    def load(path: Path) -> Namespace:
        return Namespace(context=contexts[path.name])

    monkeypatch.setattr("minigpt.evaluate.preferences.prefer", prefer)
    monkeypatch.setattr("minigpt.infer.engine.Engine.load", load)
    for trained in ("trained", "long"):
        assert script.pair_accuracy(Path(trained), Path("start")) == 0.5
    assert lengths == [128, 512]


def test_a_loss_that_is_not_there(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["preferences.py", "--losses", "sigmoid,dop"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "There is no loss dop. There are: sigmoid, cdpo," in capsys.readouterr().err
