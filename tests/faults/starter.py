"""Imports MiniGPT once and forks a process for each run, so that a test can kill many.

Reads requests as JSON lines: {"args": [...], "log": file, "env": {...}, "limits": {...},
"plain_user": true, "nohup": true} starts `minigpt ARGS` and answers with its process id;
{"ended": id} answers with its exit status (negative: the signal that killed it), or null while it
runs. No answer waits.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import tempfile
from typing import Any

import torch

import minigpt.__main__
import minigpt.cli.trainer  # what every run imports
from minigpt.__main__ import main


def child(request: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), **request.get("env", {})}
    for name, limit in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    signal.signal(signal.SIGHUP, signal.SIG_IGN if request.get("nohup") else signal.SIG_DFL)
    tempfile.tempdir = None  # TMPDIR is read again
    if request.get("plain_user"):
        give_up_privileges()
    sys.argv = [minigpt.__main__.__file__, *request["args"]]  # for Lightning's own launcher
    status = 1
    try:
        status = main(request["args"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def give_up_privileges() -> None:
    """Let the modes of files count for root, too."""
    if sys.platform == "linux":
        version_3, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(version_3, nothing) == 0


def serve() -> None:
    torch.set_num_threads(1)
    here = os.path.dirname(__file__)
    sys.path[:0] = [here, os.path.dirname(here)]
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            ended, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif (answer := os.fork()) == 0:
            child(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
