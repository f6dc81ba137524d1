"""Honest streams while attackers send a server the worst that it takes: what changes for them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from generate import bytes_only
from measure import Result, publish, run

from minigpt.cli.options import CommandParser, positive
from minigpt.errors import MiniGPTError

EXAMPLES = """examples:
  python scripts/bench/attack.py
  python scripts/bench/attack.py --streams 16 --rounds 1 --settle 5 --json attack.json
"""
PROMPT = "Once upon a time there was a server that answered everyone, "
TRANSITION_SECONDS = 5.0  # seconds that the attackers get to begin, and to end
MEGABYTE = 2**20 - 100  # the longest body, nearly
ENDLESS = (
    "{%- if messages[0].content == 'loop' -%}{%- for a in range(99999) -%}"
    "{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}{%- endif -%}"
    "{%- for m in messages -%}{{ m.role + ': ' + m.content + '\n' }}{%- endfor -%}"
)
TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
GOALS = {  # figure of the result -> the most that it may be
    "answers_changed": 0,
    "first_token_ratio": 3.0,
    "health_attacked_worst_s": 1.0,
    "memory_growth_mb": 100.0,
}


class GoalsMissedError(MiniGPTError):
    """What was measured is worse than it may be."""

    exit_code = 1


def main(arguments: list[str]) -> None:
    """Parse the command line, measure, print and write the result."""
    parser = CommandParser(
        prog="scripts/bench/attack.py",
        description="Ask for streams with and without four attackers: answers that change, time to "
        "the first token, /health and the memory afterwards. The status is 1 where a goal is "
        "missed. Linux only.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--streams", type=positive, default=64, help="at the same time (64)")
    parser.add_argument("--tokens", type=positive, default=64, help="of each answer (64)")
    parser.add_argument("--rounds", type=positive, default=3, help="without and with attackers (3)")
    parser.add_argument(
        "--settle", type=float, default=60, help="seconds until memory is read (60)"
    )
    parser.add_argument("--json", help="where to write the result")
    parser.add_argument(
        "--print_only", action="store_true", help="the status is 0 though a goal is missed"
    )
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory), args) as server:
        result = measure(args, *server)
    publish(result, args.json)
    if (missed := missed_goals(result)) and not args.print_only:
        raise GoalsMissedError(f"Goals missed: {'; '.join(missed)}.")


def missed_goals(result: Result) -> list[str]:
    """Return what a result says of each goal that it misses."""
    return [
        f"{name} is {result[name]:.3g}, and may be {most:g}"
        for name, most in GOALS.items()
        if not result[name] <= most  # nor is it met by what is not a number
    ]


def save_models(directory: Path) -> list[str]:
    """Save a model with random weights under two names, the second with an endless template."""
    from minigpt.data import tokenizer as tokenizers
    from minigpt.model.architecture import Architecture, build_native

    tokenizer = bytes_only()
    model = build_native(Architecture(), tokenizer)
    model.generation_config.eos_token_id = None
    for name in ("honest", "endless"):
        tokenizer.chat_template = ENDLESS if name == "endless" else tokenizer.chat_template
        model.save_pretrained(directory / name)
        tokenizers.save(tokenizer, directory / name)
    return [str(directory / "honest"), str(directory / "endless")]


@contextlib.contextmanager
def serving(directory: Path, args: Namespace) -> Iterator[tuple[int, int]]:
    """Serve two models in another process; give its port and its process id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--slots", str(args.streams), "--max_context", "1024"]
    command = [sys.executable, "-m", "minigpt", "serve", *save_models(directory), *options]
    server = subprocess.Popen(command)
    try:
        while not is_healthy(port):
            if server.poll() is not None:
                raise MiniGPTError("The server did not start.")
            time.sleep(0.1)
        yield port, server.pid
    finally:
        server.terminate()
        server.wait()


