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

# Numbers that launchers set and libraries read when imported, with the least that each may be.
LEAST = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES"), 1)
LEAST |= dict.fromkeys(("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"), -1)
LEAST |= dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "MASTER_PORT"), 0)
LEAST |= dict.fromkeys(("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "PL_GLOBAL_SEED"), 0)


def check_environment() -> None:
    """Refuse variables of `LEAST` that hold no such number, before a library fails by them.

    Raises:
        ConfigError: for the first one.
    """
    for name, least in LEAST.items():
        value = os.environ.get(name)
        if value is None:
            continue
        if not re.fullmatch(r"\s*-?[0-9]{1,10}\s*", value) or int(value) < least:
            raise ConfigError(
                f"The environment sets {name} to {value!r:.40}, which is no whole number of at "
                f"least {least}. Unset it, or let a launcher such as torchrun set it."
            )


def peak_memory() -> dict[str, int]:
    """Return the peak memory of this process, in MB: resident, and of tensors on the GPU.

    On Linux `ru_maxrss` may be the peak of the parent process, so VmHWM is read instead.
    """
    resident = _process_status("VmHWM")
    if resident is None:
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = {"peak_rss_mb": resident // 1_000_000}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peaks["peak_gpu_mb"] = torch.cuda.max_memory_allocated() // 1_000_000
    return peaks


def memory_in_use(device: str) -> int:
    """Return the bytes that this process uses: on a GPU its tensors, else its resident memory.

    Args:
        device: type of the device, such as cpu or cuda.
    """
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    resident = _process_status("VmRSS")
    return peak_memory()["peak_rss_mb"] * 1_000_000 if resident is None else resident


def _process_status(field: str) -> int | None:
    """Return a size from this process's status, in bytes; None but on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024  # its kB are of 1024 bytes


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
