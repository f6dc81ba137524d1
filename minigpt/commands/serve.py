"""`minigpt serve`: an OpenAI-compatible API and a web chat."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from pathlib import Path

from minigpt.commands.options import CommandParser, positive
from minigpt.errors import ConfigError

EXAMPLES = """examples:
  minigpt serve outputs/sft
  minigpt serve outputs/pretrain outputs/sft outputs/dpo outputs/lora
  minigpt serve small=outputs/sft --port 9000 --slots 16
  MINIGPT_API_KEY=$(openssl rand -hex 32) minigpt serve outputs/sft --host 0.0.0.0
"""


def main(args: list[str]) -> None:
    """Parse the command line, load the models and serve until a signal comes."""
    parser = CommandParser(
        prog="minigpt serve",
        description="Serve models: an OpenAI-compatible API under /v1, a web chat at /.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="run directory, HF directory, adapter directory or hub id; by default the directory "
        "gives the name",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any (%(default)s)")
    parser.add_argument(
        "--slots", type=positive, default=8, help="answers written at once, per model (%(default)s)"
    )
    parser.add_argument(
        "--max_queue", type=positive, default=256, help="answers that may wait (%(default)s)"
    )
    parser.add_argument(
        "--max_body", type=positive, default=2**20, help="longest request in bytes (%(default)s)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=600, help="seconds a request may take (%(default)s)"
    )
    parser.add_argument(
        "--api_key_file",
        type=Path,
        help="file with the key that clients must send; or set MINIGPT_API_KEY",
    )
    chosen = parser.parse_args(args)
    places, key = named(chosen.models), read_key(chosen.api_key_file)
    check_host(chosen.host, key)
    serve(chosen, places, key)


def named(models: list[str]) -> dict[str, str]:
    """Return the models' places by the names under which they are served.

    Raises:
        ConfigError: when two have the same name.
    """
    places: dict[str, str] = {}
    for model in models:
        name, mark, place = model.partition("=")
        if not mark:
            path = Path(model)
            folder = path.parent if path.name == "hf" else path
            name, place = (folder.resolve().name if path.exists() else model), model
        if not name or not place or name in places:
            raise ConfigError(f"Every model needs a name of its own: give NAME=MODEL for {model}.")
        places[name] = place
    return places


def read_key(file: Path | None) -> str | None:
    """Return the key that clients must send, if any.

    Raises:
        ConfigError: when the file gives none.
    """
    if file is None:
        return os.environ.get("MINIGPT_API_KEY", "").strip() or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api_key_file: {file} cannot be read: {error}") from error
    if not key:
        raise ConfigError(f"--api_key_file: {file} is empty. Write a key into it.")
    return key


def check_host(host: str, key: str | None) -> None:
    """Refuse to listen where others can reach it without a key."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and key is None:
        raise ConfigError(
            f"--host {host} can be reached by others, so it needs a key: set MINIGPT_API_KEY, "
            "for example to the output of: openssl rand -hex 32"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: when the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        message = f"Cannot listen on {host} port {port}: {error}. Choose another --port or --host."
        raise ConfigError(message) from error


def serve(chosen: argparse.Namespace, places: dict[str, str], key: str | None) -> None:
    """Load the models and serve them until SIGTERM, or Ctrl-C, which raises."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'minigpt[serve]'") from error
    from minigpt.cli import quiet
    from minigpt.infer.engine import Engine
    from minigpt.serve.app import create_app
    from minigpt.serve.run import run
    from minigpt.serve.worker import Worker

    quiet()
    with listen(chosen.host, chosen.port) as listener:
        engines = {name: Engine.load(place) for name, place in places.items()}
        worker = Worker(engines, chosen.slots, chosen.max_queue)
        app = create_app(worker, key, chosen.max_body, chosen.timeout)
        host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
        place = f"http://{host}:{listener.getsockname()[1]}"
        print(f"Serving {', '.join(engines)} at {place} (Ctrl-C stops)", flush=True)
        run(app, worker, listener)
