"""`minigpt serve`: an OpenAI-compatible API and a web chat."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

from minigpt.cli.options import (
    MODEL_HELP,
    CommandParser,
    add_weights,
    positive,
    quiet,
    run_name,
)
from minigpt.errors import ConfigError

MAX_NAME = 256  # characters, as requests may name no longer one
EXAMPLES = """examples:
  minigpt serve outputs/sft
  minigpt serve outputs/pretrain outputs/sft outputs/dpo outputs/lora
  minigpt serve small=outputs/sft --port 9000 --slots 16 --max_context 1024
  MINIGPT_API_KEY=$(openssl rand -hex 32) minigpt serve outputs/sft --host 0.0.0.0
"""


def main(arguments: list[str]) -> None:
    """Parse the command line, load the models and serve until a signal comes."""
    args = parser().parse_args(arguments)
    key = api_key(os.environ.get("MINIGPT_API_KEY", ""))
    paths = paths_by_name(args.models)
    with listen(args.host, args.port, key) as listener:
        serve(args, paths, key, listener)


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(
        prog="minigpt serve",
        description="Serve models: an OpenAI-compatible API under /v1, a web chat at /. "
        "MINIGPT_API_KEY sets the key that clients must send.",
        epilog=EXAMPLES,
    )
    top.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help=f"{MODEL_HELP}; the name is the directory's by default",
    )
    top.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    top.add_argument("--port", type=int, default=8000, help="0 takes any (%(default)s)")
    for name, default, text in (
        ("slots", 8, "answers generated at once, per model"),
        ("max_queue", 256, "answers that may wait, per model"),
        ("max_context", 4096, "tokens of a prompt and its answer; at most what the model takes"),
        ("max_body", 2**20, "longest request in bytes"),
        ("timeout", 600, "seconds that an answer may take"),
    ):
        top.add_argument(f"--{name}", type=positive, default=default, help=f"{text} ({default})")
    add_weights(top)
    return top


def api_key(text: str) -> str | None:
    """Return the key that clients must send; None where there is none."""
    key = text.strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            "MINIGPT_API_KEY: a key is sent in a header, so it may hold only letters of ASCII, "
            "digits and signs, without a space. Make one with: openssl rand -hex 32"
        )
    return key or None


def paths_by_name(models: list[str]) -> dict[str, str]:
    """Return the models' paths or hub ids by the names under which they are served."""
    from minigpt.model.restore import names_checkpoint

    paths: dict[str, str] = {}
    for model in models:
        name, separator, path = model.partition("=")
        is_checkpoint = names_checkpoint(Path(model)) and "=" not in str(Path(model).parent)
        if is_checkpoint or os.path.exists(model):  # which may hold a `=`
            name, path = run_name(model), model
        elif not separator:
            name, path = model, model
        if not name or not path or name in paths:
            raise ConfigError(f"Every model needs a name of its own: give NAME=MODEL for {model}.")
        if len(name) > MAX_NAME or not name.isprintable():
            raise ConfigError(
                f"A model's name has at most {MAX_NAME} characters, all of which can be printed: "
                f"give NAME=MODEL for {model[:MAX_NAME]!r}."
            )
        paths[name] = path
    return paths


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """Return a socket that listens; raises a ConfigError if others can reach it without a key."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: a port is a number from 0 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        loopback = str(address[0]).startswith("127.") or address[0] == "::1"
        if not loopback and key is None:
            raise ConfigError(
                f"--host {host} can be reached by others, so it needs a key: set MINIGPT_API_KEY, "
                "for example to the output of: openssl rand -hex 32"
            )
        return socket.create_server((str(address[0]), port), family=family)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error}. Choose another --port or --host."
        ) from error


def serve(
    args: argparse.Namespace, paths: dict[str, str], key: str | None, listener: socket.socket
) -> None:
    """Load the models and serve them until SIGTERM; Ctrl-C raises."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'minigpt[serve]'") from error
    from minigpt.infer.engine import Engine
    from minigpt.serve.app import create_app
    from minigpt.serve.network import run
    from minigpt.serve.worker import Worker

    quiet()
    engines = {name: Engine.load(path, weights=args.weights) for name, path in paths.items()}
    for engine in engines.values():
        engine.context = min(engine.context, args.max_context)
    worker = Worker(engines, args.slots, args.max_queue)
    app = create_app(worker, key, args.max_body, args.timeout)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(f"Serving {', '.join(engines)} at http://{address}:{port} (Ctrl-C stops)", flush=True)
    run(app, worker, listener)
