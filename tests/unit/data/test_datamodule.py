from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.data.batch import PackedBatch
from minigpt.data.datamodule import (
    DPODataModule,
    JSONLDataModule,
    PackedDataset,
    PretrainDataModule,
    SFTDataModule,
)
from minigpt.data.formats import Prompt
from minigpt.errors import ConfigError, DataError

# Workers are forked, which newer Pythons warn of where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

TEXTS = [{"text": "ab cd 12 " * (1 + i % 5) + str(i)} for i in range(23)]
Content = tuple[tuple[int, ...], int]


@pytest.fixture
def module(write: Any, tmp_path: Path, stub_trainer: Any) -> Any:
    """Make a set-up module of texts, on one process of `world`."""

    def make(
        rank: int = 0,
        world: int = 1,
        kind: type[JSONLDataModule] = PretrainDataModule,
        stage: str = "fit",
        **options: Any,
    ) -> JSONLDataModule:
        defaults = {"max_length": 64, "tokens_per_batch": 128, "val_share": 0.0}
        if not {"train", "val", "exam", "predict"} & set(options):
            options["train"] = str(write(TEXTS, "train.jsonl"))
        datamodule = kind(**{**defaults, "cache_dir": str(tmp_path / "cache"), **options})
        datamodule.trainer = stub_trainer(rank, world)
        datamodule.prepare_data()
        datamodule.setup(stage)
        return datamodule

    return make


def content(batch: PackedBatch) -> Content:
    """What a batch holds, and how many targets."""
    return tuple(batch.input_ids.tolist()), len(batch.labels)


def lines(batches: Any) -> list[int]:
    return [line for batch in batches for _, line in batch.sources]


def epoch(datamodule: JSONLDataModule, held_out: bool) -> list[PackedBatch]:
    """Every micro-batch of an epoch, whatever process this is."""
    order, subsets = (
        (datamodule.val_order, datamodule.val_subsets)
        if held_out
        else (datamodule.order, datamodule.train_subsets)
    )
    return [] if order is None else list(PackedDataset(order, subsets, 0, 0, 0, 1))


def trained(datamodule: JSONLDataModule, steps: int) -> Iterator[PackedBatch]:
    """Batches as a trainer takes them, through as many epochs as it needs."""
    while steps > 0:
        for batch in islice(datamodule.train_dataloader(), steps):
            steps -= 1
            datamodule.advance(batch.resume_at)
            yield batch


