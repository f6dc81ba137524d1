"""The script that checks a card: its arguments, its table, what it makes of a failure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
STUB = """#!/bin/sh
case "$*" in
  *is_available*) exit 1 ;;
  *collect-only*test_fsdp1*) printf '%s\\n' "a.py::test_b[x]" "a.py::test_b[y]" a.py::test_c ;;
  *test_golden*) echo broken; exit 1 ;;
  *bench*) printf '%s\\n' "ratio        1.51x" "" "ratio       1.51" "gemm_peak_fraction  0.44" \\
    "ratio_trl  1.2" "useful_tokens_per_s  1,100" "mfu   0.4" "trl_peak_rss_mb 9"; exit 0 ;;
esac
echo "3 passed in 1s"
"""


def check(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with an interpreter that only says how tests end."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    env = {**os.environ, "PYTHON": str(stub)}
    return subprocess.run(
        [str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False
    )


def test_the_table_has_every_line(tmp_path: Path) -> None:
    done = check(tmp_path, "--quick")
    table, left_out = done.stdout.split("\n\nNot run, as they need CUDA (cases):\n")
    rows = [line.split(" | ") for line in table.splitlines()[3:]]
    assert [int(re.findall(r"\d+", row[0])[0]) for row in rows] == [*range(1, 10)]
    assert [row[1] for row in rows if "passed" not in row[1]] == [
        "FAILED",
        "skipped: CUDA only",
        "ratio 1.51, gemm_peak_fraction 0.44, useful_tokens_per_s 1,100, mfu 0.4",
    ]
    assert left_out.splitlines() == ["7. a.py::test_b (2)", "7. a.py::test_c (1)"]
    assert done.returncode == 1
    assert "broken" in done.stderr


def test_lines_are_chosen_by_number(tmp_path: Path) -> None:
    done = check(tmp_path, "--quick", "4", "8")
    assert done.returncode == 0
    assert [line[:4] for line in done.stdout.splitlines()[3:]] == ["| 4.", "| 8."]


def test_arguments(tmp_path: Path) -> None:
    assert "usage:" in check(tmp_path, "--help").stdout
    assert check(tmp_path, "--fast").returncode == 2
    without = check(tmp_path)
    assert without.returncode == 2
    assert "--quick" in without.stderr


def test_every_test_that_it_names_is_there() -> None:
    text = SCRIPT.read_text()
    folders = dict(re.findall(r"(unit|stages|distributed)=(\S+)", text))
    named = re.findall(r"\$(unit|stages|distributed)/([\w/]*test_\w+\.py)(?:::(\w+))?", text)
    assert len(named) > 10
    for folder, file, function in named:
        source = (ROOT / folders[folder] / file).read_text()
        assert not function or f"def {function}(" in source


@pytest.mark.slow
def test_a_line_runs_tests_here() -> None:
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(SCRIPT), "--quick", "3"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| 3\. fp16.* \| 6 passed in .* \| \d+ \|", done.stdout)
    assert re.search(r"\n3\. .*::test_fp16_measures_the_gradients_of_fp32 \(4\)\n", done.stdout)
