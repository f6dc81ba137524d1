"""Runs the jobs of a file one after the other, so that libraries are imported once.

    python -m torch.distributed.run --standalone --nproc_per_node 2 driver.py JOBS.json

A job is {"args": command line, "sgd": whether to train with plain SGD}. How often each job called
torch.distributed.all_reduce is written beside the file, as JOBS.all_reduces.json.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

import minigpt.model.optimizer as optim
import minigpt.stages.setup as setup
from minigpt.cli.trainer import run
from minigpt.model.parallel import leave_group
from minigpt.stages.base import BaseModule

RATE = 0.5


def sgd(model: torch.nn.Module, options: Any) -> torch.optim.Optimizer:
    """Plain SGD, which does not hide a wrong scale of the gradients."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def never(device: torch.device) -> bool:
    """Muon iterates in fp32 then: in bf16, rounding would grow beyond what is compared here."""
    return False


def let_fsdp1_use_cpus() -> None:
    """FSDP1 takes a CPU only when it is told to."""
    original_init: Any = FullyShardedDataParallel.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **{**kwargs, "device_id": torch.device("cpu")})

    FullyShardedDataParallel.__init__ = init  # type: ignore[method-assign]


def draw_otherwise() -> None:
    """Build models after other random numbers than the first process, which starts all alike."""
    configure_model = BaseModule.configure_model

    def build(self: BaseModule) -> None:
        if self.lm is None and int(os.environ["RANK"]) > 0:
            torch.manual_seed(99)
        configure_model(self)

    BaseModule.configure_model = build  # type: ignore[method-assign]


def count_all_reduces() -> list[int]:
    """Return a list whose one number counts the calls from now on."""
    calls = [0]
    all_reduce = torch.distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted
    return calls


def main(file: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    optim.fast_bf16 = never
    if not torch.cuda.is_available():
        let_fsdp1_use_cpus()
    draw_otherwise()
    build_optimizer = setup.build_optimizer
    calls, counts = count_all_reduces(), []
    for job in json.loads(Path(file).read_text()):
        setup.build_optimizer = sgd if job["sgd"] else build_optimizer
        before = calls[0]
        run(job["args"])
        counts.append(calls[0] - before)
    if os.environ["RANK"] == "0":
        Path(file).with_suffix(".all_reduces.json").write_text(json.dumps(counts))
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1])
