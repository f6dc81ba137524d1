"""Chat templates of others, rendered in a process that ends where they do not.

Jinja's sandbox keeps a template from running code, but not from looping for ever or filling the
memory. This file is the parent's side and, run as a program, the process: it renders one chat for
each line of JSON, imports no torch, and is killed by the system at its limits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateRuntimeError

CPU_SECONDS = 2.0  # processor time that a chat may take; real templates take milliseconds
MEMORY = 2**29  # bytes that a template may take
NICENESS = 10  # an endless template takes little of a busy processor from what else is computed
Rendered = tuple[list[str], list[list[tuple[int, int]]]]  # texts, and spans of their marks


class TemplateProcess:
    """Renders templates as transformers' `render_jinja_template`, for one thread at a time.

    The process starts with the object, and anew where a template had it killed.

    Args:
        longest: characters that a template may write.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._start()

    def __call__(self, **arguments: Any) -> Rendered:
        """Return the texts of chats, and the spans of the template's marks.

        Raises:
            TemplateRuntimeError: when the template refuses the chat, or does not come to an end.
        """
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(arguments, default=str).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise TemplateRuntimeError(_reason(_end(process)))
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateRuntimeError(answer["error"])
        return answer["texts"], answer["spans"]

    def close(self) -> None:
        """End the process, from any thread; a chat that is being rendered fails."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _end(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        """Return the process, started where there is none."""
        with self._lock:
            if self._closed:
                raise TemplateRuntimeError("no chats are rendered any more")
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    # -P: or its neighbours would be taken for libraries of their names.
                    [sys.executable, "-P", __file__, str(CPU_SECONDS), str(self._longest)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | {"USE_TORCH": "0", "TRANSFORMERS_VERBOSITY": "error"},
                    start_new_session=True,  # Ctrl-C in a terminal is for its parent
                )
            return self._process


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill a process, if it has not ended, and return its status."""
    process.kill()
    status = process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            assert pipe is not None
            pipe.close()
    return status


def _reason(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it took more than {CPU_SECONDS:g} seconds of processor time"
    return f"its process ended with status {status}"


def main() -> None:
    """Render a chat for each line of the standard input, until it ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    seconds, longest = float(sys.argv[1]), int(sys.argv[2])
    os.nice(NICENESS)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit_memory()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(render_jinja_template, line, longest)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(render: Any, line: bytes, longest: int) -> str:
    try:
        texts, spans = render(**json.loads(line))
        if sum(map(len, texts)) > longest:
            raise ValueError(f"it writes more than {longest} characters")
        return json.dumps({"texts": texts, "spans": spans})
    except Exception as error:
        return json.dumps({"error": str(error)[:1000] or type(error).__name__})


def _limit_memory() -> None:
    """Let the process take so much more memory than it has, where the system can say how much."""
    import resource

    sizes = Path("/proc/self/statm")
    if sizes.exists():
        now = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


if __name__ == "__main__":
    main()
