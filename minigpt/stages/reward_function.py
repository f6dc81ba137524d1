"""Python functions as rewards, called as TRL's GRPOTrainer calls them."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any, SupportsFloat

from transformers import TrainerState

from minigpt.errors import ConfigError, DataError, TrainingError
from minigpt.reading import reason_of
from minigpt.stages.reward_rules import NOT_SCORED, AnswerToScore, Scorer, Scores

# What is passed beside a row's fields.
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NOT_PASSED = ("prompt", "completion")  # fields that these arguments stand for
ROWS_NAMED = 3  # in an error


class FunctionReward(Scorer):
    """A function with the signature of TRL's: prompts, completions, **fields -> list of rewards.

    It is called once for all answers that are scored together, with keyword arguments that hold one
    value for each of them: `prompts` and `completions` (strings; for chats lists of messages, which
    are dicts of role and content), `completion_ids` (lists of token ids), and the fields of their
    rows by name, None where a row lacks one. Beside these come `trainer_state` (a transformers
    TrainerState with `global_step` and `max_steps`), `log_metric(name, value)`, of whose values
    the mean is logged, and `log_extra(column, values)`, which is accepted, but there is no table of
    completions for it. It may be async. A reward of None or NaN means that the answer cannot be
    scored.

    Args:
        path: `package.module:name` or `file.py:name`.

    Raises:
        ConfigError: when the function cannot be imported.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.function = load_function(path)
        self.name = getattr(self.function, "__name__", type(self.function).__name__)
        self.signature = signature_of(self.function)

    def check_fields(self, fields: Mapping[str, object]) -> None:
        """Check that a row has the fields that the function has arguments without defaults for."""
        for name in required_arguments(self.signature):
            if name not in fields:
                raise DataError(
                    f"the row has no field {name!r}, which the reward function {self.path} takes",
                    field=name,
                    remedy=f"Its fields are {', '.join(sorted(fields))}. Add it, or give the "
                    "function's argument a default.",
                )
        for name in ARGUMENTS:
            if name in fields:
                raise DataError(
                    f"the reward function {self.path} gets something else under this name",
                    field=name,
                    remedy="Rename the field.",
                )
        self._check_call([name for name in (*ARGUMENTS, *fields) if name not in NOT_PASSED])

    def _check_call(self, names: Iterable[str]) -> None:
        """Refuse a function that cannot be called with arguments of these names."""
        try:
            self.signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            raise ConfigError(
                f"The reward function {self.path} cannot be called with all that it is given by "
                f"name: {error}. Let it take **kwargs, as TRL's reward functions do."
            ) from None

    def score(self, answers: Sequence[AnswerToScore], state: TrainerState) -> Scores:
        """Call the function.

        Raises:
            TrainingError: when it raises, or returns anything but a finite number, None or NaN for
                each answer; names the function, and file and line of the row.
        """
        try:
            result, metrics = self._call(answers, state)
        except (Exception, SystemExit) as error:  # a checker may be a program that exits
            raise self._failure(answers, state, error) from error
        values = self._list_of(result, answers)
        scores = list(map(self._number, values, answers))
        return Scores(scores, {name: mean(logged) for name, logged in metrics.items()})

    def _call(
        self, answers: Sequence[AnswerToScore], state: TrainerState
    ) -> tuple[Any, dict[str, list[float]]]:
        metrics: dict[str, list[float]] = defaultdict(list)
        names = dict.fromkeys(name for answer in answers for name in answer.fields)
        # Copies, as a dataset gives them: what a function does to a list stays out of the row.
        fields = {name: [deepcopy(answer.fields.get(name)) for answer in answers] for name in names}
        result = self.function(
            prompts=[_prompt(answer) for answer in answers],
            completions=[_completion(answer) for answer in answers],
            completion_ids=[list(answer.completion_ids) for answer in answers],
            trainer_state=state,
            log_extra=lambda column, values: None,
            log_metric=lambda name, value: metrics[name].append(float(value)),
            **{name: values for name, values in fields.items() if name not in NOT_PASSED},
        )
        if inspect.isawaitable(result):
            result = asyncio.run(_result_of(result))
        return result, dict(metrics)

    def _failure(
        self, answers: Sequence[AnswerToScore], state: TrainerState, error: BaseException
    ) -> TrainingError:
        """Say which row a function raised at: the first one with which alone it raises again."""
        rows = rows_of(answers)
        for answer in answers:
            try:
                self._call([answer], state)
            except (Exception, SystemExit) as raised:
                error, rows = raised, rows_of([answer])
                break
        return TrainingError(
            f"The reward function {self.path} raised at {rows}: {_described(error)}. Mend the "
            "function, or let it return None for what cannot be scored; then go on with "
            "--ckpt_path auto."
        )

    def _list_of(self, result: Any, answers: Sequence[AnswerToScore]) -> Sequence[object]:
        try:
            values = list(result)
        except TypeError:
            values = [result]
            problem = f"a value of type {type(result).__name__}"
        else:
            problem = f"{len(values)} values"
            if len(values) == len(answers):
                return values
        raise TrainingError(
            f"The reward function {self.path} gave {problem} for {len(answers)} answers, "
            f"but must give a list with one for each. The rows: {rows_of(answers)}."
        )

    def _number(self, value: object, answer: AnswerToScore) -> float:
        if value is None:
            return NOT_SCORED
        number = math.inf
        if isinstance(value, SupportsFloat):
            with suppress(
                TypeError, ValueError, OverflowError, RuntimeError
            ):  # as tensors of many do
                number = float(value)
        if math.isinf(number):
            raise TrainingError(
                f"The reward function {self.path} returned {value!r:.80} for an answer to "
                f"{rows_of([answer])}, but a reward is a finite number, or None where the answer "
                "cannot be scored."
            )
        return number


