"""`minigpt chat`: talk with a model in the terminal."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from minigpt.cli.options import (
    CommandParser,
    add_model,
    add_sampling,
    add_weights,
    load_engine,
    sampling_of,
    writing,
)
from minigpt.errors import ConfigError, DataError, MiniGPTError
from minigpt.files import write_text
from minigpt.terminal import printable

if TYPE_CHECKING:
    from minigpt.data.formats import Message
    from minigpt.infer.engine import Engine, Sampling
    from minigpt.infer.gguf import Gguf

EXAMPLES = """examples:
  minigpt chat --model outputs/sft
  minigpt chat --model outputs/sft --adapter outputs/lora --system "Answer in one sentence."
  minigpt chat --model exports/sft-gguf

In the chat: /help lists the commands, Ctrl-C stops an answer, /quit or Ctrl-D ends the chat.
"""
HINT = "/help lists the commands, Ctrl-C stops an answer, /quit or Ctrl-D ends the chat."
COMMAND = re.compile(r"[/!](\w*)(?:\s+(.*))?")  # a path such as /etc/passwd is a message


def main(argv: list[str]) -> None:
    """Parse the command line, load the model and talk."""
    args = parser().parse_args(argv)
    sampling, engine = sampling_of(args), load_engine(args)
    if engine.codec is None:
        raise ConfigError(
            "This model has no chat template. Use: minigpt generate --text, or a model after SFT."
        )
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)
    ChatSession(engine, sampling, args.system).run()


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(prog="minigpt chat", description="Talk with a model.", epilog=EXAMPLES)
    add_model(top)
    add_weights(top)
    top.add_argument("--system", default="", help="system message")
    # Small models give rare tokens too much probability: docs/log.md measures these defaults.
    add_sampling(top, max_new_tokens=512, temperature=0.5, min_p=0.1)
    return top


class ChatSession:
    """A dialogue in the terminal; each message is sent with all that came before.

    Args:
        engine: the model that answers.
        sampling: how the tokens of the answers are drawn.
        system: message that stands before the dialogue; "" for none.
    """

    def __init__(self, engine: Engine | Gguf, sampling: Sampling, system: str) -> None:
        self.engine = engine
        self.sampling = sampling
        self.system_text = system
        self.history: list[Message] = []
        self.question = ""  # the last one
        self.answered = False  # whether its answer is in the history
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.commands: dict[str, Callable[[str], None]] = {
            name: getattr(self, name)
            for name in ("help", "clear", "set", "save", "load", "system", "retry", "quit")
        }

    def run(self) -> None:
        """Read lines and answer them, until the end of the input."""
        self.print_note(HINT)
        while True:
            try:
                self.handle(input("> ").strip())
            except EOFError:
                return self.console.print()
            except KeyboardInterrupt:
                self.print_note("\n/quit or Ctrl-D ends the chat.")
            except UnicodeDecodeError:
                self.print_note("That line is not UTF-8.")
            except MiniGPTError as error:
                self.print_note(str(error))

    def print_note(self, text: str) -> None:
        """Print a message of the program, dimmed."""
        self.console.print(printable(text), style="dim")

    def handle(self, line: str) -> None:
        """Run a command, which begins with / or !, or answer a message."""
        if match := COMMAND.fullmatch(line):
            name, rest = match.groups(default="")
            if name not in self.commands:
                raise ConfigError(f"There is no command {line[0]}{name}. See /help.")
            self.commands[name](rest)
        elif line:
            self.answer(line)

    def answer(self, line: str) -> None:
        """Answer a message; without an answer it does not enter the history."""
        from minigpt.data.formats import Message

        self.question = line
        self.answered = False
        messages = [*self.history, Message("user", line)]
        answer, tokens = "", 0
        start = time.perf_counter()
        try:
            for delta in self.engine.stream(self._with_system(messages), self.sampling):
                answer += delta.text
                tokens += len(delta.ids)
                self.console.print(printable(delta.text), end="")
            end = f"{tokens / (time.perf_counter() - start):.1f} tokens/s"
        except KeyboardInterrupt:
            end = "stopped"
        if answer.strip():
            self.history = [*messages, Message("assistant", answer)]
            self.answered = True
        self.print_note(f"\n[{tokens} tokens, {end}]")

    def _with_system(self, messages: list[Message]) -> list[Message]:
        from minigpt.data.formats import Message

        return [Message("system", self.system_text), *messages] if self.system_text else messages

    def help(self, _: str) -> None:
        """/help: list the commands."""
        lines = [str(command.__doc__) for command in self.commands.values()]
        self.print_note("\n".join([*lines, "Each may begin with ! instead of /."]))

    def quit(self, _: str) -> None:
        """/quit: end the chat."""
        raise EOFError

    def clear(self, _: str) -> None:
        """/clear: forget the dialogue."""
        self.history, self.question = [], ""
        self.print_note("The dialogue is empty.")

    def set(self, rest: str) -> None:
        """/set NAME VALUE: change how tokens are drawn; without a name, show it."""
        name, _, text = rest.partition(" ")
        values = {k: v for k, v in vars(self.sampling).items() if k != "logprobs"}
        if name and name not in values:
            raise ConfigError(f"There is no {name}. Known are {', '.join(values)}.")
        if name == "stop":
            self.sampling = replace(self.sampling, stop=(text,) if text else ())
        elif name:
            try:
                change: dict[str, Any] = {name: type(values[name])(text)}
            except ValueError:
                raise ConfigError(f"{name} must be a number, but is {text!r}.") from None
            self.sampling = replace(self.sampling, **change)
        self.print_note(" ".join(f"{k}={getattr(self.sampling, k)}" for k in values))

    def save(self, rest: str) -> None:
        """/save FILE: write the dialogue, as a line of JSONL that SFT can read."""
        if not rest or not self.history:
            raise ConfigError("Give a file: /save FILE, after an answer.")
        messages = [{"role": m.role, "content": m.content} for m in self._with_system(self.history)]
        row = json.dumps({"messages": messages}, ensure_ascii=False)
        with writing(rest):
            write_text(Path(rest), row + "\n")
        self.print_note(f"Saved to {rest}.")

    def load(self, rest: str) -> None:
        """/load FILE: go on with a dialogue that was saved."""
        from minigpt.data.formats import Chat, iter_rows, parse_row

        if not rest:
            raise ConfigError("Give a file: /load FILE")
        line, row = next(iter_rows(rest), (1, None))
        try:
            saved = parse_row(row, "chat")
        except DataError as error:
            raise error.at(rest, line) from None
        assert isinstance(saved, Chat)
        first, *others = saved.messages
        self.system_text = first.content if first.role == "system" else ""
        self.history = others if first.role == "system" else [first, *others]
        self.question, self.answered = self.history[-2].content, True
        self.print_note(f"{len(self.history)} messages. The last: {self.history[-1].content}")

    def system(self, rest: str) -> None:
        """/system TEXT: put a system message before the dialogue; without a text, none."""
        self.system_text = rest
        self.print_note(f"System message: {rest or 'none'}")

    def retry(self, _: str) -> None:
        """/retry: answer the last message again, with other random numbers."""
        if not self.question:
            raise ConfigError("There is nothing to answer again.")
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        if self.answered:
            self.history = self.history[:-2]
        self.answer(self.question)