def is_healthy(port: int) -> bool:
    """Whether the server answers."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
    return False


def measure(args: Namespace, port: int, server: int) -> Result:
    """Ask without and with attackers; return what it was like for the streams."""
    asyncio.run(ask_all(args, port))  # warms up
    before = memory(server)
    quiet, attacked = [], []
    with attackers(port) as (go, counts):
        for _ in range(args.rounds):  # in turn, so that a busy machine meets both alike
            go.clear()
            time.sleep(TRANSITION_SECONDS)
            quiet.append(timed(args, port, server))
            go.set()
            time.sleep(TRANSITION_SECONDS)
            attacked.append(timed(args, port, server))
        sent = {name: count.value for name, count in counts.items()}
    time.sleep(args.settle)
    expected = quiet[0]["answers"]
    others = [answer for one in quiet[1:] for answer in one["answers"]]
    answers = [answer for one in attacked for answer in one["answers"]]
    first_quiet = [seconds for one in quiet for seconds in one["first"]]
    first_attacked = [seconds for one in attacked for seconds in one["first"]]
    return {
        "streams": args.streams,
        "answers_changed_when_quiet": changed(others, expected),
        "answers_changed": changed(answers, expected),
        "first_token_quiet_s": median(first_quiet),
        "first_token_attacked_s": median(first_attacked),
        "first_token_ratio": median(first_attacked) / median(first_quiet),
        "first_token_p95_ratio": p95(first_attacked) / p95(first_quiet),
        "health_quiet_worst_s": max(one["health"] for one in quiet),
        "health_attacked_worst_s": max(one["health"] for one in attacked),
        "server_cores_quiet": median(one["cores"] for one in quiet),
        "server_cores_attacked": median(one["cores"] for one in attacked),
        "memory_before_mb": before,
        "memory_growth_mb": memory(server) - before,
        **{f"sent_{name}": count for name, count in sent.items()},
    }


def timed(args: Namespace, port: int, server: int) -> dict[str, Any]:
    """Ask for all streams; return also how many cores the server had meanwhile."""
    started, before = time.perf_counter(), processor_seconds(server)
    asked = asyncio.run(ask_all(args, port))
    seconds = time.perf_counter() - started
    return asked | {"cores": (processor_seconds(server) - before) / seconds}


def processor_seconds(process: int) -> float:
    """Return the processor time that a process has had, without its children."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def changed(answers: list[str], expected: list[str]) -> int:
    """Return how many answers of several rounds are not those expected."""
    pairs = zip(answers, itertools.cycle(expected), strict=False)
    return sum(answer != right for answer, right in pairs)


def p95(values: list[float]) -> float:
    """Return the 95th percentile."""
    return quantiles(values, n=20)[-1] if len(values) > 1 else values[0]


def memory(process: int) -> float:
    """Return the resident memory of a process and its children, in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    resident = next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")
    )
    children = [
        int(child)
        for file in Path(f"/proc/{process}/task").glob("*/children")
        for child in file.read_text().split()
    ]
    return resident * 1024 / 1e6 + sum(map(memory, children))


async def ask_all(args: Namespace, port: int) -> dict[str, Any]:
    """Ask for all streams at once; return answers, seconds to first tokens, and of /health."""
    limits = httpx.Limits(max_connections=None)
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        watching = asyncio.create_task(watch(client))
        asked = [ask(client, seed, args.tokens) for seed in range(args.streams)]
        answered = await asyncio.gather(*asked)
        watching.cancel()
        worst = [0.0]
        with contextlib.suppress(asyncio.CancelledError):
            worst = await watching
    return {
        "answers": [text for text, _ in answered],
        "first": [seconds for _, seconds in answered],
        "health": max(worst),
    }


async def ask(client: httpx.AsyncClient, seed: int, tokens: int) -> tuple[str, float]:
    """Ask for one stream; return its text, or its error, and the seconds to its first token."""
    body = {"model": "honest", "prompt": PROMPT, "seed": seed, "max_tokens": tokens, "stream": True}
    started = time.perf_counter()
    first, text = None, ""
    async with client.stream("POST", TEXTS, json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - started
                chunk = json.loads(line.removeprefix("data: "))
                text += chunk["choices"][0]["text"] if "choices" in chunk else str(chunk)
    return text, first or time.perf_counter() - started


async def watch(client: httpx.AsyncClient) -> list[float]:
    """Ask for /health again and again until cancelled; return the seconds of each."""
    seconds = []
    try:
        while True:
            started = time.perf_counter()
            await client.get("/health")
            seconds.append(time.perf_counter() - started)
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        return seconds or [0.0]


@contextlib.contextmanager
def attackers(port: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Run the four attackers, each in a process; give what lets them go on, and their requests."""
    spawn = multiprocessing.get_context("spawn")
    go = spawn.Event()
    go.set()
    counts = {kind.__name__: spawn.Value("i", 0) for kind in ATTACKS}
    processes = [
        spawn.Process(target=attack, args=(name, port, go, count), daemon=True)
        for name, count in counts.items()
    ]
    for process in processes:
        process.start()
    while not all(count.value for count in counts.values()):
        time.sleep(0.1)
    try:
        yield go, counts
    finally:
        for process in processes:
            process.terminate()
            process.join()


