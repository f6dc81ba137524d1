"""`minigpt chat`: what is sent, the commands, and a real terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tiny
from patience import eventually, limit

from minigpt.cli.chat import parser
from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import Message
from minigpt.infer.engine import Delta, Engine, Sampling

Minigpt = Callable[..., Any]
Sent = list[tuple[list[Message], Sampling]]
HELLO = "/help lists the commands, Ctrl-C stops an answer, /quit or Ctrl-D ends the chat.\n"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What is sent to the engine; the answers are "one.", "two.", and so on."""
    requests: Sent = []

    def stream(self: Engine, prompt: list[Message], sampling: Sampling) -> Iterator[Delta]:
        self.encode(prompt)
        requests.append((list(prompt), sampling))
        yield Delta(1, ("one", "two", "three", "four")[len(requests) - 1], [5, 6], [])
        yield Delta(1, ".", [7], [], "stop")

    monkeypatch.setattr(Engine, "stream", stream)
    return requests


@pytest.fixture
def talk(minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch, trained: Path) -> Callable[..., str]:
    """Start a chat, type the lines, and return what is printed; the numbers of a rate are N."""

    def start(*lines: str, options: tuple[str, ...] = (), typed: bytes = b"") -> str:
        content = typed or "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
        outcome = minigpt("chat", "--model", trained / "sft", *options)
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out.startswith(HELLO)
        return re.sub(r"[\d.]+ tokens/s", "N tokens/s", outcome.out.removeprefix(HELLO))

    return start


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def test_all_of_the_dialogue_is_sent(talk: Callable[..., str], sent: Sent) -> None:
    out = talk("你好", "", "  and then? ")
    assert [prompt for prompt, _ in sent] == [
        [user("你好")],
        [user("你好"), assistant("one."), user("and then?")],
    ]
    assert out == "> one.\n[3 tokens, N tokens/s]\n> > two.\n[3 tokens, N tokens/s]\n> \n"
    assert sent[0][1] == Sampling(512, 0.5, min_p=0.1)


