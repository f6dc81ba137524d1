"""Prompts are dealt out like all batches, answers are packed behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt.data.batch import collate
from minigpt.data.rollouts import (
    DRAWN_AGAIN,
    GRPODataModule,
    PromptBatch,
    collate_rollouts,
    group_sample,
    targets_of,
)
from minigpt.errors import ConfigError, DataError

ROWS = [{"prompt": f"the cat {i}", "answer": str(i)} for i in range(23)]
CHATS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b " * i}]}
    for i in range(1, 9)
]
Make = Callable[..., GRPODataModule]


@pytest.fixture
def module(write: Any, tmp_path: Path, stub_trainer: Any) -> Make:
    """Make a set-up module of prompts, on one process of `world`."""

    def make(rank: int = 0, world: int = 1, accumulate: int = 1, **options: Any) -> GRPODataModule:
        defaults = {
            "train": str(write(ROWS, "train.jsonl")),
            "val_share": 0.0,
            "prompts_per_batch": 2,
            "num_generations": 3,
            "max_completion_length": 4,
            "max_length": 40,
            "cache_dir": str(tmp_path / "cache"),
        }
        datamodule = GRPODataModule(**{**defaults, **options})
        datamodule.trainer = stub_trainer(rank, world, accumulate_grad_batches=accumulate)
        datamodule.prepare_data()
        datamodule.setup("fit")
        return datamodule

    return make


def numbers(batch: PromptBatch) -> list[int]:
    return [prompt.number for prompt in batch.prompts]


def test_an_epoch_is_whole_rollouts_of_different_prompts(module: Make) -> None:
    datamodule = module(accumulate=2)
    batches = list(datamodule.train_dataloader())
    taken = [number for batch in batches for number in numbers(batch)]
    assert len(batches) == datamodule.epoch_micro_batches() == 10  # 11 would not fill rollouts of 2
    assert len(set(taken)) == len(taken) == 20
    assert datamodule.optimizer_steps(3, 2) == 15
    assert [batch.resume_at for batch in batches][-2:] == [(0, 9), (1, 0)]
    assert [len(batch.rollout) for batch in batches] == [2, 0] * 5
    datamodule.advance((1, 0))
    following = [number for batch in datamodule.train_dataloader() for number in numbers(batch)]
    assert following != taken


def test_passes_repeat_the_micro_batches_of_a_rollout(module: Make) -> None:
    datamodule = module(minibatches=2, passes=3)
    batches = list(datamodule.train_dataloader())[:6]
    assert [batch.number for batch in batches] == list(range(6))
    assert [numbers(batch) for batch in batches[:2]] * 3 == [numbers(batch) for batch in batches]
    assert [bool(batch.rollout) for batch in batches] == [True] + [False] * 5
    assert datamodule.optimizer_steps(1, 1) == datamodule.epoch_micro_batches() == 30


@pytest.mark.parametrize("done", [1, 4, 6, 29])
def test_it_goes_on_from_any_position(module: Make, done: int) -> None:
    options = {"minibatches": 2, "passes": 3}
    expected = [(numbers(b), b.number, b.resume_at) for b in module(**options).train_dataloader()]
    datamodule = module(**options)
    datamodule.advance((0, done))
    resumed = [(numbers(b), b.number, b.resume_at) for b in datamodule.train_dataloader()]
    assert resumed == expected[done:]


def test_processes_share_the_micro_batches_of_one(module: Make) -> None:
    alone = [numbers(batch) for batch in module(accumulate=2).train_dataloader()]
    first, second = (
        [numbers(b) for b in module(rank, 2, prompts_per_batch=2).train_dataloader()]
        for rank in range(2)
    )
    assert alone == [batch for pair in zip(first, second, strict=True) for batch in pair]


def test_held_out_prompts_are_dealt_and_bounded(module: Make, write: Any) -> None:
    val = str(write(ROWS[:9], "val.jsonl"))
    first, second = (module(rank, 2, val=val) for rank in range(2))
    ((ours,), (others,)) = (list(datamodule.val_dataloader()) for datamodule in (first, second))
    assert sorted(numbers(ours) + numbers(others)) == list(range(23, 32))
    assert len(module(val=val, max_val_tokens=40).val_prompts) < 9
    shared = module(val_share=0.2)
    held_out = {prompt.number for prompt in shared.val_prompts}
    assert len(held_out) == 4
    assert held_out.isdisjoint(p.number for of_file in shared.train_prompts for p in of_file)


def test_columns_and_weights(module: Make, write: Any) -> None:
    rows = [{"ask": "the dog", "gold": "1"}, {"ask": "the cat", "gold": "2"}]
    path = str(write(rows, "named.jsonl"))
    datamodule = module(train={path: 3}, columns={"ask": "prompt", "gold": "answer"})
    assert [p.fields["answer"] for p in datamodule.train_prompts[0]] == ["1", "2"]
    assert datamodule.epoch_micro_batches() == 3


def test_a_prompt_that_comes_again_in_a_rollout_has_other_random_numbers(
    module: Make, write: Any
) -> None:
    train = {str(write(ROWS[:4], "few.jsonl")): 3}
    options = {"train": train, "minibatches": 2, "prompts_per_batch": 3}
    alone = [numbers(batch) for batch in module(**options).train_dataloader()]
    for rollout in ([*alone[0], *alone[1]], [*alone[2], *alone[3]]):
        prompts = [number % DRAWN_AGAIN for number in rollout]
        assert len(set(prompts)) < len(set(rollout)) == len(rollout) == 6
        assert set(prompts) <= set(rollout)  # the first time by the number that it has alone
    first, second = (
        [numbers(b) for b in module(rank, 2, **{**options, "minibatches": 1}).train_dataloader()]
        for rank in range(2)
    )
    assert alone == [batch for pair in zip(first, second, strict=True) for batch in pair]


def test_the_replay_has_its_share_of_the_targets(module: Make, write: Any) -> None:
    datamodule = module(replay={str(write(CHATS, "chats.jsonl")): 0.25})
    chosen = datamodule.replay_samples(step=5, targets=90)
    targets = [targets_of(chat) for chat in chosen]
    assert sum(targets) >= 30 > sum(targets[:-1])
    assert [c.source for c in datamodule.replay_samples(5, 90)] == [c.source for c in chosen]
    assert [c.source for c in datamodule.replay_samples(6, 90)] != [c.source for c in chosen]
    again = datamodule.replay_samples(5, 9000)  # more than the file has
    assert sum(map(targets_of, again)) >= 3000 > sum(map(targets_of, again[:-1]))
    first = {chat.source for chat in again[: len(CHATS)]}
    assert len(first) == len(CHATS)


def test_answers_lie_behind_their_prompt_and_chats_behind_them(module: Make, write: Any) -> None:
    datamodule = module(replay={str(write(CHATS, "chats.jsonl")): 0.25})
    prompt = datamodule.train_prompts[0][0]
    group = group_sample(prompt, [[5, 6], [7]])
    (chat,) = datamodule.replay_samples(0, 1)
    batch = collate_rollouts([group], [-1.0, -2.0, -3.0], [0.5, -0.5], [True, False], [chat])
    plain = collate([group, chat])
    assert batch.input_ids.equal(plain.input_ids)
    assert batch.labels[:3].tolist() == [5, 6, 7]
    assert batch.advantages.tolist() == [0.5, -0.5, 0.0]
    assert batch.included.tolist() == [True, False, False]
    assert batch.is_replay.tolist() == [False, False, True]
    assert batch.sampled_logprobs[:3].tolist() == [-1.0, -2.0, -3.0]
    assert len(batch.sampled_logprobs) == len(batch.labels) == 3 + targets_of(chat)
    assert batch.to("cpu").advantages.equal(batch.advantages)


def test_the_fingerprint_is_of_what_is_learnt_from(module: Make, write: Any) -> None:
    plain = module().fingerprint()
    assert module().fingerprint() == plain
    other = [{**ROWS[0], "answer": "another"}, *ROWS[1:]]
    path = str(write(other, "other.jsonl"))
    changed = [{"train": path}, {"passes": 2}, {"replay": {str(write(CHATS, "chats.jsonl")): 0.1}}]
    assert len({plain, *(module(**options).fingerprint() for options in changed)}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"passes": 0}, "passes must be at least 1"),
        ({"max_completion_length": 40}, "max_completion_length must lie in"),
        ({"replay": {"chats.jsonl": 1.0}}, "data.replay: shares"),
        ({"replay": {"chats.jsonl": math.nan}}, "data.replay: shares"),
        ({"prompts_per_batch": 24}, "has 23 prompts in an epoch, but 24"),
        ({"minibatches": 12}, "has 23 prompts in an epoch, but 24"),
        ({"val_share": 0.01}, "too few rows to hold out"),
    ],
)
def test_options_are_refused(module: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        module(**options)


def test_rows_are_refused_with_their_line(module: Make, write: Any) -> None:
    missing = str(write([ROWS[0], {"answer": "1"}], "missing.jsonl"))
    with pytest.raises(DataError, match=r"missing\.jsonl:2"):
        module(train=missing)
    longer = str(write([{"prompt": "the cat sat on the mat " * 20}], "long.jsonl"))
    for options, limit in (({}, 36), ({"max_prompt_length": 8}, 8)):
        with pytest.raises(DataError, match=rf"long\.jsonl:1.*{limit} are left"):
            module(train=longer, **options)


def test_held_out_prompts_are_no_exam(module: Make, write: Any) -> None:
    datamodule = module(val=str(write(ROWS, "val.jsonl")))
    with pytest.raises(ConfigError, match=r"set data\.init_args\.exam, .* minigpt validate"):
        datamodule.test_dataloader()


def test_few_rows_are_left_out_where_they_may_be(module: Make, write: Any) -> None:
    rows = [*ROWS, {"answer": "1"}, {"prompt": "the cat sat on the mat " * 20}]
    path = str(write(rows, "mixed.jsonl"))
    datamodule = module(train=path, on_bad_row="skip", max_bad_share=0.1, max_too_long_share=0.1)
    assert len(datamodule.train_prompts[0]) == 23