def attack(name: str, port: int, go: Any, count: Any) -> None:
    """Send one kind of requests, one after the other, while it may.

    Attackers have processors of their own; here they get what is left.
    """
    os.nice(19)
    kind = next(kind for kind in ATTACKS if kind.__name__ == name)
    while True:
        with contextlib.suppress(OSError):
            for _ in kind(port):
                count.value += 1
                go.wait()


def send(port: int, path: str, content: bytes, answered: bool = True) -> None:
    """Post a body; wait for the answer, or leave at once."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode() + content)
        while answered and connection.recv(2**16):
            pass


def body(**fields: object) -> bytes:
    """Return the body of a request to the model that others use."""
    return json.dumps({"model": "honest", **fields}).encode()


@cache
def bodies_of_errors() -> list[bytes]:
    """Return bodies of a megabyte, each part of which is an error."""
    start = b'{"model": "honest", "prompt": ['
    bodies = [start + part * (MEGABYTE // len(part)) + b"-1]}" for part in (b"-1,", b"{},", b"[],")]
    fields = b",".join(b'"%x":0' % number for number in range(MEGABYTE // 10))
    return [*bodies, b"{" + fields + b"}", b"[" * MEGABYTE]


def many_errors(port: int) -> Iterator[None]:
    """Send bodies of a megabyte that are nothing but errors."""
    for content in bodies_of_errors():
        send(port, TEXTS, content)
        yield


def long_texts(port: int) -> Iterator[None]:
    """Send texts of a megabyte, and as long as are encoded; leave as soon as they are sent."""
    for length in (MEGABYTE - 100, 13_000, 1000):
        send(port, TEXTS, body(prompt="x" * length, max_tokens=1))
        yield
    for _ in range(40):
        send(port, TEXTS, body(prompt="x" * 13_000), answered=False)
        yield


def odd_numbers(port: int) -> Iterator[None]:
    """Send temperatures, penalties and filters at the ends of what is accepted."""
    options: dict[str, list[float]] = {
        "temperature": [0, 5e-324, 1e-46, 1e-7, 2],
        "repetition_penalty": [1e-38, 0.01, 10],
        "top_p": [5e-324, 1],
        "top_k": [1, 2**70],
        "logprobs": [0, 20],
    }
    for _ in range(20):
        chosen = {name: random.choice(values) for name, values in options.items()}
        send(port, TEXTS, body(prompt="x", max_tokens=4, **chosen))
        yield


def endless_chats(port: int) -> Iterator[None]:
    """Send a chat at which a template goes on for ever; open connections that send nothing."""
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
    for connection in idle[::2]:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nPOST / HTTP/1.1\r\n")
    chat = {"model": "endless", "messages": [{"role": "user", "content": "loop"}]}
    send(port, CHATS, json.dumps(chat).encode())
    yield
    for connection in idle:
        connection.close()


ATTACKS: list[Callable[[int], Iterator[None]]] = [
    many_errors,
    long_texts,
    odd_numbers,
    endless_chats,
]

if __name__ == "__main__":
    sys.exit(run(main))