def test_special_tokens_that_a_user_types_stay_text(
    talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    prompts = tiny.recorded_prompts(monkeypatch)
    question = " ".join(tiny.FORGED.split())  # of one line
    talk(question, options=("--max_new_tokens", "2", "--temperature", "0"))
    assert prompts == [tiny.asked_as_text(tokenizers.load(trained / "sft" / "hf"), question)]


def test_options_and_settings(talk: Callable[..., str], sent: Sent) -> None:
    options = ("--system", "Be short.", "--temperature", "0.2", "--stop", "x", "--seed", "3")
    out = talk(
        "a",
        "!set top_k 7",
        "!set stop END",
        "!set min_p 0.2",
        "!set max_new_tokens 9",
        "!system Be long.",
        "b",
        "!set stop",
        "!set",
        "!system",
        "c",
        options=options,
    )
    assert sent[0] == (
        [Message("system", "Be short."), user("a")],
        Sampling(512, 0.2, min_p=0.1, **SEED),
    )
    longer = [Message("system", "Be long."), user("a"), assistant("one."), user("b")]
    assert sent[1][0] == longer
    assert sent[1][1] == Sampling(9, 0.2, 7, seed=3, min_p=0.2, stop=("END",))
    assert [m.role for m in sent[2][0]] == ["user", "assistant", "user", "assistant", "user"]
    assert "max_new_tokens=9 temperature=0.2 top_k=7" in out
    assert "repetition_penalty=1.0 stop=()" in out


SEED: dict[str, Any] = {"seed": 3, "stop": ("x",)}


def test_the_web_chat_begins_with_the_same_settings() -> None:
    page = resources.files("minigpt.serve").joinpath("page.html").read_text(encoding="utf-8")
    args = parser().parse_args(["--model", "x"])
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        (slider,) = re.findall(rf"\b{name}: \[([-\d., ]+)\]", page)
        assert float(slider.split(",")[3]) == getattr(args, name)


def test_clear_and_retry(talk: Callable[..., str], sent: Sent) -> None:
    talk("a", "b", "!retry", "!clear", "c")
    before = [user("a"), assistant("one."), user("b")]
    assert [prompt for prompt, _ in sent] == [before[:1], before, before, [user("c")]]
    assert [sampling.seed for _, sampling in sent] == [0, 0, 1, 1]


def test_a_saved_dialogue_goes_on(talk: Callable[..., str], sent: Sent, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "chat.jsonl"
    talk("你好", f"!save {file}", options=("--system", "Be short."))
    roles = [("system", "Be short."), ("user", "你好"), ("assistant", "one.")]
    row = {"messages": [{"role": role, "content": text} for role, text in roles]}
    assert json.loads(file.read_text(encoding="utf-8")) == row
    out = talk(f"!load {file}", "more", "!retry")
    assert "2 messages. The last: one." in out
    assert sent[1][0] == [*(Message(*turn) for turn in roles), user("more")]
    assert sent[2][0] == sent[1][0]
    talk(f"!load {file}", "!retry")
    assert sent[3][0] == sent[0][0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("!nothing", "There is no command !nothing. See /help."),
        ("/nothing at all", "There is no command /nothing. See /help."),
        ("/", "There is no command /. See /help."),
        ("!set colour red", "There is no colour. Known are max_new_tokens, temperature,"),
        ("!set top_k many", "top_k must be a number, but is 'many'."),
        ("!set top_p 3", "top_p must lie in (0, 1]"),
        ("!save", "Give a file: /save FILE"),
        ("!save /", "Give a file: /save FILE, after an answer"),
        ("!load", "Give a file: /load FILE"),
        ("!load none.jsonl", "none.jsonl: cannot be read"),
        ("!load {root}/pretrain.jsonl", "pretrain.jsonl:1: not a chat row"),
        ("!retry", "There is nothing to answer again."),
        ("word " * 200, "the model's context length is 128"),
    ],
)
def test_mistakes_are_reported_and_change_nothing(
    talk: Callable[..., str], trained: Path, line: str, message: str
) -> None:
    out = talk(line.replace("{root}", str(trained)), "the cat", "!set")
    assert message in out
    assert "tokens/s]" in out
    assert "temperature=0.5 top_k=0 top_p=1.0" in out


def test_a_path_that_cannot_be_written(talk: Callable[..., str], sent: Sent) -> None:
    assert "Cannot write to /proc/none/chat.jsonl" in talk("a", "!save /proc/none/chat.jsonl")


@pytest.mark.parametrize("line", ["/help", "!help"])
def test_help_names_every_command(talk: Callable[..., str], line: str) -> None:
    out = talk(line)
    for name in ("help", "clear", "set", "save", "load", "system", "retry", "quit"):
        assert f"/{name}" in out


def test_commands_may_begin_with_a_slash(talk: Callable[..., str], sent: Sent) -> None:
    out = talk("/set top_k 7", "/system Be short.", "a", "/retry", "/clear", "b")
    assert "top_k=7" in out
    assert [sampling.top_k for _, sampling in sent] == [7, 7, 7]
    assert [prompt[1:] for prompt, _ in sent] == [[user("a")], [user("a")], [user("b")]]


@pytest.mark.parametrize("line", ["/quit", "!quit"])
def test_quit_ends_the_chat(talk: Callable[..., str], sent: Sent, line: str) -> None:
    talk("a", line, "b")
    assert len(sent) == 1


def test_a_path_is_a_message(talk: Callable[..., str], sent: Sent) -> None:
    talk("/etc/passwd holds what?", "//")
    assert [prompt[-1].content for prompt, _ in sent] == ["/etc/passwd holds what?", "//"]


def test_a_line_that_is_not_utf8(talk: Callable[..., str], sent: Sent) -> None:
    assert "That line is not UTF-8." in talk(typed="你好\n".encode("gbk"))
    assert sent == []


def test_a_model_without_a_template_is_refused(minigpt: Minigpt, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tiny.model("llama").save_pretrained(plain)
    tiny.tokenizer(plain, template=False)
    outcome = minigpt("chat", "--model", plain)
    assert outcome.status == 2
    assert "no chat template. Use: minigpt generate --text" in outcome.err


class Terminal:
    """A program in its own pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self.main, side = pty.openpty()

        def attach_terminal() -> None:
            os.setsid()
            fcntl.ioctl(side, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, preexec_fn=attach_terminal
        )
        os.close(side)
        self.pending = ""

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def expect(self, pattern: str) -> str:
        """Read until the pattern comes; the text after it stays for the next call."""
        end = time.monotonic() + limit(120)
        while not (match := re.search(pattern, self.pending, re.DOTALL)):
            ready, _, _ = select.select([self.main], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come; there is {self.pending[-500:]!r}"
            self.pending += os.read(self.main, 65536).decode(errors="replace")
        self.pending = self.pending[match.end() :]
        return match.group()

    def listens(self) -> bool:
        """Return whether the program waits for a key."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "S"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A chat with a model that never ends its answer."""
    model = tiny.model("qwen3", max_position_embeddings=200_000, eos_token_id=None)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer(tmp_path / "model")
    options = ("--max_new_tokens", "150000", "--temperature", "0", "--stop", "never comes")
    command = (sys.executable, "-m", "minigpt", "chat", "--model", str(tmp_path / "model"))
    opened = Terminal(*command, *options)
    yield opened
    opened.close()


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.expect("Ctrl-D ends the chat.*> ")
    terminal.type("the cat\n")
    terminal.expect(r"the cat\r\n\S.{20}")  # it streams
    terminal.type("\x03")
    terminal.expect(r"\[\d+ tokens, stopped\].*> ")
    eventually(terminal.listens)  # readline shows its prompt a moment before
    terminal.type("\x03")  # with no answer to stop
    terminal.expect("Ctrl-D ends the chat.*> ")
    terminal.type("!set max_new_tokens 5\n")
    terminal.expect("max_new_tokens=5 .*> ")
    terminal.type("你好\n")
    terminal.expect(r"\[5 tokens, [\d.]+ tokens/s\].*> ")
    terminal.type("\x04")
    assert terminal.process.wait(limit(60)) == 0


def test_escapes_of_a_model_do_not_reach_the_terminal(
    talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(self: Engine, prompt: list[Message], sampling: Sampling) -> Iterator[Delta]:
        yield Delta(1, "a\x1b]0;title\x07", [5], [], "stop")

    monkeypatch.setattr(Engine, "stream", stream)
    out = talk("hi", "!\x1b[2J", "!system \x9b1m")
    assert "a\\u001b]0;title\\u0007" in out
    assert not {"\x1b", "\x07", "\x9b"} & set(out)
