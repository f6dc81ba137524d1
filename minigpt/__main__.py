"""`minigpt <verb>`: a dispatcher that imports nothing heavy until a verb is chosen."""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from minigpt.cli.verbs import COMMANDS, TRAINER_VERBS
from minigpt.errors import INTERRUPTED, PREEMPTED, MiniGPTError, Terminated, is_panic
from minigpt.machine import check_environment
from minigpt.terminal import PrintableFormatter, printable

PRINTING = COMMANDS.keys() - {"serve"}  # verbs whose results go to standard output

HELP = """usage: minigpt <verb> [options]

From raw JSONL to a small chat model that you own.

verbs:
{verbs}

examples:
  minigpt tokenizer train --data_file data/pretrain.jsonl --output_dir outputs/tokenizer
  minigpt fit --config configs/pretrain.yaml
  minigpt test --config configs/sft.yaml
  minigpt generate --model outputs/sft --prompt "Hello"

Each verb explains itself: minigpt <verb> --help
"""


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return its exit status.

    That is 0, or 2 for a user's error, 75 after SIGTERM, 130 after Ctrl-C. 141 says that nobody
    reads the output any more, as after ``| head``.
    """
    args = sys.argv[1:] if argv is None else argv
    has_output = open_streams()
    if not has_output and args and args[0] in PRINTING:
        say(f"standard output is closed, and minigpt {args[0]} prints to it. Give it a file.")
        return MiniGPTError.exit_code
    try:
        return run_verb(args)
    finally:  # here, where no error's traceback holds the model any more
        if (parallel := sys.modules.get("minigpt.model.parallel")) is not None:
            parallel.leave_group()


def run_verb(args: list[str]) -> int:
    """Run a verb; print MiniGPT's own errors as one paragraph."""
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[to_stderr])
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler itself
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    logging.getLogger("minigpt").setLevel(logging.INFO if rank == "0" else logging.ERROR)
    try:
        check_environment()
        with raising_on_signals():
            dispatch(*args)
        sys.stdout.flush()
    except MiniGPTError as error:
        say(str(error))
        flush_output()
        return error.exit_code
    except BrokenPipeError as error:
        return reader_left(error)
    except OSError as error:
        output = "a file" if args and args[0] in (*TRAINER_VERBS, "serve") else "standard output"
        return write_refused(error, output)
    except KeyboardInterrupt:
        return interrupted()
    except Terminated as stop:
        say(f"stopped by {signal.Signals(stop.number).name}")
        return PREEMPTED
    except SystemExit as stop:  # after --help, or Lightning's answer to Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            return interrupted()
        if stop.code not in (0, None):
            raise
    except BaseException as error:
        if not is_panic(error):
            raise
        say(
            f"The tokenizer cannot read a text: {error}. Its tokenizer.json may be damaged, or "
            "hold a pattern that takes too long: take it from its source again."
        )
        return MiniGPTError.exit_code
    return 0


def dispatch(verb: str = "--help", *rest: str) -> None:
    """Import what a verb needs, and run it."""
    if verb in ("-h", "--help"):
        verbs = "\n".join(f"  {v:10} {what}" for v, what in (TRAINER_VERBS | COMMANDS).items())
        print(HELP.format(verbs=verbs))
    elif verb == "--version":
        from minigpt import __version__

        print(__version__)
    elif verb in TRAINER_VERBS:
        importlib.import_module("minigpt.cli.trainer").run([verb, *rest])
    elif verb in COMMANDS:
        importlib.import_module(f"minigpt.cli.{verb}").main(list(rest))
    else:
        verbs = ", ".join(TRAINER_VERBS | COMMANDS)
        raise MiniGPTError(f"Unknown verb: {verb}. Known: {verbs}. See: minigpt --help")


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM and SIGHUP, so that `finally` ends processes and removes files.

    SIGHUP stays ignored where it is, as under `nohup`.
    """

    def leave(number: int, _: Any) -> None:
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(message: str) -> None:
    """Print a paragraph to standard error, if that can be written to."""
    paragraph = printable(" ".join(message.split("\n")))
    with suppress(OSError):
        print(f"minigpt: {paragraph}", file=sys.stderr, flush=True)


def open_streams() -> bool:
    """Open the standard streams that the shell closed; return whether standard output was open.

    Otherwise the next file that is opened would get a stream's number, and what libraries print.
    """
    was_open = sys.stdout is not None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)  # the lowest free number: mostly `number`
            stream = os.fdopen(handle, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks does not end a verb
        sys.stdout.reconfigure(errors="backslashreplace")
    return was_open


def reader_left(error: BrokenPipeError) -> int:
    """Return the exit status if the reader of standard output has left; else raise the error."""
    output = select.poll()
    output.register(1, 0)  # no events: poll reports errors in any case
    if not any(events & select.POLLERR for _, events in output.poll(0)):
        raise error
    drop_output()
    return 141


def write_refused(error: OSError, output: str) -> int:
    """Print that the system refused to write, and return the exit status; raise any other error.

    Args:
        error: has the file's name, unless the file was open already.
        output: what the verb writes to, for an error without a name.
    """
    from minigpt.files import system_reason

    reason = system_reason(error)
    if reason is None:
        raise error
    doing = "write to" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else "use"
    where = error.filename or output
    say(f"Cannot {doing} {where}: {reason}. Make room or give access there, or choose another.")
    drop_output()
    return MiniGPTError.exit_code


def flush_output() -> None:
    """Flush what was printed before an error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    except OSError as error:
        write_refused(error, "standard output")


def drop_output() -> None:
    """Point standard output at the null device, so that Python's flush at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def interrupted() -> int:
    """Say that the run was interrupted; return the exit status."""
    say("interrupted")
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
