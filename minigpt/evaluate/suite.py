"""Everything that is asked of a model, and the results of several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from minigpt.data.exam import Item, load_exam
from minigpt.data.prompts import load_prompts
from minigpt.data.records import BadRows, read_records
from minigpt.errors import ConfigError
from minigpt.evaluate import choices, harness, health, likelihood, preferences
from minigpt.evaluate.scores import Score, share
from minigpt.infer.engine import Engine, Sampling
from minigpt.infer.examine import sit

Results = dict[str, dict[str, Score]]  # of one model: test to name to score
Test = Callable[[Engine], dict[str, Score]]


@dataclass(frozen=True)
class Suite:
    """The tests, with their files.

    Attributes:
        text, choices, pairs, exam, preferences, prompts, lm_eval: files of each kind.
        reference: model that preferences are compared with; `beta` scales its rewards.
        max_length: tokens of a window of text, and of a preference pair.
        sampling: how replies are written.
    """

    text: Sequence[str] = ()
    choices: Sequence[str] = ()
    pairs: Sequence[str] = ()
    exam: Sequence[str] = ()
    preferences: Sequence[str] = ()
    prompts: Sequence[str] = ()
    lm_eval: Sequence[str] = ()
    reference: str | None = None
    beta: float = 0.1
    max_length: int = 512
    sampling: Sampling = field(default_factory=Sampling)

    def tests(self) -> dict[str, Test]:
        """Read the files, so that bad ones are told before a model is loaded.

        Returns:
            The name of each test, and what runs it on a model.

        Raises:
            ConfigError: when there is nothing to do.
            DataError: for a file or row that cannot be used.
        """
        tests: dict[str, Test] = {}
        for path in self.text:
            sum(1 for _ in likelihood.documents(path))
            tests[f"text {path}"] = partial(
                likelihood.bits_per_byte, path=path, max_length=self.max_length
            )
        for path in self.choices:
            items = choices.load_choices(path)
            tests[f"choices {path}"] = partial(choices.choose, items=items, source=path)
        for path in self.pairs:
            items = choices.load_pairs(path)
            tests[f"pairs {path}"] = partial(choices.choose, items=items, source=path)
        for path in self.exam:
            tests[f"exam {path}"] = partial(examine, items=load_exam(path), sampling=self.sampling)
        for path in self.preferences:
            sum(1 for _ in read_records([path], "preference", BadRows()))
            tests[f"preferences {path}"] = partial(self._prefer, path=path)
        for path in self.prompts:
            prompts = [prompt.content for prompt in load_prompts(path)]
            tests[f"generation {path}"] = partial(
                health.write, prompts=prompts, sampling=self.sampling
            )
        for path in self.lm_eval:
            tests[f"lm-eval {path}"] = partial(
                harness.run_tasks, tasks=harness.load_tasks(path), path=path
            )
        if not tests:
            raise ConfigError("There is nothing to measure: name files, such as --text FILE.")
        return tests

    def _prefer(self, engine: Engine, path: str) -> dict[str, Score]:
        reference = Engine.load(self.reference) if self.reference else None
        return preferences.prefer(engine, path, self.max_length, reference, self.beta)


def examine(engine: Engine, items: Sequence[Item], sampling: Sampling) -> dict[str, Score]:
    """Sit an exam: the share of right replies, and each family's where there are several."""
    judged = sit(engine, items, sampling)
    families: dict[str, list[bool]] = {}
    for one in judged:
        families.setdefault(one.item.family, []).append(one.right)
    whole = {"right": share([one.right for one in judged])}
    if len(families) == 1:
        return whole
    return whole | {family: share(rights) for family, rights in families.items()}


def rows(results: Mapping[str, Results]) -> list[tuple[str, str, list[Score | None]]]:
    """Return (test, name, each model's score) in order; None where a model has none."""
    names = {(test, name): None for r in results.values() for test in r for name in r[test]}
    return [
        (test, name, [model.get(test, {}).get(name) for model in results.values()])
        for test, name in names
    ]


def lines(results: Mapping[str, Results]) -> list[str]:
    """Write all results as an aligned table, one column for each model."""
    head = ["", *results, "chance", "items"]
    table, last = [head], ""
    for test, name, scores in rows(results):
        if test != last:
            table.append([test] + [""] * (len(head) - 1))
        last = test
        first = next(s for s in scores if s)
        chance = "" if first.chance is None else f"{100 * first.chance:.1f}%"
        said = ["–" if s is None else str(s) for s in scores]
        table.append([f"  {name}", *said, chance, f"{first.n:,}" if first.n else ""])
    widths = [max(len(row[i]) for row in table if any(row[1:])) for i in range(len(head))]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table
    ]
