"""Everything that is asked of a model, and the results of several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from minigpt.data.exam import Item, load_exam
from minigpt.data.formats import BadRows, read_records
from minigpt.data.prompts import load_prompts
from minigpt.errors import ConfigError
from minigpt.evaluate import choices, harness, health, likelihood, preferences
from minigpt.evaluate.scores import Results, Score, share, tables
from minigpt.infer.engine import Engine, Sampling
from minigpt.infer.examine import sit

Test = Callable[[Engine], dict[str, Score]]


@dataclass(frozen=True)
class Settings:
    """What tests have in common.

    Attributes:
        reference: model that preferences are compared with; `beta` scales its rewards.
        max_length: tokens of a window of text, and of a preference pair.
        sampling: how replies are written.
    """

    reference: str | None = None
    beta: float = 0.1
    max_length: int = 512
    sampling: Sampling = field(default_factory=Sampling)

    @cached_property
    def known(self) -> Engine | None:
        """The reference, loaded once for all models and files."""
        return Engine.load(self.reference) if self.reference else None


def prepare(files: Mapping[str, Sequence[str]], settings: Settings) -> dict[str, Test]:
    """Read the files, so that bad ones are told before a model is loaded.

    Args:
        files: the files of each kind of test (see `MAKERS`).
        settings: of all tests.

    Returns:
        The name of each test, and what runs it on a model.

    Raises:
        ConfigError: when there is nothing to do.
        DataError: for a file or row that cannot be used.
    """
    tests = {
        f"{kind} {path}": make(path, settings)
        for kind, make in MAKERS.items()
        for path in files.get(kind, ())
    }
    if not tests:
        raise ConfigError("There is nothing to measure: name files, such as --text FILE.")
    return tests


def _text(path: str, settings: Settings) -> Test:
    sum(1 for _ in likelihood.documents(path))
    return partial(likelihood.bits_per_byte, path=path, max_length=settings.max_length)


def _choices(path: str, settings: Settings, parse: choices.Parser = choices.choice) -> Test:
    return partial(choices.choose, items=choices.load(path, parse), source=path)


def _exam(path: str, settings: Settings) -> Test:
    return partial(examine, items=load_exam(path), sampling=settings.sampling)


def _preferences(path: str, settings: Settings) -> Test:
    sum(1 for _ in read_records([path], "preference", BadRows()))

    def test(engine: Engine) -> dict[str, Score]:
        return preferences.prefer(engine, path, settings.max_length, settings.known, settings.beta)

    return test


def _generation(path: str, settings: Settings) -> Test:
    prompts = [prompt.content for prompt in load_prompts(path)]
    return lambda engine: health.health(engine.complete(prompts, settings.sampling))


def _harness(path: str, settings: Settings) -> Test:
    return partial(harness.run_tasks, tasks=harness.load_tasks(path), path=path)


MAKERS: dict[str, Callable[[str, Settings], Test]] = {
    "text": _text,
    "choices": _choices,
    "pairs": partial(_choices, parse=choices.pair),
    "exam": _exam,
    "preferences": _preferences,
    "prompts": _generation,
    "lm_eval": _harness,
}


def examine(engine: Engine, items: Sequence[Item], sampling: Sampling) -> dict[str, Score]:
    """Sit an exam: the share of right replies, and each family's where there are several."""
    families: dict[str, list[bool]] = {}
    for one in sit(engine, items, sampling):
        families.setdefault(one.item.family, []).append(one.right)
    whole = {"right": share([right for rights in families.values() for right in rights])}
    parts = {family: share(rights) for family, rights in families.items()}
    return whole | parts if len(parts) > 1 else whole


def lines(results: Mapping[str, Results]) -> list[str]:
    """Write all results as an aligned table, one column for each model."""
    cells = [["", *results, "chance", "items"]]
    for test, rows in tables(results).items():
        cells += [[test], *([f"  {name}", *rest] for name, *rest in rows)]
    whole = [row for row in cells if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    padded = (zip(row, widths, strict=False) for row in cells)
    return ["  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in padded]
