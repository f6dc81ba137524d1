"""Answer with a GGUF file through llama.cpp, where the extra `gguf` is installed."""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from minigpt import progress
from minigpt.data.chat import ChatCodec
from minigpt.data.formats import Message
from minigpt.data.tokenizer import END_OF_TEXT, started
from minigpt.errors import ConfigError, ModelError
from minigpt.infer.continuous_batch import Delta, Finish, check_fits
from minigpt.infer.engine import Reply, check_unicode
from minigpt.infer.sampling import Sampling
from minigpt.infer.text import StopTexts

CONTEXT = 8192  # longest context, in tokens: llama.cpp sets the cache aside at once
SURE = 1e4  # added to a logit, it leaves no other token a probability
ADDED = (3, 4)  # gguf.TokenType of control tokens and of others that are added
EXACT = (0, 1)  # general.file_type of files in f32 and f16


def find_gguf(place: str | Path) -> Path | None:
    """Return the GGUF file that a path stands for: itself, or the one in an exported directory.

    Raises:
        ModelError: when there is no such file.
        ConfigError: when the directory holds several.
    """
    path = Path(place)
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
    """llama.cpp on a GGUF file, asked over a loopback port with a key of its own.

    Args:
        file: what it loads.
        context: longest sequence, in tokens; what the model was trained on is the limit.
        exact: keep the cache in f32, and do not round to f16 in attention.

    Raises:
        ModelError: when llama.cpp refuses the file.
    """

    def __init__(self, file: Path, context: int, exact: bool = True) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), context, 1
        params.warmup, params.verbosity = False, 0  # nothing on the terminal
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            flash = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.flash_attn_type = flash
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        key = secrets.token_hex()
        params.api_keys = [key]
        self.headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ModelError(
                f"llama.cpp cannot load {file.name}: it is damaged, or not for this version."
            ) from error
        self.host = urlsplit(self.server.listening_address).netloc
        # A server that is dropped before its loop has begun never ends: see that it has.
        self.ask("/completion", prompt=[0], n_predict=1)

    def ask(self, path: str, **body: Any) -> Any:
        """Post a request; return the decoded answer."""
        with closing(http.client.HTTPConnection(self.host)) as connection:
            connection.request("POST", path, json.dumps(body), self.headers)
            return json.loads(connection.getresponse().read())

    def complete(self, **body: Any) -> Iterator[Any]:
        """Ask for a completion; yield it, or its steps. Leaving early ends the request.

        Raises:
            ModelError: when llama.cpp refuses the request, or breaks off.
        """
        body, done = {**body, "return_tokens": True}, False
        with closing(http.client.HTTPConnection(self.host)) as connection:
            connection.request("POST", "/completion", json.dumps(body), self.headers)
            for line in filter(bytes.strip, connection.getresponse()):
                step = json.loads(line.removeprefix(b"data: "))
                if "error" in step:
                    raise ModelError(f"llama.cpp gave no answer: {step['error']['message']}")
                done = step["stop"]
                yield step
        if not done:
            raise ModelError("llama.cpp broke off before the end of the reply. Ask again.")

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, asked in one row with -1 after each."""
        row = [part for text in texts for part in (text, -1)]
        ids = self.ask("/tokenize", content=row, add_special=False, parse_special=True)["tokens"]
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == -1:
                parts.append([])
            else:
                parts[-1].append(token)
        return parts[:-1]

    def start(self) -> list[int]:
        """Return the ids that are written before a text, such as BOS."""
        asked: dict[str, Any] = {"content": "a", "parse_special": True}
        whole = self.ask("/tokenize", add_special=True, **asked)["tokens"]
        plain = self.ask("/tokenize", add_special=False, **asked)["tokens"]
        return list(whole[: len(whole) - len(plain)])

    def ends_with(self, token: int) -> bool:
        """Whether a token ends a reply: it is made the likeliest, and it is seen what comes."""
        wanted: dict[str, Any] = {"temperature": 0, "logit_bias": [[token, SURE]]}
        said = self.ask("/completion", prompt=[0], n_predict=2, **wanted)
        return str(said["stop_type"]) == "eos"

    def prompt_of(self, chat: list[dict[str, str]]) -> str:
        """Return the prompt that a chat becomes.

        Where llama.cpp itself writes BOS, it takes the template's own off the rendered text.
        """
        prompt = str(self.ask("/apply-template", messages=chat).get("prompt"))
        bos = str(self.ask("/detokenize", tokens=self.start())["content"])
        return prompt if prompt.startswith(bos) else bos + prompt

    def chat_ids_of(self, chat: list[dict[str, str]]) -> list[int]:
        """Return the ids of the prompt that a chat becomes, as they are asked of the model."""
        prompt = str(self.ask("/apply-template", messages=chat).get("prompt"))
        asked = self.ask("/tokenize", content=prompt, add_special=True, parse_special=True)
        return list(asked["tokens"])


class Gguf:
    """A GGUF file, asked as an `Engine` is; prompts are answered one after the other.

    Args:
        file: such as `minigpt export gguf` writes.

    Attributes:
        context: the longest sequence that is taken, in tokens.
        codec: renders chats; None where the file has no chat template.
        endless: go on after a token that ends the reply.

    Raises:
        ConfigError: when a package is missing.
        ModelError: when the file is damaged.
    """

    def __init__(self, file: Path) -> None:
        try:
            import xllamacpp  # noqa: F401

            told = read_fields(file)
        except ImportError as error:
            words = f"GGUF files need one more package, {error.name}: pip install 'minigpt[gguf]'"
            raise ConfigError(words) from error
        trained = told.get(f"{told.get('general.architecture')}.context_length", CONTEXT)
        self.tokenizer, self.context = tokenizer_of(told), min(trained, CONTEXT)
        self.codec = ChatCodec(self.tokenizer) if self.tokenizer.chat_template else None
        known = END_OF_TEXT in told.get("tokenizer.ggml.tokens", ())
        self._nothing = END_OF_TEXT if known else str(self.tokenizer.eos_token)
        self.start = document_start(told)
        exact = told.get("general.file_type") in EXACT  # others are rounded much more than f16
        self.llama, self.endless = LlamaCpp(file, self.context, exact), False

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a text to continue, or of a chat to answer.

        Raises:
            ConfigError: for a chat when the model has no chat template.
            DataError: for text that is not valid Unicode, or a chat the template refuses.
        """
        check_unicode(prompt)
        if isinstance(prompt, str):
            ids = [started(self._text_ids(prompt), self.start) or self._text_ids(self._nothing)]
        elif self.codec is None:
            raise ConfigError("This model has no chat template: give a plain text prompt.")
        else:
            ids = self.llama.ids_of(self.codec.unit_texts(prompt))
        return [token for piece in ids for token in piece]

    def _text_ids(self, text: str) -> list[int]:
        return [token for piece in self.llama.ids_of([text]) for token in piece]

    def complete(
        self, prompts: Sequence[str | Sequence[Message]], sampling: Sampling | Sequence[Sampling]
    ) -> list[Reply]:
        """Complete prompts; replies come in the order asked. See `Engine.complete`."""
        return list(self.replies(prompts, sampling))

    def replies(
        self, prompts: Sequence[str | Sequence[Message]], sampling: Sampling | Sequence[Sampling]
    ) -> Iterator[Reply]:
        """Complete prompts and yield each reply as it is there."""
        ids = [self.encode(prompt) for prompt in prompts]
        how = [sampling] * len(ids) if isinstance(sampling, Sampling) else list(sampling)
        asked = [
            self._request(one, chosen, f"Prompt {index + 1}: " * (len(ids) > 1))
            for index, (one, chosen) in enumerate(zip(ids, how, strict=True))
        ]
        for done, (body, one) in enumerate(zip(asked, how, strict=True), 1):
            yield self._reply(body, one.stop)
            progress.step(done, len(ids))

    def _reply(self, body: dict[str, Any], stop: Sequence[str]) -> Reply:
        (said,) = self.llama.complete(**body, stop=stop)
        ids, kind = said["tokens"], said["stop_type"]
        ended_by = ids.pop() if kind == "eos" else None
        return Reply(said["content"], ids, ended_by, "length" if kind == "limit" else "stop")

    def stream(self, prompt: str | Sequence[Message], sampling: Sampling) -> Iterator[Delta]:
        """Complete one prompt and yield the reply as its characters come.

        Raises:
            ConfigError: for a prompt that fills the context, or where log-probs are asked for.
        """
        body = self._request(self.encode(prompt), sampling)
        text, count = StopTexts(sampling.stop), 0
        silent: list[int] = []  # tokens without a text: the last may be the one that ends
        for step in self.llama.complete(**body, stream=True):
            if step["stop"] or text.stopped:
                break
            ids, count = self._told(step, count), step["tokens_predicted"]
            if step["content"]:
                yield Delta(0, text.add(step["content"]), silent + ids, [])
            silent = [] if step["content"] else silent + ids
        ended = step.get("stop_type") == "eos"
        ended_by = silent.pop() if ended and silent else None
        finish: Finish = "stop" if ended or text.stopped else "length"
        yield Delta(0, text.end(), silent, [], finish, ended_by)

    def _told(self, step: dict[str, Any], count: int) -> list[int]:
        """Return a step's ids; parts of a character are not told, so its text is read again."""
        ids: list[int] = step["tokens"]
        if step["tokens_predicted"] - count == len(ids):
            return ids
        return self._text_ids(step["content"])

    def _request(self, ids: list[int], sampling: Sampling, name: str = "") -> dict[str, Any]:
        """Return what asks llama.cpp for tokens as `Chooser` chooses them.

        Raises:
            ConfigError: for a prompt that fills the context, or where log-probs are asked for.
        """
        check_fits(ids, self.context, name)
        if sampling.logprobs is not None:
            raise ConfigError("GGUF files are answered without log-probs. Use the run's own model.")
        greedy = sampling.temperature == 0
        steps = {  # in Chooser's order; each costs time, so only those that do something
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
            "cache_prompt": False,  # a reply must not depend on what was asked before
            "ignore_eos": self.endless,
        }


def read_fields(file: Path) -> dict[str, Any]:
    """Return what a GGUF file says about its model.

    Raises:
        ModelError: when it is damaged.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        return {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is no whole GGUF file: {error}. Export it again.") from error


def document_start(told: dict[str, Any]) -> list[int]:
    """Return the ids that llama.cpp writes before a text: BOS, where the file says so."""
    writes = told.get("tokenizer.ggml.add_bos_token", told.get("tokenizer.ggml.model") == "llama")
    bos = told.get("tokenizer.ggml.bos_token_id")
    return [bos] if writes and bos is not None else []


def tokenizer_of(told: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a GGUF file's chat template and the special tokens it names; it reads no text."""
    own = {name.removeprefix("tokenizer."): value for name, value in told.items()}
    ids = {name: own.get(f"ggml.{name}_token_id") for name in ("eos", "bos")}
    named = {f"{k}_token": own["ggml.tokens"][at] for k, at in ids.items() if at is not None}
    kinds = zip(own.get("ggml.tokens", ()), own.get("ggml.token_type", ()), strict=False)
    added = [text for text, kind in kinds if kind in ADDED]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), additional_special_tokens=added, **named
    )
    tokenizer.chat_template = own.get("chat_template")
    return tokenizer
