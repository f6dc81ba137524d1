"""The loop that MiniGPT is measured against: transformers and peft, as most scripts write it.

Samples are padded to the batch's longest (pretraining: joined and cut into blocks, so without
padding); SDPA, autocast, fused AdamW, cross-entropy on all logits; for DPO a live reference, with
chosen and rejected answers in one padded batch. `train.py` runs it as `baseline.py CONFIG RESULT`.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from minigpt.data.order import FileShare, PackedOrder
from minigpt.data.store import TokenStore
from minigpt.machine import peak_memory

IGNORED = -100  # labels that transformers leaves out of its loss
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
MIN_STEPS = 3  # steps to measure, however long they take: two batches may hold more or less padding
Row = tuple[list[int], list[int]]  # token ids and labels


@dataclass(frozen=True)
class LoopConfig:
    """What to train, as read from JSON.

    Args:
        stage: pretrain, sft, dpo or lora.
        model: HF directory to start from.
        stores: token stores of the training and of the held-out rows (or None).
        batch_size: rows (pairs for dpo) of a step.
        max_length: tokens of a block (pretrain).
        tokens_per_batch: of our own step, whose order of texts is taken over (pretrain).
        precision: bf16-mixed or 32-true.
        device: cpu or cuda.
        steps: after which to stop; the first step is not counted.
        seconds: after which to stop, but not before `MIN_STEPS` steps.
        seed: of the order of rows.
        lr: peak learning rate.
        decay: whether the rate falls to 0 along a cosine over `seconds`; then all steps count.
        rank: of the adapter (lora).
        curve: how often the held-out loss is measured within `seconds`, with the clock stopped.
        save: directory for the trained model, with its adapter merged.
    """

    stage: str
    model: str
    stores: tuple[str, str | None]
    batch_size: int
    max_length: int
    tokens_per_batch: int
    precision: str
    device: str
    steps: int
    seconds: float
    seed: int = 0
    lr: float = 1e-4
    decay: bool = False
    rank: int = 16
    curve: int = 0
    save: str | None = None


def samples(store: TokenStore, order: Iterable[int]) -> Iterator[tuple[Row, ...]]:
    """Yield a text or chat as one row, a preference as two: prompt + chosen, prompt + rejected."""
    for index in order:
        sample = store.sample(index)
        ids = sample.ids.tolist()
        labels = list(ids)
        if sample.targets is not None:
            labels = [
                i if target else IGNORED for i, target in zip(ids, sample.targets, strict=True)
            ]
        prompt = ids[: sample.prompt]
        rows = []
        start = sample.prompt
        for length in sample.answers:
            end = start + length
            rows.append((prompt + ids[start:end], [IGNORED] * len(prompt) + labels[start:end]))
            start = end
        yield tuple(rows)


def blocks(config: LoopConfig, store: TokenStore, epoch: int) -> Iterator[tuple[Row, ...]]:
    """Yield all texts one after the other, in our own order, in blocks of `max_length` tokens."""
    order = PackedOrder(
        [store.lengths], [FileShare(len(store), len(store))], config.tokens_per_batch, config.seed
    )
    left: list[int] = []
    for members in order.batches(epoch):
        for ((ids, _),) in samples(store, [sample for _, sample in members]):
            left += ids
        while len(left) >= config.max_length:
            yield ((left[: config.max_length], left[: config.max_length]),)
            left = left[config.max_length :]


def collate(rows: list[Row], device: str) -> dict[str, Tensor]:
    """Pad to the longest; each [B, L]."""
    longest = max(len(ids) for ids, _ in rows)
    columns = {
        "input_ids": [ids + [0] * (longest - len(ids)) for ids, _ in rows],
        "labels": [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows],
    }
    if any(len(ids) < longest for ids, _ in rows):
        columns["attention_mask"] = [[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows]
    return {name: torch.tensor(value).to(device) for name, value in columns.items()}


def batches(config: LoopConfig, store: TokenStore) -> Iterator[tuple[dict[str, Tensor], int, int]]:
    """Yield shuffled batches for ever, with their own tokens and how many samples they hold."""
    rng = np.random.default_rng(config.seed)
    waiting: list[tuple[Row, ...]] = []
    for epoch in itertools.count():
        shuffled = samples(store, rng.permutation(len(store)))
        for sample in blocks(config, store, epoch) if config.stage == "pretrain" else shuffled:
            waiting.append(sample)
            if len(waiting) == config.batch_size:
                rows = [row for rows in zip(*waiting, strict=True) for row in rows]
                useful = sum(len(ids) for ids, _ in rows)
                if config.stage == "dpo":  # its prompt is in the data once
                    useful -= sum(labels.count(IGNORED) for _, labels in rows) // 2
                yield collate(rows, config.device), useful, len(waiting)
                waiting = []


def answer_logprobs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the summed log-prob of each row's answer, [B]."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    logp = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    summed: Tensor = (logp * (labels != IGNORED)).sum(1)
    return summed


def loss_of(model: nn.Module, reference: nn.Module | None, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch; preferences are those with a reference."""
    if reference is None:
        return model(**batch, use_cache=False).loss  # type: ignore[no-any-return]
    with torch.no_grad():
        before = answer_logprobs(reference, batch)
    ratios = 0.1 * (answer_logprobs(model, batch) - before)
    margins = torch.sub(*ratios.chunk(2))
    return -logsigmoid(margins).mean()


