"""Local tasks of lm-evaluation-harness, run on our models. `minigpt evaluate` keeps it offline."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from minigpt.errors import ConfigError, DataError, MiniGPTError
from minigpt.evaluate.likelihood import continuation, score
from minigpt.evaluate.scores import Score, wilson
from minigpt.infer.engine import Engine, Sampling
from minigpt.reading import check_yaml

MAX_NEW = 256  # tokens of a reply where the task does not say


def load_tasks(path: str) -> dict[str, Any]:
    """Build the tasks of a YAML file; relative paths of data files are tried beside it first.

    Raises:
        ConfigError: without the harness, or when it cannot build the task.
        DataError: for a missing file.
    """
    try:
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise ConfigError(
            f"--lm-eval needs lm-evaluation-harness ({error}). Install it with: "
            "pip install 'minigpt[lm-eval]'"
        ) from None
    if not Path(path).is_file():
        raise DataError("no such file", path=path, remedy="Name a task's YAML.", reason="missing")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _as_config_error(path):
        check_yaml(Path(path))
        task = load_yaml(path)
        task["dataset_kwargs"] = _resolve_files(
            dict(task.get("dataset_kwargs") or {}), Path(path).parent
        )
        tasks: dict[str, Any] = TaskManager(include_defaults=False).load([task])["tasks"]
    return tasks


@contextmanager
def _as_config_error(path: str) -> Iterator[None]:
    """Turn whatever a task file makes the harness raise into a ConfigError."""
    try:
        yield
    except MiniGPTError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{path}: lm-evaluation-harness cannot run the task: {type(error).__name__}: {first}"
        ) from error


def _resolve_files(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the paths of data files absolute where the files lie beside the task."""

    def resolve(value: object) -> object:
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        if isinstance(value, list):
            return [resolve(item) for item in value]
        beside = folder / str(value)
        return str(beside.resolve()) if beside.is_file() else value

    if "data_files" in options:
        options["data_files"] = resolve(options["data_files"])
    return options


def run_tasks(engine: Engine, tasks: dict[str, Any], path: str) -> dict[str, Score]:
    """Run the tasks of a file on a model; accuracies get an interval as ours do.

    Raises:
        ConfigError: when the file makes the harness fail.
    """
    from lm_eval import simple_evaluate

    with _as_config_error(path):
        results = simple_evaluate(
            _adapter(engine), tasks=list(tasks.values()), log_samples=False, bootstrap_iters=0
        )
    scores: dict[str, Score] = {}
    for task, metrics in results["results"].items():
        n = int(results["n-samples"][task]["effective"])
        for key, value in metrics.items():
            name = key.partition(",")[0]
            if isinstance(value, float) and not name.endswith("_stderr"):
                bounds = wilson(value * n, n) if name.startswith(("acc", "exact")) else (None, None)
                scores[f"{task}: {name}"] = Score(value, n, *bounds)
    return scores


class _Instance(Protocol):
    """A request of the harness."""

    args: tuple[Any, ...]


def _adapter(engine: Engine) -> object:
    """Return a model as the harness calls it."""
    from lm_eval.api.model import LM

    class MiniGPT(LM):  # type: ignore[misc]
        tokenizer_name = "minigpt"

        def loglikelihood(self, requests: Sequence[_Instance]) -> list[tuple[float, bool]]:
            pairs = [continuation(engine, *request.args) for request in requests]
            return score(engine, pairs)

        def loglikelihood_rolling(self, requests: Sequence[_Instance]) -> list[float]:
            pairs = [continuation(engine, "", request.args[0]) for request in requests]
            return [logp for logp, _ in score(engine, pairs)]

        def generate_until(self, requests: Sequence[_Instance]) -> list[str]:
            contexts = [request.args[0] for request in requests]
            samplings = [_sampling(request.args[1]) for request in requests]
            replies = engine.complete(contexts, samplings)
            return [reply.text for reply in replies]

    return MiniGPT()


def _sampling(options: dict[str, Any]) -> Sampling:
    """Return the length and the stop texts of a task's replies."""
    until = options.get("until") or []
    stop = tuple(filter(None, [until] if isinstance(until, str) else until))
    return Sampling(int(options.get("max_gen_toks", MAX_NEW)), stop=stop)
