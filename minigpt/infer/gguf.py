"""Answer with a GGUF file through llama.cpp, where the extra `gguf` is installed."""

from __future__ import annotations

import http.client
import importlib.util
import json
import secrets
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from minigpt import progress
from minigpt.data.chat import ChatCodec
from minigpt.data.formats import Message
from minigpt.data.prompts import check_unicode
from minigpt.data.tokenizer import END_OF_TEXT, with_start
from minigpt.errors import ConfigError, ModelError
from minigpt.infer.continuous_batch import Delta, Finish, check_fits
from minigpt.infer.engine import Reply
from minigpt.infer.sampling import Sampling
from minigpt.infer.text import UNFINISHED, StopTexts
from minigpt.reading import NotReadableError, refusing

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy.typing import NDArray

MAX_CONTEXT = 8192  # tokens: llama.cpp allocates the cache for all of them at once
EXIT_SECONDS = 10  # in which its process exits, or else is killed
CERTAIN_BIAS = 1e4  # added to a logit, it leaves no other token a probability
SPECIAL, ADDED = 3, 4  # gguf.TokenType of control tokens and of others that are added
MAX_READS = 1 << 23  # of numbers and texts in a file's header: a vocabulary takes about a million
UNQUANTIZED = (0, 1)  # general.file_type of files in f32 and f16


def find_gguf(model: str | Path) -> Path | None:
    """Return the GGUF file that a path names: itself, or the one in an exported directory.

    Raises:
        ModelError: when there is no such file.
        ConfigError: when the directory holds several.
    """
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ModelError(f"There is no file {path}. Make it with: minigpt export gguf")
        return path
    if not path.is_dir() or (path / "hf").is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"{path} holds several models: give one of {names} itself.")
    return files[0] if files else None


class LlamaCpp:
    """llama.cpp on a GGUF file, in a process of its own, which a damaged file may end.

    It is asked over a loopback port with a random key.

    Args:
        file: the GGUF file.
        context: longest sequence in tokens, no longer than the model was trained on.
        exact: keep the cache in f32, and do not round to f16 in attention.

    Raises:
        ModelError: when llama.cpp refuses the file, or crashes on it; also in later requests.
    """

    def __init__(self, file: Path, context: int, exact: bool = True) -> None:
        self.file = file
        key = secrets.token_hex()
        self.headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        options = {"file": str(file), "context": context, "exact": exact, "key": key}
        options["threads"] = torch.get_num_threads()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("llama_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends an answer, not this
            text=True,
        )
        self.close = weakref.finalize(self, _kill, self.process)
        try:
            self.host = urlsplit(self._start_server(options)).netloc
            self.ask("/completion", prompt=[0], n_predict=1)
        except BaseException:
            self.close()
            raise

    def _start_server(self, options: dict[str, Any]) -> str:
        """Return the address of the server in the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(options) + "\n")
            self.process.stdin.flush()
            address = self.process.stdout.readline().strip()
        except BrokenPipeError:
            address = ""
        if not address:
            raise self._exit_error("load")
        return address

    def _exit_error(self, verb: str) -> ModelError:
        """Return the error that says that llama.cpp cannot load or use the file, and its signal."""
        with suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]  # asks it to exit
        try:
            status = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.close()
            status = 0
        how = f" (it ended by {signal.Signals(-status).name})" if status < 0 else ""
        return ModelError(
            f"llama.cpp cannot {verb} {self.file.name}: it is damaged, or not for this "
            f"version{how}. Export it again."
        )

    def _post(self, path: str, body: dict[str, object]) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.host)
        try:
            connection.request("POST", path, json.dumps(body), self.headers)
        except OSError as error:
            raise self._exit_error("use") from error
        return connection

    def ask(self, path: str, **body: object) -> dict[str, Any]:
        """Post a request; return the decoded answer.

        Raises:
            ModelError: when llama.cpp has ended.
        """
        try:
            with closing(self._post(path, body)) as connection:
                answer: dict[str, Any] = json.loads(connection.getresponse().read())
                return answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._exit_error("use") from error

    def complete(self, **body: object) -> Iterator[dict[str, Any]]:
        """Request a completion; yield it, or, with `stream=True`, what each step adds.

        Closing the iterator ends the request.

        Raises:
            ModelError: when llama.cpp refuses the request, or breaks off.
        """
        body = {**body, "return_tokens": True}
        done = False
        with closing(self._post("/completion", body)) as connection:
            for line in filter(bytes.strip, connection.getresponse()):
                step = json.loads(line.removeprefix(b"data: "))
                if "error" in step:
                    raise ModelError(f"llama.cpp gave no answer: {step['error']['message']}")
                done = step["stop"]
                yield step
        if not done:
            raise ModelError("llama.cpp broke off before the end of the reply. Ask again.")

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. One request asks for all, with the id -1 after each text."""
        content = [item for text in texts for item in (text, -1)]
        answer = self.ask("/tokenize", content=content, add_special=False, parse_special=True)
        ids_of_texts: list[list[int]] = [[]]
        for token in answer["tokens"]:
            if token == -1:
                ids_of_texts.append([])
            else:
                ids_of_texts[-1].append(token)
        return ids_of_texts[:-1]

    def start(self) -> list[int]:
        """Return the ids that are written before a text, such as BOS."""
        options: dict[str, object] = {"content": "a", "parse_special": True}
        with_start = self.ask("/tokenize", add_special=True, **options)["tokens"]
        without = self.ask("/tokenize", add_special=False, **options)["tokens"]
        return list(with_start[: len(with_start) - len(without)])

    def ends_with(self, token: int) -> bool:
        """Whether a token ends a reply, tried with a bias that makes it certain."""
        bias = [[token, CERTAIN_BIAS]]
        reply = self.ask("/completion", prompt=[0], n_predict=2, temperature=0, logit_bias=bias)
        return str(reply["stop_type"]) == "eos"

    def prompt_of(self, chat: list[dict[str, str]]) -> str:
        """Return the prompt that a chat becomes.

        Where llama.cpp itself writes BOS, it takes the template's BOS off the rendered text.
        """
        prompt = str(self.ask("/apply-template", messages=chat).get("prompt"))
        bos = str(self.ask("/detokenize", tokens=self.start())["content"])
        return prompt if prompt.startswith(bos) else bos + prompt

    def chat_ids_of(self, chat: list[dict[str, str]]) -> list[int]:
        """Return the ids of the prompt that a chat becomes, as the model gets them."""
        prompt = str(self.ask("/apply-template", messages=chat).get("prompt"))
        answer = self.ask("/tokenize", content=prompt, add_special=True, parse_special=True)
        return list(answer["tokens"])