def test_an_epoch_holds_every_row_once(module: Any) -> None:
    datamodule = module()
    first, second = (list(datamodule.train_dataloader()) for _ in range(2))
    assert sorted(lines(first)) == list(range(1, 24))
    assert [content(b) for b in first] == [content(b) for b in second]  # until advanced
    assert len(first) == datamodule.order.count() == 5
    assert all(batch.n_tokens <= 128 for batch in first)
    assert [batch.resume_at for batch in first] == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    assert lines(epoch(datamodule, held_out=False)) == lines(first)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_batches_are_dealt_to_all_processes(module: Any, world: int) -> None:
    alone = [content(batch) for batch in epoch(module(), held_out=False)]
    dealt = [list(module(rank, world).train_dataloader()) for rank in range(world)]
    rounds = list(zip(*dealt, strict=True))  # every process has as many batches
    assert len(rounds) == -(-len(alone) // world)
    flat = [batch for round_ in rounds for batch in round_]
    assert [content(batch) for batch in flat[: len(alone)]] == alone
    # Where the epoch does not divide, the last processes learn nothing.
    extra = flat[len(alone) :]
    assert len(extra) == -len(alone) % world
    assert all(len(batch.labels) == 0 < batch.n_tokens for batch in extra)
    done = [(0, min(len(alone), world * (i + 1))) for i in range(len(rounds) - 1)]
    for round_, after in zip(rounds, [*done, (1, 0)], strict=True):
        assert {batch.resume_at for batch in round_} == {after}


@pytest.mark.parametrize(("workers", "stops"), [(0, range(12)), (2, [7])])
def test_a_run_goes_on_where_it_stopped(module: Any, workers: int, stops: Iterable[int]) -> None:
    uninterrupted = [content(batch) for batch in trained(module(), 12)]
    assert len(set(uninterrupted)) == 12  # epochs differ
    for done in stops:
        first = module(num_workers=workers)
        before = [content(batch) for batch in trained(first, done)]
        state = first.state_dict()
        later = module(num_workers=workers)
        later.load_state_dict(state)
        assert before + [content(batch) for batch in trained(later, 12 - done)] == uninterrupted


def test_workers_read_the_same_batches(module: Any) -> None:
    expected = [content(batch) for batch in module().train_dataloader()]
    assert [content(batch) for batch in module(num_workers=2).train_dataloader()] == expected


@pytest.mark.parametrize(
    ("num_workers", "on_gpu", "expected"), [(None, False, 0), (None, True, 2), (0, True, 0)]
)
def test_a_gpu_is_read_ahead_for(
    num_workers: int | None, on_gpu: bool, expected: int, module: Any
) -> None:
    datamodule = module(num_workers=num_workers)
    datamodule.on_gpu = on_gpu
    assert datamodule.worker_count == expected


def test_a_run_may_go_on_with_more_processes(module: Any) -> None:
    expected_batches = [content(batch) for batch in module().train_dataloader()]
    first = module()
    before = [content(batch) for batch in trained(first, 2)]
    ranks = [module(rank, 3) for rank in range(3)]
    for datamodule in ranks:
        datamodule.load_state_dict(first.state_dict())
    rounds = list(zip(*(datamodule.train_dataloader() for datamodule in ranks), strict=True))
    assert before + [content(batch) for round_ in rounds for batch in round_] == expected_batches


def test_the_position_is_of_plain_values_and_counts_what_was_trained(module: Any) -> None:
    datamodule = module(num_workers=2)
    assert datamodule.state_dict() == {"position": [0, 0]}
    batches = iter(datamodule.train_dataloader())
    datamodule.advance(next(batches).resume_at)
    next(batches)  # read, but not trained on
    assert datamodule.state_dict() == {"position": [0, 1]}
    list(batches)


def test_held_out_batches_start_anew_each_time(module: Any, write: Any) -> None:
    val = write([{"text": f"held {i}"} for i in range(9)], "val.jsonl")
    datamodule = module(train=str(write(TEXTS, "train.jsonl")), val=str(val))
    list(trained(datamodule, 3))
    first, second = (list(datamodule.val_dataloader()) for _ in range(2))
    assert sorted(lines(first)) == list(range(1, 10))
    assert lines(first) == lines(second) == lines(epoch(datamodule, held_out=True))
    assert {path for batch in first for path, _ in batch.sources} == {str(val)}
    assert sorted(lines(module().train_dataloader())) == list(range(1, 24))


@pytest.mark.parametrize(
    ("share", "expected_rows"), [(0.1, 2), (0.05, 1), (0.25, 5), (0.4, 9), (0.5, 11), (0.9, 20)]
)
def test_a_share_of_rows_is_held_out(module: Any, share: float, expected_rows: int) -> None:
    datamodule = module(val_share=share, max_length=8, tokens_per_batch=64)  # rows of many samples
    train, val = (set(lines(epoch(datamodule, held_out=h))) for h in (False, True))
    assert (train & val, train | val) == (set(), set(range(1, 24)))
    assert len(val) == expected_rows


def tokens_of_rows(datamodule: JSONLDataModule) -> list[int]:
    """How many tokens each of the 23 rows has."""
    (subset,) = datamodule.train_subsets
    store = subset.store
    lengths = torch.tensor(store.lengths(torch.arange(len(store)).numpy()))
    return torch.bincount(torch.tensor(store.lines()) - 1, lengths).int().tolist()


@pytest.mark.parametrize("bound", [1, 100, 150, 250])
def test_the_share_holds_out_a_bounded_number_of_tokens(module: Any, bound: int) -> None:
    options = {"val_share": 0.5, "max_length": 8, "tokens_per_batch": 64}
    unbounded = set(lines(epoch(module(**options, max_held_out_tokens=None), held_out=True)))
    datamodule = module(**options, max_held_out_tokens=bound)
    train, val = (set(lines(epoch(datamodule, held_out=h))) for h in (False, True))
    assert (train & val, train | val) == (set(), set(range(1, 24)))
    assert val < unbounded
    tokens = tokens_of_rows(datamodule)
    spent = sum(batch.n_tokens for batch in epoch(datamodule, True))
    assert spent == sum(tokens[row - 1] for row in val)
    if bound == 1:
        assert len(val) == 1  # a row is the least
    else:
        assert bound / 3 <= spent <= bound
        assert max(val) - min(val) > 4  # not the first ones


@pytest.mark.parametrize("files", [1, 3])
def test_a_validation_reads_a_bounded_number_of_tokens(module: Any, write: Any, files: int) -> None:
    names = [str(write(TEXTS, f"val-{number}.jsonl")) for number in range(files)]
    unbounded = module(train=names[0], val=names, max_val_tokens=None)
    unbounded_tokens = sum(batch.n_tokens for batch in epoch(unbounded, held_out=True))
    bound = unbounded_tokens // 3
    options = {"train": names[0], "val": names, "max_val_tokens": bound}
    bounded, again = module(**options), module(**options)
    batches = epoch(bounded, held_out=True)
    assert bound / 2 < sum(batch.n_tokens for batch in batches) <= bound
    assert [content(batch) for batch in batches] == [content(b) for b in epoch(again, True)]
    read = {source for batch in batches for source in batch.sources}
    assert len({file for file, _ in read}) == files  # rows of each file
    assert bounded.all_held_out_tokens == unbounded_tokens
    assert len(epoch(bounded, held_out=False)) == len(epoch(unbounded, held_out=False))
    assert f"(max_val_tokens) of the {unbounded_tokens:,} held out" in bounded.held_out_source()
    assert unbounded.held_out_source() == ""


def test_the_plan_says_what_is_held_out(module: Any) -> None:
    datamodule = module(val_share=0.5, max_held_out_tokens=250, max_val_tokens=100)
    text = datamodule.held_out_source()
    assert " of the training data (val_share 0.5, at most 250 tokens: max_held_out_tokens)" in text
    assert text.startswith(" (max_val_tokens) of the ")
    assert module(val_share=0.5, max_held_out_tokens=None).held_out_source().endswith("share 0.5)")


@pytest.mark.parametrize("name", ["max_held_out_tokens", "max_val_tokens"])
def test_bounds_of_held_out_data_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{name} must be at least 1, but is 0"):
        PretrainDataModule(**{name: 0})


@pytest.mark.parametrize(
    ("share", "problem"),
    [
        (0.01, "too few rows to hold out a share"),
        (1.0, "val_share is a share, .* below 1"),
        (-0.5, "val_share is a share, .* below 1"),
    ],
)
def test_a_share_that_leaves_a_half_empty_is_refused(
    module: Any, share: float, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        module(val_share=share)


def test_nothing_is_held_out_without_a_share(module: Any) -> None:
    datamodule = module()
    assert datamodule.val_dataloader() == []
    assert epoch(datamodule, held_out=True) == []


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        (PretrainDataModule, {"tokens_per_batch": 511}, "is 511, but one sample may have 512"),
        (SFTDataModule, {"tokens_per_batch": 511}, "Set it to at least 512"),
        (DPODataModule, {"tokens_per_batch": 1023}, "at least 1024"),
        (PretrainDataModule, {"max_length": 1}, "max_length must be at least 2"),
        (PretrainDataModule, {"train": {"a.jsonl": 0}}, r"weight of a\.jsonl must be above 0"),
        (PretrainDataModule, {"train": {"a.jsonl": 1, "b": -1}}, "weight of b must be above 0"),
    ],
)
def test_bad_settings_are_refused(
    kind: type[JSONLDataModule], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        kind(**options)


def test_the_largest_sample_fits(module: Any, write: Any) -> None:
    row = {"prompt": "a", "chosen": "x" * 99, "rejected": "y" * 99}
    options = {"max_length": 32, "max_prompt_length": 4, "tokens_per_batch": 64}
    datamodule = module(kind=DPODataModule, train=str(write([row])), **options)
    (batch,) = datamodule.train_dataloader()
    assert (batch.n_tokens, len(batch.labels), batch.n_answers) == (4 + 2 * 28, 56, 2)


@pytest.mark.parametrize("which", ["train", "val"])
def test_missing_files_are_data_errors(module: Any, which: str) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        module(**{which: "none.jsonl"})


@pytest.mark.parametrize(
    ("loader", "stage", "options", "problem"),
    [
        ("train_dataloader", "validate", {"val": True}, "No training data"),
        ("test_dataloader", "test", {"train": True}, "Nothing to test on"),
        ("predict_dataloader", "predict", {"train": True}, "Nothing to predict"),
    ],
)
def test_what_a_verb_lacks_is_said(
    module: Any, write: Any, loader: str, stage: str, options: dict[str, bool], problem: str
) -> None:
    datamodule = module(stage=stage, **dict.fromkeys(options, str(write(TEXTS))))
    with pytest.raises(ConfigError, match=problem):
        getattr(datamodule, loader)()


@pytest.mark.parametrize("kind", ["str", "list", "dict"])
def test_files_are_mixed_by_weight(module: Any, write: Any, kind: str) -> None:
    paths = [str(write(TEXTS[:n], f"{n}.jsonl")) for n in (10, 4)]
    files = {"str": paths[0], "list": paths, "dict": {paths[0]: 0.5, paths[1]: 2}}[kind]
    datamodule = module(train=files)
    drawn = [path for batch in datamodule.train_dataloader() for path, _ in batch.sources]
    counts = {"str": [10, 0], "list": [10, 4], "dict": [5, 8]}[kind]
    assert [drawn.count(path) for path in paths] == counts


def test_folders_and_patterns_are_files_with_the_weight_given(
    module: Any, write: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, count in (("a.txt", 3), ("b.txt", 2)):
        (folder / name).write_text("".join(f"text {i}\n" for i in range(count)))
    assert len(lines(module(train=str(folder)).train_dataloader())) == 5
    weighted = module(train={f"{folder}/*.txt": 2.0})
    assert len(lines(weighted.train_dataloader())) == 10
    with pytest.raises(ConfigError, match="there is no data file"):
        module(train=f"{folder}/*.csv")
    several = [module(exam=exam).exam for exam in (str(folder), f"{folder}/*.txt", [str(folder)])]
    assert several[0] == several[1] == several[2] == list(module(train=str(folder)).train_weights)


def test_columns_with_other_names(module: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("body\nsome text\nmore text\n")
    datamodule = module(train=str(tmp_path / "rows.csv"), columns={"body": "text"})
    assert sorted(lines(datamodule.train_dataloader())) == [2, 3]
    with pytest.raises(DataError, match="not a text row"):
        module(train=str(tmp_path / "rows.csv"))


def test_a_weight_that_leaves_no_sample_is_refused(module: Any, write: Any) -> None:
    paths = [str(write(TEXTS[:n], f"{n}.jsonl")) for n in (1, 3)]
    with pytest.raises(
        ConfigError, match=r"a weight of 0.3 leaves none of the 1 samples of .*1\.j"
    ):
        module(train={paths[0]: 0.3, paths[1]: 1})
    assert module(train={paths[0]: 0.6, paths[1]: 1}).train_dataloader()


def test_the_seed_decides_the_order(module: Any) -> None:
    orders = [lines(module(seed=seed).train_dataloader()) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("world", "accumulate", "steps"), [(1, 1, 10), (1, 2, 6), (1, 4, 4), (2, 1, 6), (2, 4, 2)]
)
def test_optimizer_steps(module: Any, world: int, accumulate: int, steps: int) -> None:
    assert module(world=world).optimizer_steps(2, accumulate) == steps  # 5 batches an epoch


def test_stages_have_kinds_of_their_own(module: Any, write: Any) -> None:
    chat = {"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}
    datamodule = module(kind=SFTDataModule, train=str(write([chat, chat])))
    (batch,) = datamodule.train_dataloader()
    assert batch.n_answers == 2
    assert 0 < len(batch.labels) < batch.n_tokens - 2
    with pytest.raises(DataError, match="not a preference row"):
        module(kind=DPODataModule, train=str(write([chat])))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_exams_and_prompts_are_dealt(module: Any, write: Any, world: int) -> None:
    exams = [str(write(range(3), "a.jsonl")), str(write([3, 4], "b.jsonl"))]
    prompts = write([{"prompt": f"{i}"} for i in range(2)], "prompts.jsonl")
    items: list[object] = []
    numbers: list[int] = []
    for rank in range(world):
        datamodule = module(rank, world, stage="test", exam=exams, predict=str(prompts))
        items += [row for batch in datamodule.test_dataloader() for _, row in batch]
        answers: list[Prompt] = [p for batch in datamodule.predict_dataloader() for p in batch]
        numbers += [prompt.number for prompt in answers]
        assert datamodule.transfer_batch_to_device(answers, "meta", 0) is answers
    assert sorted(items) == [0, 1, 2, 3, 4]
    assert sorted(numbers) == [0, 1]


def test_held_out_batches_stand_in_for_an_exam(module: Any, write: Any) -> None:
    datamodule = module(stage="test", val=str(write(TEXTS)))
    batches = list(datamodule.test_dataloader())
    assert sorted(lines(batches)) == list(range(1, 24))
    moved = datamodule.transfer_batch_to_device(batches[0], torch.device("meta"), 0)
    assert moved.input_ids.device.type == "meta"


def test_a_late_start_reads_no_samples_before_it(module: Any) -> None:
    datamodule = module()
    read: list[int] = []
    sample = datamodule.train_subsets[0].sample
    datamodule.train_subsets[0].sample = lambda number: read.append(number) or sample(number)
    dataset = PackedDataset(datamodule.order, datamodule.train_subsets, 0, 3, 0, 1)
    assert len(lines(dataset)) == len(read) < 23
