#!/usr/bin/env python
"""Build a tiny random model of every causal-LM type of the installed transformers, prove how it
is computed as `fit`, `evaluate`, `generate` and `serve` do, and write docs/models.md.

Each type has a process of its own and a time limit, so that none ends the others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minigpt.data.batch import Sample, collate
from minigpt.errors import ConfigError, ModelError
from minigpt.model import conformance, shrink
from minigpt.model.cached import (
    EXPLICIT_POSITIONS,
    PADDED,
    SAME_LENGTH,
    UNCACHED,
    TransformersDecoder,
)
from minigpt.model.conformance import Conformance
from minigpt.model.lora import Lora, add_adapter, merge
from minigpt.model.packed_lm import PackedLM, forward_rows, use_attention

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
STEPS = 3  # tokens that are decoded
# What published models of a type have and its default config lacks.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "falcon_h1": {"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64},
    "granitemoehybrid": {"layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 2) * 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"full_attn_idxs": [2, 5]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
EQUAL = "equal"
PACKED, ROWS = "equal, packed", "equal, one sample a row"
REFUSED, NOT_BUILT, WRONG = "refused", "cannot be built tiny", "WRONG"
MODES = {
    PADDED: "equal, padded",
    SAME_LENGTH: "equal, those of one length",
    EXPLICIT_POSITIONS: "equal, those of one length",
    UNCACHED: "equal, without a cache",
    "": REFUSED,
}
HEAD = """\
# Model types

Made by `scripts/conformance.py` with transformers {version}; `make faults-large` makes it again.
A tiny random model of each causal-LM type, from its default config, reads texts and a preference
in fp32. *Equal* means that the loss of each sample, as MiniGPT computes it, is that of the model's
own eager attention on the sample alone. Types that are not exact packed read each sample in a row
of its own, which takes more time. The same proof runs for the config of each model before it is
used, and decides there. *Decoding* continues texts together, in the fastest mode whose logits are
those of each text read at once: prompts of all lengths padded in one cache, those of one length in
a cache, or without a cache, where all of the text is computed for each new token. *LoRA*, with its
default options, trains a step: equal where the logits with the adapter are those of the model that
it is merged into; refused where it cannot be put on the type, or merged.

{counts}

| type | training and evaluation | decoding | LoRA | why |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        kind: model type.
        result: one of the words above.
        decoding: the fastest mode that is equal; empty where nothing was tried.
        why: what keeps it from being packed, or from being computed.
        lora: whether an adapter trains and merges, or why it is refused; empty where the type is
            not trained.
    """

    kind: str
    result: str
    decoding: str = ""
    why: str = ""
    lora: str = ""


def config_of(kind: str) -> PreTrainedConfig:
    """Return a type's default config, as a decoder."""
    config: PreTrainedConfig = CONFIG_MAPPING[kind](**CHANGES.get(kind, {}))
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return config


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the first tiny model that reads text; raise what keeps all from it."""
    error: Exception = ValueError("its smallest size is too large")
    for model in shrink.tiny_models(config):
        try:
            with torch.no_grad(), use_attention(model, "eager"):
                forward_rows(model, torch.arange(shrink.SPECIAL, 2 * shrink.SPECIAL)[None])
        except Exception as caught:
            error = caught
        else:
            return model
    raise error


@torch.no_grad()
def losses_differ(model: PreTrainedModel) -> bool:
    """Whether a batch's losses are others than those of each sample alone."""
    samples = conformance._samples(model)
    with conformance._fp32_eval(model):
        truth = conformance._reference_logprobs(model, samples)
        ends = torch.tensor([22, 35, 44, 60])  # of each text's and answer's targets
        sums = torch.stack([part.sum() for part in truth.tensor_split(ends[:-1])])
    return not conformance.close(PackedLM(model)(collate(samples), per_answer=True), sums)


@torch.no_grad()
def decoding_differs(model: PreTrainedModel, proof: Conformance) -> bool:
    """Whether prompts decoded together give other logits than each text gives alone."""
    samples = conformance._samples(model)
    texts = [sample.ids[: 23 - 5 * at].tolist() for at, sample in enumerate(samples)]
    with use_attention(model, proof.decoding):
        runner = TransformersDecoder(model, proof.decoding_mode)
        logits = [runner.admit([text[:-STEPS] for text in texts])]
        logits += [runner.step([t[at] for t in texts]) for at in range(-STEPS, 0)]
    result = torch.stack(logits, 1)  # [texts, steps + 1, V]
    with use_attention(model, "eager"):
        expected = [
            forward_rows(model, torch.tensor(text)[None])[0, -STEPS - 1 :] for text in texts
        ]
    return not conformance.close(result, torch.stack(expected))


