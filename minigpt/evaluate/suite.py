"""The tests of `minigpt evaluate`, and the table of several models side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

from minigpt.data.formats import BadRows, load_prompts, read_records
from minigpt.errors import ConfigError
from minigpt.evaluate import choices, exam, harness, health, likelihood, preferences, reward_model
from minigpt.evaluate.reward_model import RewardScorer
from minigpt.evaluate.scores import Results, Score, share, tables
from minigpt.infer.engine import Engine, Sampling

Test = Callable[[Engine], dict[str, Score]]


@dataclass(frozen=True)
class Settings:
    """Options of the tests.

    Attributes:
        reference: model that preferences are compared with.
        beta: scale of the rewards of preferences.
        max_length: tokens of a window of text, and of a preference pair.
        sampling: how the tokens of replies are drawn.
        reward_model: scores the replies to prompts.
    """

    reference: str | None = None
    beta: float = 0.1
    max_length: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    reward_model: str | None = None

    @cached_property
    def scorer(self) -> RewardScorer:
        """The reward model, loaded once for all models and files."""
        assert self.reward_model is not None
        return RewardScorer.load(self.reward_model)

    @cached_property
    def reference_engine(self) -> Engine | None:
        """The reference, loaded once for all models and files."""
        return Engine.load(self.reference) if self.reference else None


def prepare(files: Mapping[str, Sequence[str]], settings: Settings) -> dict[str, Test]:
    """Read the files, so that bad ones are reported before a model is loaded.

    Args:
        files: the files of each kind of test (see `MAKERS`).
        settings: options of the tests.

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


def prepare_ranking(
    files: Mapping[str, Sequence[str]], settings: Settings
) -> dict[str, Callable[[RewardScorer], dict[str, Score]]]:
    """Read the files whose answers a reward model ranks; as `prepare` does for models."""
    tests: dict[str, Callable[[RewardScorer], dict[str, Score]]] = {}
    for path in files.get("preferences", ()):
        _read_all(read_records([path], "preference", BadRows()))
        rank = partial(reward_model.rank_pairs, path=path, max_length=settings.max_length)
        tests[f"preferences {path}"] = rank
    for path in files.get("choices", ()):
        items = exam.load_items(path, "choices")
        tests[f"choices {path}"] = partial(reward_model.rank_choices, items=items)
    return tests


def _read_all(rows: Iterable[object]) -> None:
    """Read all rows, for the errors that bad ones raise."""
    deque(rows, maxlen=0)


def _text(path: str, settings: Settings) -> Test:
    _read_all(likelihood.documents(path))
    return partial(likelihood.bits_per_byte, path=path, max_length=settings.max_length)


def _choices(path: str, settings: Settings, kind: Literal["choices", "pairs"] = "choices") -> Test:
    return partial(choices.choose, items=exam.load_items(path, kind), source=path)


def _exam(path: str, settings: Settings) -> Test:
    items = exam.load_items(path, "exam")

    def test(engine: Engine) -> dict[str, Score]:
        """Return the share of correct replies, and each family's where there are several."""
        results = exam.run_eval(engine, items, settings.sampling)
        total = {"right": share([result.correct for result in results])}
        families = {name: share(correct) for name, correct in exam.by_family(results).items()}
        return total | families if len(families) > 1 else total

    return test


def _preferences(path: str, settings: Settings) -> Test:
    _read_all(read_records([path], "preference", BadRows()))

    def test(engine: Engine) -> dict[str, Score]:
        return preferences.prefer(
            engine, path, settings.max_length, settings.reference_engine, settings.beta
        )

    return test


def _generation(path: str, settings: Settings) -> Test:
    prompts = [prompt.content for prompt in load_prompts(path)]

    def test(engine: Engine) -> dict[str, Score]:
        replies = engine.complete(prompts, settings.sampling)
        scores = health.health(replies)
        if settings.reward_model is not None:
            rewards = reward_model.score_replies(settings.scorer, engine, prompts, replies)
            scores["reward"] = Score(sum(rewards) / len(rewards), len(rewards))
        return scores

    return test


def _harness(path: str, settings: Settings) -> Test:
    return partial(harness.run_tasks, tasks=harness.load_tasks(path), path=path)


MAKERS: dict[str, Callable[[str, Settings], Test]] = {
    "text": _text,
    "choices": _choices,
    "pairs": partial(_choices, kind="pairs"),
    "exam": _exam,
    "preferences": _preferences,
    "prompts": _generation,
    "lm_eval": _harness,
}


def format_table(results: Mapping[str, Results]) -> str:
    """Return all results as an aligned table with one column for each model."""
    cells = [["", *results, "chance", "items"]]
    for test, rows in tables(results).items():
        cells += [[test], *([f"  {name}", *rest] for name, *rest in rows)]
    full_rows = [row for row in cells if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*full_rows, strict=True)]
    padded = (zip(row, widths, strict=False) for row in cells)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in row).rstrip() for row in padded)
