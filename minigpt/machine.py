"""What this process has used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_memory() -> dict[str, int]:
    """Return the most memory this process has held, in MB: resident, and of tensors on the GPU.

    Linux hands `ru_maxrss` down from the parent process, but not its own high-water mark.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM"))
        held = int(line.split()[1]) * 1024
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = {"peak_rss_mb": held // 1_000_000}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peaks["peak_gpu_mb"] = torch.cuda.max_memory_allocated() // 1_000_000
    return peaks