def load_function(path: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        path: `package.module:name`, or `file.py:name` of a file relative to the current directory.

    Raises:
        ConfigError: when there is none.
    """
    module, _, name = path.rpartition(":")
    if not (module and name):
        raise ConfigError(
            f"A reward function is given as package.module:name or file.py:name, not {path!r}."
        )
    try:
        if module.endswith(".py"):
            function = getattr(_load_file(Path(module)), name)
        else:
            function = pkgutil.resolve_name(path)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"The reward function {path} cannot be imported: {_described(error)}. Check both "
            "names; a package must be installed or on PYTHONPATH."
        ) from error
    if not callable(function):
        raise ConfigError(f"{path} is no function, but a value of type {type(function).__name__}.")
    return function  # type: ignore[no-any-return]  # whatever a module holds


def _load_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file.absolute())
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a reward function; one that takes anything where there is none."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin, for example
        return inspect.signature(lambda **_: None)


def required_arguments(signature: inspect.Signature) -> list[str]:
    """Return the arguments of a reward function that only a row's field can give."""
    return [
        p.name
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.default is p.empty
        and p.name not in ARGUMENTS
    ]


def rows_of(answers: Sequence[AnswerToScore]) -> str:
    """Return file and line of the rows behind answers; of the first ones if there are many."""
    rows = list(dict.fromkeys(f"{path}:{line}" for path, line in (a.source for a in answers)))
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return ", ".join(rows[:ROWS_NAMED]) + more


def _described(error: BaseException) -> str:
    name, reason = type(error).__name__, reason_of(error).rstrip(".")
    return reason if reason.startswith(name) else f"{name}: {reason}"


async def _result_of(result: Awaitable[Any]) -> Any:
    return await result


def _prompt(answer: AnswerToScore) -> str | list[dict[str, str]]:
    if isinstance(answer.prompt, str):
        return answer.prompt
    return [{"role": message.role, "content": message.content} for message in answer.prompt]


def _completion(answer: AnswerToScore) -> str | list[dict[str, str]]:
    if isinstance(answer.prompt, str):
        return answer.completion
    return [{"role": "assistant", "content": answer.completion}]
