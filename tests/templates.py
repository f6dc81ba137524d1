"""Chat templates that behave as published ones do, and tokenizers of the kinds they come with."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minigpt.data.tokenizer import CHAT_TEMPLATE, wrap


class Published(NamedTuple):
    """A template, the tokens it is written with, and which of them is the eos."""

    source: str
    tokens: tuple[str, ...]
    eos: str
    bos: str | None = None


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROLES = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# Reasoning stays in answers to the last question only, where it is written out even if empty.
QWEN3 = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endfor -%}
{%- set asked = namespace(count=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set text = m.content -%}{%- set thought = '' -%}
    {%- if '</think>' in text -%}
      {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    START
    {%- if asked.count == ns.last -%}
      {{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- text + '<|im_end|>' -}}
    STOP
    {{- '\\n' -}}
  {%- else -%}
    {%- if m.role == 'user' -%}{%- set asked.count = asked.count + 1 -%}{%- endif -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
PHI3 = """
{%- for m in messages -%}
  {{- '<|' + m.role + '|>\\n' -}}
  {%- if m.role == 'assistant' -%}START{{- m.content + '<|end|>\\n' -}}STOP
  {%- else -%}{{- m.content + '<|end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""
# The system's text is told with the last question, and only while that is unanswered.
MISTRAL = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{{- bos_token -}}
{%- for m in messages if m.role != 'system' -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('user and assistant must take turns') -}}
  {%- endif -%}
  {%- if m.role == 'user' -%}
    {%- if loop.last and system -%}{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' -}}
    {%- else -%}{{- '[INST] ' + m.content + '[/INST]' -}}{%- endif -%}
  {%- else -%}START{{- ' ' + m.content | trim + eos_token -}}STOP
  {%- endif -%}
{%- endfor -%}
"""
LLAMA2 = MISTRAL.replace("[/INST]'", " [/INST]'").replace("m.content | trim +", "m.content + ' ' +")
_GEMMA = """
{%- for m in messages -%}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
  {%- if m.role == 'assistant' -%}START{{- m.content | trim + '<end_of_turn>' -}}STOP{{- '\\n' -}}
  {%- else -%}{{- FIRST + m.content | trim + '<end_of_turn>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
GEMMA2 = (
    "{{- bos_token -}}{%- if messages[0].role == 'system' -%}"
    "{{- raise_exception('System role not supported') -}}{%- endif -%}"
    + _GEMMA.replace("FIRST", "''")
)
# The system's text is told with the first question.
GEMMA3 = (
    "{{- bos_token -}}{%- set told = '' -%}{%- if messages[0].role == 'system' -%}"
    "{%- set told = messages[0].content + '\\n\\n' -%}{%- set messages = messages[1:] -%}"
    "{%- endif -%}" + _GEMMA.replace("FIRST", "(told if loop.first else '')")
)
LLAMA3 = """
{{- bos_token -}}
{%- for m in messages -%}
  {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
  {%- if m.role == 'assistant' -%}START{{- m.content | trim + '<|eot_id|>' -}}STOP
  {%- else -%}{{- m.content | trim + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
# Of an answer only what comes after its reasoning is told; the newer kind opens the reasoning.
R1 = """
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}{{- m.content -}}
  {%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}
  {%- else -%}
    {{- '<|Assistant|>' -}}START{{- m.content.split('</think>')[-1] + eos_token -}}STOP
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|>' + OPENED -}}{%- endif -%}
"""
# Nothing ends an answer but what begins the next turn.
GLM = """
{{- '[gMASK]<sop>' -}}
{%- for m in messages -%}
  {{- '<|' + m.role + '|>\\n' -}}
  {%- if m.role == 'assistant' -%}START{{- m.content -}}STOP
  {%- else -%}{{- m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
YI = """
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {%- if m.role == 'assistant' -%}START{{- m.content + '<|im_end|>' -}}STOP{{- '\\n' -}}
  {%- else -%}{{- m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
# No token of its own at all.
PLAIN = """
{%- for m in messages -%}
  {{- m.role + ': ' -}}
  {%- if m.role == 'assistant' -%}START{{- m.content -}}STOP{{- '\\n' -}}
  {%- else -%}{{- m.content + '\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}
"""
TURNS = ("<start_of_turn>", "<end_of_turn>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
R1_TOKENS = ("<bos>", "<eos>", "<|User|>", "<|Assistant|>", "<think>", "</think>")
TEMPLATES = {
    "ours": Published(CHAT_TEMPLATE, CHATML, "<|im_end|>"),
    "qwen3": Published(QWEN3, (*CHATML, "<think>", "</think>"), "<|im_end|>"),
    "phi3": Published(PHI3, ROLES, "<|endoftext|>"),
    "mistral": Published(MISTRAL, ("<s>", "</s>"), "</s>", "<s>"),
    "mistral7": Published(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
    "llama2": Published(LLAMA2, ("<s>", "</s>"), "</s>", "<s>"),
    "gemma2": Published(GEMMA2, ("<bos>", "<eos>", *TURNS), "<eos>", "<bos>"),
    "gemma3": Published(GEMMA3, ("<bos>", "<eos>", *TURNS), "<eos>", "<bos>"),
    "llama3": Published(LLAMA3, ("<bos>", "<eos>", *HEADERS), "<|eot_id|>", "<bos>"),
    "r1": Published(R1.replace("OPENED", "''"), R1_TOKENS, "<eos>", "<bos>"),
    "r1-opened": Published(R1.replace("OPENED", "'<think>\\n'"), R1_TOKENS, "<eos>", "<bos>"),
    "glm": Published(GLM, ("[gMASK]", "<sop>", *ROLES[:4]), "<|endoftext|>"),
    "yi": Published(YI, CHATML, "<|im_end|>"),
    "plain": Published(PLAIN, ("<eos>",), "<eos>"),
}
NOT_SPECIAL = ("<think>", "</think>")  # as in Qwen3's and R1's tokenizers


def source(name: str, marks: bool) -> str:
    """Return a template with or without ``{% generation %}`` marks."""
    start, stop = ("{%- generation -%}", "{%- endgeneration -%}") if marks else ("", "")
    text = TEMPLATES[name].source
    if not marks:
        text = text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    return text.replace("START", start).replace("STOP", stop)


def _metaspace(scheme: str) -> Tokenizer:
    """SentencePiece's BPE as newer tokenizers have it: a pre-tokenizer writes the spaces."""
    backend = Tokenizer(_sentence_pieces())
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if scheme != "never" else []),
        ]
    )
    return backend


def _legacy() -> Tokenizer:
    """The same as Llama 2's has it: a normalizer puts a space before each part of a text."""
    backend = Tokenizer(_sentence_pieces())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = _metaspace("first").decoder
    return backend


def _sentence_pieces() -> models.BPE:
    words = ("the", "what", "is", "it", "12", "plus", "ok", "user", "assistant", "end", "INST")
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += list(dict.fromkeys("▁" + "".join(map(chr, range(33, 127))) + "春眠"))[1:]
    merges: list[tuple[str, str]] = [("\n", "\n")]
    pieces += ["\n", "\n\n"]
    for word in words:
        for part in (word, f"▁{word}"):
            for end in range(2, len(part) + 1):
                if part[:end] not in pieces:
                    pieces.append(part[:end])
                    merges.append((part[: end - 1], part[end - 1]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


KINDS = {
    "first": lambda: _metaspace("first"),
    "always": lambda: _metaspace("always"),
    "never": lambda: _metaspace("never"),
    "legacy": _legacy,
}


def tokenizer(
    kind: str, name: str, marks: bool, byte_level: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind, with a template and the tokens it is written with.

    Args:
        kind: of `KINDS`, or "bytes" for a byte-level one, which is copied.
        name: of `TEMPLATES`.
        marks: whether the template marks the assistant's turns.
        byte_level: a byte-level tokenizer.
    """
    published = TEMPLATES[name]
    if kind == "bytes":
        bpe = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
        templated = wrap(bpe)
    else:
        templated = PreTrainedTokenizerFast(
            tokenizer_object=KINDS[kind](), clean_up_tokenization_spaces=False
        )
    turns = [t for t in published.tokens if t not in NOT_SPECIAL]
    # Phi-3's swallow the white space behind them.
    special = [AddedToken(t, special=True, normalized=False, rstrip=name == "phi3") for t in turns]
    templated.add_special_tokens({"additional_special_tokens": special})
    templated.add_tokens(
        [AddedToken(t, normalized=False) for t in published.tokens if t in NOT_SPECIAL]
    )
    templated.eos_token, templated.bos_token = published.eos, published.bos
    templated.chat_template = source(name, marks)
    return templated
