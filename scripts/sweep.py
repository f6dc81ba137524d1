"""Try a grid of options on a stage and list the held-out results, best first.

    python scripts/sweep.py --config configs/sft.yaml --output_dir outputs/sweep/sft \\
        --grid model.init_args.optimizer.name=adamw,muon \\
        --grid model.init_args.optimizer.lr=1e-3,3e-3,1e-2 --trainer.max_steps 140

Each --grid names an option of `minigpt fit` and its values; every combination is a run of its own
below --output_dir. Further options go to all runs. A run that is finished there already is not
made again, so a sweep that was cut off goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

Choice = dict[str, str]


def grid(axes: list[str]) -> Iterator[Choice]:
    """Yield every combination of `option=value,value`."""
    split = [axis.partition("=") for axis in axes]
    names = [name for name, _, _ in split]
    for values in itertools.product(*(values.split(",") for _, _, values in split)):
        yield dict(zip(names, values, strict=True))


def label(choice: Choice) -> str:
    """Return a choice as the name of a directory."""
    return " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in choice.items())


def train(args: argparse.Namespace, choice: Choice, more: list[str]) -> float:
    """Make a run unless it is finished; return its held-out result, infinite where it failed."""
    run_dir = Path(args.output_dir) / label(choice).replace(" ", ",")
    summary = run_dir / "summary.json"
    if not summary.is_file():
        configs = [word for config in args.config for word in ("--config", config)]
        options = [word for name, value in choice.items() for word in (f"--{name}", value)]
        command = ["fit", *configs, "--run_dir", str(run_dir), "--overwrite", "true", *options]
        process = subprocess.run([sys.executable, "-m", "minigpt", *command, *more])
        if process.returncode in (75, 130):  # the sweep was asked to stop, too
            raise SystemExit(process.returncode)
        if process.returncode:
            return math.inf
    final: dict[str, float] = json.loads(summary.read_text())["final"]
    if args.metric not in final:
        metrics = ", ".join(final) or "none: set trainer.val_check_interval to the last step"
        raise SystemExit(f"{run_dir} has no {args.metric}. It has {metrics}.")
    return final[args.metric]


def main() -> None:
    """Parse the command line, train all, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", required=True, help="of the stage; overlays")
    parser.add_argument("--grid", action="append", required=True, metavar="OPTION=V,V,…")
    parser.add_argument("--metric", default="val/loss", help="the least is best (val/loss)")
    parser.add_argument("--output_dir", required=True)
    args, more = parser.parse_known_args()
    results = [(train(args, choice, more), label(choice)) for choice in grid(args.grid)]
    print(f"{args.metric:>10}")
    for value, name in sorted(results):
        print(f"{value:10.4f}  {name}")


if __name__ == "__main__":
    main()
