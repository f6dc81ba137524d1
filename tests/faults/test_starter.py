"""One test's fault does not become another's."""

from __future__ import annotations

from pathlib import Path

import pytest
from leftovers import running
from patience import eventually
from runs import Start, Starter, slow, until  # type: ignore[import-not-found]

import minigpt


def test_another_takes_the_place_of_a_starter_that_died(
    starters: list[Starter], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    died = Starter()
    starters.append(died)
    died.process.kill()
    died.process.wait()
    with pytest.raises((OSError, ValueError)):
        died.start(["--version"], tmp_path / "log")
    run = request.getfixturevalue("starter").start(["--version"], tmp_path / "log")
    assert run.wait() == 0
    assert run.output == f"{minigpt.__version__}\n"


def test_a_run_that_does_not_end_tells_what_it_did(start: Start) -> None:
    run = start("sft", "run", trainer__callbacks=slow(600))
    eventually(lambda: "taking its time" in run.output)
    with pytest.raises(AssertionError, match="taking its time"):
        run.wait(0)
    run.send(9)
    assert run.wait() == -9


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_test_leaves_running_is_ended(
    workers: int, start: Start, starter: Starter, tmp_path: Path
) -> None:
    never = until(tmp_path / "never")
    run = start("sft", trainer__callbacks=never, data__init_args__num_workers=workers)
    eventually(lambda: (tmp_path / "run" / "status.json").exists())
    assert starter.end_runs() == [str(run.log)]
    assert not running(run.pid)
    assert run.group() == []