class Gguf:
    """A GGUF file with the interface of `Engine`; prompts are answered one after the other.

    Args:
        file: a GGUF file, as `minigpt export gguf` writes it.

    Attributes:
        context: the longest sequence that is taken, in tokens.
        codec: renders chats; None where the file has no chat template.
        endless: go on after a token that ends the reply.

    Raises:
        ConfigError: when a package is missing.
        ModelError: when the file is damaged.
    """

    def __init__(self, file: Path) -> None:
        for package in ("gguf", "xllamacpp"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"GGUF files need one more package, {package}: pip install 'minigpt[gguf]'"
                )
        fields = read_fields(file)
        with refusing(str(file), ModelError, "Export it again.", verb="cannot be used"):
            architecture = fields.get("general.architecture")
            longest = fields.get(f"{architecture}.context_length", MAX_CONTEXT)
            self.context = min(int(longest), MAX_CONTEXT)
            if self.context < 1:
                raise NotReadableError(f"its context has {longest} tokens")
            self.tokenizer = tokenizer_of(fields)
            self.codec = ChatCodec(self.tokenizer) if self.tokenizer.chat_template else None
            has_end = END_OF_TEXT in fields.get("tokenizer.ggml.tokens", ())
            self._empty_prompt = END_OF_TEXT if has_end else str(self.tokenizer.eos_token)
            self.start = document_start(fields)
        # Weights of other types are rounded so much that the cache need not be exact.
        exact = fields.get("general.file_type") in UNQUANTIZED
        self.llama = LlamaCpp(file, self.context, exact)
        self.endless = False

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a text to continue, or of a chat to answer.

        Raises:
            ConfigError: for a chat when the model has no chat template.
            DataError: for text that is not valid Unicode, or a chat the template refuses.
        """
        check_unicode(prompt)
        if isinstance(prompt, str):
            ids = with_start(self._text_ids(prompt), self.start)
            return ids or self._text_ids(self._empty_prompt)
        if self.codec is None:
            raise ConfigError("This model has no chat template: give a plain text prompt.")
        texts = self.codec.unit_texts(prompt)
        return [token for text_ids in self.llama.ids_of(texts) for token in text_ids]

    def _text_ids(self, text: str) -> list[int]:
        return self.llama.ids_of([text])[0]

    def complete(
        self, prompts: Sequence[str | Sequence[Message]], sampling: Sampling | Sequence[Sampling]
    ) -> list[Reply]:
        """Complete prompts; replies come in the order asked. See `Engine.complete`."""
        return list(self.replies(prompts, sampling))

    def replies(
        self, prompts: Sequence[str | Sequence[Message]], sampling: Sampling | Sequence[Sampling]
    ) -> Iterator[Reply]:
        """Complete prompts and yield each reply as soon as it is finished."""
        ids = [self.encode(prompt) for prompt in prompts]
        samplings = [sampling] * len(ids) if isinstance(sampling, Sampling) else list(sampling)
        requests = []
        for number, (prompt_ids, options) in enumerate(zip(ids, samplings, strict=True), 1):
            name = f"Prompt {number}: " if len(ids) > 1 else ""
            requests.append((self._request(prompt_ids, options, name), options.stop))
        for done, (body, stop) in enumerate(requests, 1):
            yield self._reply(body, stop)
            progress.report(done, len(ids))

    def _reply(self, body: dict[str, Any], stop: Sequence[str]) -> Reply:
        (answer,) = self.llama.complete(**body, stop=stop)
        ids, stop_type = answer["tokens"], answer["stop_type"]
        ended_by = ids.pop() if stop_type == "eos" else None
        finish: Finish = "length" if stop_type == "limit" else "stop"
        return Reply(answer["content"].rstrip(UNFINISHED), ids, ended_by, finish)

    def stream(self, prompt: str | Sequence[Message], sampling: Sampling) -> Iterator[Delta]:
        """Complete one prompt and yield the reply as its characters come.

        Raises:
            ConfigError: for a prompt that fills the context, or where log-probs are asked for.
        """
        body = self._request(self.encode(prompt), sampling)
        stops = StopTexts(sampling.stop)
        count = 0  # tokens so far
        pending: list[int] = []  # tokens without a text so far: the last may end the reply
        broken = ""  # bytes that are no character, or not yet
        step: dict[str, Any] = {}
        for step in self.llama.complete(**body, stream=True):
            if step["stop"] or stops.stopped:
                break
            pending += self._step_ids(step, count)
            count = step["tokens_predicted"]
            if step["content"]:
                content = broken + step["content"]
                characters = content.rstrip(UNFINISHED)
                broken = content[len(characters) :]
                yield Delta(0, stops.add(characters), pending, [])
                pending = []
        ended = step.get("stop_type") == "eos"
        ended_by = pending.pop() if ended and pending else None
        finish: Finish = "stop" if ended or stops.stopped else "length"
        yield Delta(0, stops.end(), pending, [], finish, ended_by)

    def _step_ids(self, step: dict[str, Any], count: int) -> list[int]:
        """Return a step's ids; where some are missing, inside a character, encode its text."""
        ids: list[int] = step["tokens"]
        if step["tokens_predicted"] - count == len(ids):
            return ids
        return self._text_ids(step["content"])

    def _request(self, ids: list[int], sampling: Sampling, name: str = "") -> dict[str, Any]:
        """Return the request by which llama.cpp draws tokens as `Sampler` does.

        Raises:
            ConfigError: for a prompt that fills the context, or where log-probs are asked for.
        """
        check_fits(ids, self.context, name)
        if sampling.logprobs is not None:
            raise ConfigError("GGUF files are answered without log-probs. Use the run's own model.")
        greedy = sampling.temperature == 0
        steps = {  # in the order of `Sampler`; each costs time, so only those that do something
            "penalties": sampling.repetition_penalty != 1,
            "temperature": not greedy,
            "top_k": greedy or sampling.top_k > 0,
            "top_p": not greedy and sampling.top_p < 1,
            "min_p": not greedy and sampling.min_p > 0,
        }
        return {
            "prompt": ids,
            "n_predict": min(sampling.max_new_tokens, self.context - len(ids)),
            "samplers": [step for step, needed in steps.items() if needed],
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": self.context,
            "temperature": sampling.temperature,
            "top_k": 1 if greedy else sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": sampling.seed % (2**32 - 1),  # the last one stands for a random seed
            "cache_prompt": False,  # a reply must not depend on earlier requests
            "ignore_eos": self.endless,
        }


