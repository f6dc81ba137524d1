"""The machine, and what this process has used of it."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path
from typing import Any


def peak_memory() -> dict[str, int]:
    """Return the peak memory of this process, in MB: resident, and of tensors on the GPU.

    Linux hands `ru_maxrss` down from the parent process, but not its own high-water mark.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM"))
        resident = int(line.split()[1]) * 1024
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = {"peak_rss_mb": resident // 1_000_000}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peaks["peak_gpu_mb"] = torch.cuda.max_memory_allocated() // 1_000_000
    return peaks


def machine() -> dict[str, Any]:
    """Return what a reader needs to compare times: processor, cores, system, versions."""
    import torch
    import transformers

    return {
        "system": platform.platform(terse=True),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