def lora_result(model: PreTrainedModel) -> str:
    """Return the table's word for a model's LoRA, after a step and merging; changes the model."""
    samples = conformance._samples(model)
    lm = PackedLM(model)
    try:
        adapted = add_adapter(model, Lora(), model.config.model_type)
        trained = [weight for weight in lm.parameters() if weight.requires_grad]
        lm.train()(collate(samples)).backward()
        torch.optim.AdamW(trained, lr=0.02).step()
        lm.eval()
        beside = _logits(model, samples)
        with adapted.disable_adapter():
            moved = not conformance.close(beside, _logits(model, samples))
        same = conformance.close(_logits(merge(adapted), samples), beside)
    except (ConfigError, ModelError) as error:
        return f"{REFUSED}: {error}"
    return EQUAL if moved and same else WRONG


@torch.no_grad()
def _logits(model: PreTrainedModel, samples: list[Sample]) -> torch.Tensor:
    with use_attention(model, "eager"):
        rows = [torch.tensor(sample.ids.tolist())[None] for sample in samples]
        return torch.cat([forward_rows(model, row)[0] for row in rows])


def examine(kind: str) -> Row:
    """Return a type's line."""
    with shrink.quiet():
        try:
            config = config_of(kind)
            proof = conformance.conformance_of(config)
            model = small_model(config).eval()
        except Exception as error:
            return Row(kind, NOT_BUILT, why=conformance.describe(error))
        if proof is None:
            return Row(kind, REFUSED, why="no proof")
        if proof.decoding_mode and decoding_differs(model, proof):
            return Row(kind, WRONG, WRONG)
        decoding = MODES[proof.decoding_mode]
        if not proof.training:
            return Row(kind, REFUSED, decoding, proof.problem)
        if losses_differ(model):
            return Row(kind, WRONG, decoding)
        result = PACKED if proof.packed else ROWS
        return Row(kind, result, decoding, proof.problem, lora_result(model))


def _send_row(kind: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        row = examine(kind)
    except Exception as error:
        row = Row(kind, WRONG, why=conformance.describe(error))
    pipe.send(astuple(row))


def rows(kinds: list[str], jobs: int, seconds: float) -> Iterator[Row]:
    """Yield the line of each type, in order, from processes of their own."""
    context = multiprocessing.get_context("fork")
    waiting = list(kinds)
    running: list[tuple[str, Any, Connection]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send_row, args=(kind, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append((kind, process, ours))
        kind, process, pipe = running.pop(0)
        row = Row(kind, NOT_BUILT, why=f"no answer in {seconds:g} s")
        if pipe.poll(seconds):
            try:
                row = Row(*pipe.recv())
            except EOFError:
                row = Row(kind, NOT_BUILT, why="its process died")
        process.kill()
        process.join()
        yield row


def page(table: list[Row]) -> str:
    """Return docs/models.md."""
    counts = Counter(row.result for row in table)
    shown = [f"**{counts[name]}** {name}" for name in (PACKED, ROWS, REFUSED, NOT_BUILT, WRONG)]
    adapted = sum(row.lora == EQUAL for row in table)
    head = HEAD.format(
        version=transformers.__version__,
        counts=f"{len(table)} types: {', '.join(shown)}. LoRA: **{adapted}** equal.",
    )
    lines = [
        f"| {row.kind} | {row.result} | {_cell(row.decoding)} | {_cell(row.lora)} "
        f"| {_cell(row.why)} |"
        for row in table
    ]
    return head + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main(argv: list[str] | None = None) -> int:
    """Write the table; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="*", help="only these, printed and not written")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120, help="for each type, at most")
    args = parser.parse_args(argv)
    table = []
    for row in rows(
        args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), args.jobs, args.seconds
    ):
        table.append(row)
        print(row.kind, row.result, row.decoding, row.lora, row.why, sep=" | ", flush=True)
    if not args.types:
        PAGE.write_text(page(table), encoding="utf-8")
    return int(any(WRONG in (row.result, row.lora) for row in table))


if __name__ == "__main__":
    sys.exit(main())