def read_fields(file: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file.

    Raises:
        ModelError: when it is damaged.
    """
    with refusing(str(file), ModelError, "Export it again.", verb="is no complete GGUF file"):
        if not file.is_file():
            raise NotReadableError("it is no regular file")
        reader = _bounded_reader()(file)
        return {name: field.contents() for name, field in reader.fields.items()}


def _bounded_reader() -> type[GGUFReader]:
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):
        """A reader that refuses sizes beyond the end of the file, and too many of them."""

        reads = 0

        def _get(
            self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
        ) -> NDArray[Any]:
            self.reads += 1
            if self.reads > MAX_READS:
                raise NotReadableError("its header does not end")
            values = super()._get(offset, dtype, count, override_order)
            if len(values) < int(count):
                raise NotReadableError("it says that more follows than the file holds")
            return values

    return BoundedReader


def document_start(fields: dict[str, Any]) -> list[int]:
    """Return the ids that llama.cpp writes before a text: BOS, where the file says so."""
    by_default = fields.get("tokenizer.ggml.model") == "llama"
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", by_default)
    bos = fields.get("tokenizer.ggml.bos_token_id")
    return [bos] if adds_bos and bos is not None else []


def _kill(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.kill()
    process.wait()


def tokenizer_of(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that renders a GGUF file's chats; texts are encoded by llama.cpp."""
    tokens = fields.get("tokenizer.ggml.tokens", ())
    types = fields.get("tokenizer.ggml.token_type", ())
    typed = list(zip(tokens, types, strict=False))
    control = [text for text, kind in typed if kind == SPECIAL]
    special = {}
    for name in ("eos", "bos"):
        if (index := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            special[f"{name}_token"] = tokens[index]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), additional_special_tokens=control, **special
    )
    # Unlike special tokens, these are encoded where the text of a message holds them.
    added = [AddedToken(text, normalized=False) for text, kind in typed if kind == ADDED]
    tokenizer.add_tokens(added)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer
