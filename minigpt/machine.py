"""The machine, and what this process has used of it."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from pathlib import Path
from typing import Any

from minigpt.errors import ConfigError

# What launchers set and libraries read when they are imported, with the smallest that makes sense.
NUMBERS = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES"), 1)
NUMBERS |= dict.fromkeys(("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"), -1)
NUMBERS |= dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "MASTER_PORT"), 0)
NUMBERS |= dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "PL_GLOBAL_SEED"), 0)


def check_environment() -> None:
    """Refuse numbers in the environment that are none, before a library fails by them.

    Raises:
        ConfigError: for the first one.
    """
    for name, smallest in NUMBERS.items():
        value = os.environ.get(name)
        if value is None:
            continue
        if not re.fullmatch(r"\s*-?[0-9]{1,10}\s*", value) or int(value) < smallest:
            raise ConfigError(
                f"The environment sets {name} to {value!r:.40}, which is no whole number of at "
                f"least {smallest}. Unset it, or let a launcher such as torchrun set it."
            )


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


def memory_in_use(device: str) -> int:
    """Return the bytes in use: on a GPU of this process's tensors, else all that it has resident.

    Args:
        device: its type, such as cpu or cuda.
    """
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():  # only Linux says it; elsewhere the most so far
        return peak_memory()["peak_rss_mb"] * 1_000_000
    line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


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