def load(config: LoopConfig) -> nn.Module:
    """Return the model, with an adapter for lora."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    if config.stage == "lora":
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear")
        model = get_peft_model(model, adapter)
    module: nn.Module = model.to(config.device)
    return module.train()


def train(config: LoopConfig) -> dict[str, Any]:
    """Train until the steps or the seconds are over; return its figures."""
    model = load(config)
    reference = copy.deepcopy(model).eval() if config.stage == "dpo" else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), fused=True)
    dtype = torch.float16 if config.precision == "16-mixed" else torch.bfloat16
    autocast = torch.autocast(config.device, dtype, enabled=config.precision.endswith("mixed"))
    scaler = torch.amp.GradScaler(config.device, enabled=dtype == torch.float16)
    count = tokens = counted_samples = 0
    elapsed = 0.0
    curve: list[tuple[float, float]] = []  # seconds and held-out loss
    started = time.perf_counter()
    for batch, useful, rows in batches(config, TokenStore(Path(config.stores[0]), Path())):
        with autocast:
            loss = loss_of(model, reference, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if config.decay:
            share = min(1.0, elapsed / config.seconds)
            warmup = min(1.0, (count + 1) / 20)
            decay = 0.5 * (1 + math.cos(math.pi * share))
            optimizer.param_groups[0]["lr"] = config.lr * warmup * decay
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        last = loss.item()  # waits for the device
        count += 1
        if count == 1 and not config.decay:  # warm up
            started = time.perf_counter()
            continue
        tokens += useful
        counted_samples += rows
        elapsed = time.perf_counter() - started
        due = config.seconds * (len(curve) + 1) / (config.curve + 1)
        if len(curve) < config.curve and elapsed >= due:
            curve.append((elapsed, held_out(model, config.stores[1], config.batch_size)))
            started = time.perf_counter() - elapsed
        enough = elapsed >= config.seconds and (config.decay or count > MIN_STEPS)
        if enough or count > config.steps:
            break
    result = {"tokens": tokens, "samples": counted_samples, "seconds": elapsed, "loss": last}
    result |= {"steps": count - (not config.decay), **peak_memory()}
    if config.stores[1]:
        result["held_out"] = held_out(model, config.stores[1], config.batch_size)
    if config.save:
        save(config, model)
    return result | ({"curve": curve} if config.curve else {})


def save(config: LoopConfig, model: Any) -> None:
    """Write the model with the files of the tokenizer that it started with."""
    directory = Path(str(config.save))
    directory.mkdir(parents=True, exist_ok=True)
    (model.merge_and_unload() if config.stage == "lora" else model).save_pretrained(directory)
    for name in TOKENIZER_FILES:
        if (source := Path(config.model) / name).is_file():
            shutil.copy(source, directory)


@torch.no_grad()
def held_out(model: nn.Module, path: str | Path | None, batch_size: int) -> float:
    """Return the mean loss over all targets of a token store's rows, in nats."""
    training, device = model.training, str(next(model.parameters()).device)
    model.eval()
    store = TokenStore(Path(str(path)), Path())
    rows = [row for sample in samples(store, range(len(store))) for row in sample]
    total = 0.0
    count = 0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], device)
        targets = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(loss_of(model, None, batch)) * targets
        count += targets
    model.train(training)
    return total / count


if __name__ == "__main__":
    result = train(LoopConfig(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(result))
