"""What all benchmarks share: exit statuses, processes for each arm, peaks, medians."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import yaml

from minigpt.__main__ import raising_on_signals
from minigpt.cli.options import writing
from minigpt.errors import INTERRUPTED, ConfigError, MiniGPTError
from minigpt.files import write_json
from minigpt.machine import machine

FOREVER = 100_000  # steps
HERE = Path(__file__).resolve().parent
Result = dict[str, Any]
# Dense bf16 TFLOP/s as the makers give them, by a part of the device's name.
DENSE_PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}
MATMUL = 2048  # rows and columns of the matrices on a CPU
MATMUL_SECONDS = 4.0  # after which no further matmul is begun: emulated bf16 takes minutes
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}  # Lightning's names
HALVES = {"bf16-mixed": "bf16", "16-mixed": "fp16"}  # what is multiplied in half precision


class TimedWork(Protocol):
    """What the arms' common options need of their work: how long to train, on what."""

    @property
    def precision(self) -> str:
        """Lightning's name."""

    @property
    def device(self) -> str:
        """Whether it is cpu or cuda."""

    @property
    def steps(self) -> int:
        """Steps to measure at most."""

    @property
    def seconds(self) -> float:
        """After which to stop, but not before a few steps."""


def run(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> int:
    """Run a benchmark as a verb is run: errors in one paragraph; return the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("minigpt").setLevel(logging.INFO)
    try:
        with raising_on_signals():
            main(sys.argv[1:] if arguments is None else arguments)
    except MiniGPTError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def architecture(size: str) -> dict[str, Any]:
    """Read the sizes of a recipe that starts from random weights.

    Raises:
        ConfigError: when there is none of that name.
    """
    named = HERE.parents[1] / "configs" / "recipes" / f"{size}.yaml"
    path = named if named.is_file() else Path(size)
    if not path.is_file():
        raise ConfigError(f"--size {size}: neither {named} nor {path} is a file. Try 26m.")
    sizes: dict[str, Any] = yaml.safe_load(path.read_text())["model"]["init_args"]["architecture"]
    return sizes


def threads() -> int:
    """Return how many threads a benchmark's processes use."""
    number = os.environ.get("OMP_NUM_THREADS", "")
    if number.isdigit():
        return int(number)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return allowed or 1


def spawn(arguments: list[str], title: str) -> float:
    """Run Python in another process; return when it was started (Unix time).

    Args:
        arguments: a script, or "-m" and a module, with its arguments.
        title: names the process in the error.

    Raises:
        MiniGPTError: with the last line of its output, when it fails.
    """
    number = str(threads())
    env = os.environ | {"OMP_NUM_THREADS": number, "RAYON_NUM_THREADS": number}
    started = time.time()
    process = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    if status := process.returncode:
        silent = "killed, perhaps for want of memory" if status == -9 else "no output"
        output = process.stderr.strip() or process.stdout.strip() or silent
        raise MiniGPTError(f"{title} ended with status {status}: {output.splitlines()[-1]}")
    return started


def spawn_arm(script: str, work: object, directory: Path, *more: str) -> Result:
    """Run an arm, `SCRIPT.py WORK RESULT ...`, in another process; return what it wrote.

    Args:
        script: its name.
        work: what it is to do, as JSON.
        directory: for the files of both.
        more: arguments.
    """
    work_file, result_file = directory / "work.json", directory / "result.json"
    work_file.write_text(json.dumps(work))
    spawn([str(HERE / f"{script}.py"), str(work_file), str(result_file), *more], f"{script}.py")
    result: Result = json.loads(result_file.read_text())
    return result


def fit(options: Result) -> tuple[list[Result], Result, float]:
    """Run `minigpt fit`; return what it logged of its steps, its summary, and when it was started.

    Args:
        options: the config.
    """
    run_dir = Path(options["run_dir"])
    file = run_dir.with_suffix(".yaml")
    file.write_text(json.dumps(options))  # JSON is YAML
    started = spawn(["-m", "minigpt", "fit", "--config", str(file)], "minigpt fit")
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    summary: Result = json.loads((run_dir / "summary.json").read_text())
    return [row for row in rows if "tokens_seen" in row], summary, started


def trainer_options(work: TimedWork, min_steps: int, log_every: int = 1) -> dict[str, Any]:
    """Return the trainer's options in our arm; the first step, which warms up, comes on top."""
    return {
        "max_steps": work.steps + 1,
        "min_steps": 1 + min(min_steps, work.steps),
        "min_epochs": 0,  # else the time is looked at after a whole epoch only
        "max_time": {"seconds": work.seconds},
        "precision": work.precision,
        "accelerator": "gpu" if work.device == "cuda" else "cpu",
        "devices": 1,  # as the other arms
        "log_every_n_steps": log_every,
        "enable_progress_bar": False,
    }


def side_by_side(report: Result, arms: Mapping[str, str], rows: Mapping[str, str]) -> list[str]:
    """Return lines with the figures of each arm.

    Args:
        report: has them under the arm's prefix and their names.
        arms: prefixes by the titles of their columns.
        rows: names of the figures by the titles of their rows; those not measured are left out.
    """
    lines = [" " * 24 + "".join(f"{title:>16}" for title in arms)]
    for title, name in rows.items():
        if all(prefix + name in report for prefix in arms.values()):
            values = (rounded(report[prefix + name]) for prefix in arms.values())
            lines.append(f"{title:24}" + "".join(f"{value:>16}" for value in values))
    return lines


def alternate(arms: Mapping[str, Callable[[int], Result]], repeats: int) -> dict[str, list[Result]]:
    """Run the arms in turn, so that a busy or warm machine meets all of them alike."""
    results: dict[str, list[Result]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name, arm in arms.items():
            results[name].append(arm(repeat))
            result = results[name][-1]
            figures = {k: round(v, 1) for k, v in result.items() if isinstance(v, float)}
            print(f"{name}, {repeat + 1} of {repeats}: {figures}", file=sys.stderr, flush=True)
    return results


def median_of(results: list[Result], name: str) -> float:
    """Return a figure's median over the repeats."""
    return float(median(result[name] for result in results))


def matmul_peak(precision: str, device: str) -> float:
    """Return the best rate of a large matmul, in FLOP/s.

    Args:
        precision: Lightning's name; what is multiplied in half precision is measured in that.
        device: cpu or cuda.
    """
    import torch

    torch.set_num_threads(threads())
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(HALVES.get(precision, ""), torch.float32)
    size = MATMUL if device == "cpu" else 4 * MATMUL
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    begun = time.perf_counter()
    for _ in range(8):
        started = time.perf_counter()
        if best and started - begun > MATMUL_SECONDS:
            break
        c = a @ b
        float(c[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def dense_peak(device: str) -> float | None:
    """Return the maker's dense bf16 peak of the GPU in use, in FLOP/s; None where unknown."""
    if device != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in DENSE_PEAKS.items() if part in name), None)


def rounded(value: float | str) -> str:
    """Return a figure with as many digits as say something."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def publish(report: Result, path: str | None) -> None:
    """Print the figures, and write everything if asked to."""
    for name, value in report.items():
        if isinstance(value, int | float | str):
            print(f"{name:36} {rounded(value)}")
    if path:
        with writing(path):
            write_json(Path(path), report)


def surroundings() -> Result:
    """Return machine, versions and date."""
    hardware = machine()
    names = ["torch", "transformers", "peft", "lightning", "tokenizers"]
    names += ["trl"] if find_spec("trl") else []
    return {
        "date": date.today().isoformat(),
        "system": hardware["system"],
        "processor": hardware["gpu"] or f"{platform.machine()}, {hardware['processor']}",
        "threads": threads(),
        "versions": {"python": hardware["python"], **{name: version(name) for name in names}},
    }
