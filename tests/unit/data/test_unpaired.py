"""Unpaired rows: which completions they are compared with, and what shares a baseline."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from minigpt.data.formats import Message, Record, Source, Unpaired
from minigpt.data.store import ROWS_AT_A_TIME, Limits, open_store, with_mismatched
from minigpt.data.unpaired import KTODataModule, UnpairedBatch
from minigpt.errors import DataError


def records(prompts: list[str]) -> list[tuple[Record, Source]]:
    """Rows whose completions name their numbers."""
    return [
        (
            Unpaired((Message("user", prompt),), Message("assistant", str(n)), n % 2 == 0),
            Source(Path("rows.jsonl"), n + 1),
        )
        for n, prompt in enumerate(prompts)
    ]


def partners(prompts: list[str]) -> list[int]:
    """The numbers of the rows whose completions those of all rows are compared with."""
    rows = list(with_mismatched(records(prompts)))
    assert [source.line for _, source in rows] == [*range(1, len(prompts) + 1)]
    assert [row.completion.content for row, _ in rows] == [*map(str, range(len(prompts)))]
    return [int(row.mismatched.content) for row, _ in rows]


PROMPTS = {
    "each prompt twice in turn": [f"p{n // 2}" for n in range(20)],
    "an odd number": [f"p{n}" for n in range(7)],
    "two blocks, the last of a single row": [f"p{n}" for n in range(ROWS_AT_A_TIME + 1)],
    "few prompts at random": [f"p{n * n % 7}" for n in range(50)],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_each_completion_serves_once_for_another_prompt(name: str) -> None:
    prompts = PROMPTS[name]
    others = partners(prompts)
    assert all(prompts[other] != prompt for other, prompt in zip(others, prompts, strict=True))
    assert len(set(others)) >= len(prompts) - 1  # the single row of a block takes another's
    assert others == partners(prompts)


def test_a_prompt_of_most_rows_is_compared_all_the_same() -> None:
    prompts = ["a"] * 6 + ["b"]
    assert Counter(partners(prompts)) == {6: 6, 2: 1}


@pytest.mark.parametrize("count", [1, 5])
def test_rows_of_one_prompt_have_nothing_to_compare_with(count: int) -> None:
    with pytest.raises(DataError, match=f"{count} rows up to line {count} have one prompt"):
        partners(["a"] * count)


def row(prompt: str, completion: str, label: bool) -> dict[str, object]:
    return {"prompt": prompt, "completion": completion, "label": label}


ROWS = [row(f"ask {n} " * (n % 4 + 1), f"say {n} " * (n % 5 + 1), n % 3 > 0) for n in range(23)]


def test_the_store_holds_both_completions_and_the_label(
    write: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    store = open_store(write(ROWS), "unpaired", tokenizer, Limits(64), tmp_path)
    decode = tokenizer.decode
    samples = [store.sample(number) for number in range(len(store))]
    targets = 0
    for one, sample in zip(ROWS, samples, strict=True):
        borders = np.cumsum([0, sample.prompt, *sample.answers])
        prompt, completion, other = (decode(sample.ids[a:b].tolist()) for a, b in pairwise(borders))
        assert f"user\n{one['prompt']}" in prompt
        assert completion == f"{one['completion']}<|im_end|>"
        assert other != completion
        assert other.removesuffix("<|im_end|>") in [one["completion"] for one in ROWS]
        assert sample.desirable == one["label"]
        targets += sample.answers[0]
    assert store.meta["targets"] == targets
    assert store.desirable().tolist() == [one["label"] for one in ROWS]


@pytest.fixture
def module(write: Any, tmp_path: Path, stub_trainer: Any) -> Any:
    """Make a set-up module on one process of `world`."""

    def make(
        rank: int = 0, world: int = 1, rows: list[Any] = ROWS, **trainer: Any
    ) -> KTODataModule:
        file = str(write(rows, "train.jsonl"))
        datamodule = KTODataModule(
            train=file,
            val=file,
            max_length=64,
            tokens_per_batch=160,
            cache_dir=str(tmp_path / "cache"),
        )
        datamodule.trainer = stub_trainer(rank, world, **{"accumulate_grad_batches": 3, **trainer})
        datamodule.prepare_data()
        datamodule.setup("fit")
        return datamodule

    return make


def batches(loader: Any) -> list[UnpairedBatch]:
    return [batch for batch in loader if isinstance(batch, UnpairedBatch)]


def windows(loader: Any) -> Iterator[list[UnpairedBatch]]:
    """The batches by their windows, in order."""
    groups: dict[int, list[UnpairedBatch]] = {}
    for batch in batches(loader):
        groups.setdefault(id(batch.window), []).append(batch)
    yield from groups.values()


def test_completions_are_packed_apart(module: Any) -> None:
    datamodule = module()
    for batch in batches(datamodule.train_dataloader()):
        lines = [line for _, line in batch.sources]
        samples = [datamodule.train_subsets[0].sample(line - 1) for line in lines]
        assert batch.desirable.tolist() == [sample.desirable for sample in samples]
        completions = [s.ids[s.prompt : s.prompt + s.answers[0]] for s in samples]
        other = [s.ids[s.prompt + s.answers[0] :] for s in samples]
        assert batch.labels.tolist() == np.concatenate(completions).tolist()
        assert batch.mismatched.labels.tolist() == np.concatenate(other).tolist()
        assert batch.n_tokens == sum(s.prompt + s.answers[0] for s in samples)
        assert sum(len(s.ids) for s in samples) <= 160


def test_a_window_is_an_optimizer_step(module: Any) -> None:
    datamodule = module()
    sizes = []
    for group in windows(datamodule.train_dataloader()):
        sizes.append(len(group))
        assert group[0].window is not None
        mismatched = group[0].window.mismatched
        assert all(a is b.mismatched for a, b in zip(mismatched, group, strict=True))
    assert len(sizes) > 2
    assert set(sizes[:-1]) == {3}
    held_out = [len(group) for group in windows(datamodule.val_dataloader())]
    assert held_out == [sum(sizes)]
    first = next(windows(datamodule.train_dataloader()))[0]
    assert first.to("cpu").window is first.window


def test_only_what_is_validated_on_is_read(module: Any) -> None:
    first = next(iter(windows(module(limit_val_batches=2).val_dataloader())))
    assert len(first) == 2


def test_a_resumed_epoch_has_the_windows_of_the_whole_one(module: Any) -> None:
    datamodule = module()
    expected = [[b.sources for b in group] for group in windows(datamodule.train_dataloader())]
    datamodule.advance(batches(datamodule.train_dataloader())[2].resume_at)
    resumed = [[b.sources for b in group] for group in windows(datamodule.train_dataloader())]
    assert resumed == expected[1:]


def test_fillers_have_nothing_for_the_baseline_either(module: Any) -> None:
    world = 2 if module().order.count() % 2 else 3
    last = batches(module(world - 1, world).train_dataloader())[-1]
    assert len(last.labels) == len(last.mismatched.labels) == 0
    assert len(last.mismatched.input_ids)


def test_two_answers_count_against_the_budget(module: Any) -> None:
    assert module().longest_sample == 128


@pytest.mark.parametrize("label", [True, False])
def test_one_label_is_warned_of(label: bool, module: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        module()
        assert "all completions" not in caplog.text
        module(rows=[{**one, "label": label} for one in ROWS])
    kind = "desirable" if label else "undesirable"
    assert f"train.jsonl: all completions are {kind}. KTO learns from both kinds" in caplog.text
