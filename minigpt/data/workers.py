"""Processes that read batches ahead: they leave it to the main process to answer signals."""

from __future__ import annotations

import os
import signal
import sys
import threading


def leave_signals(_: int) -> None:
    """Leave it to the main process to stop: it still needs this worker for the current step."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # only there a process learns who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_when_told, args=(os.getppid(),), daemon=True).start()


def end_when_told(main: int) -> None:
    """End at a SIGTERM of the main process; others send it to the whole group."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)
