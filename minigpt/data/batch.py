"""The packed batch: one dataclass for every stage.

Shape legend:
    T  tokens that the model reads, all samples one after the other, no padding
    N  target tokens
    A  answers: one per text or chat, two per preference (chosen, then rejected)
    R  attention rows of the batch

A preference lies in the batch as prompt, chosen, rejected: the prompt is computed once and
both answers attend to it. So a target's hidden state is not always its left neighbour's;
`predict_at` says whose it is. The last token of a text or an answer predicts nothing, so that the
model need not read it: most are only targets. Where an answer's score is read at its last token,
the batch is made with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE = 64  # rows of a multiple of it keep their last token: GPUs compute in tiles of this length
MULTIPLE = 16  # tokens read are a multiple of it where they can be: other matmuls are slower


# Not frozen: Lightning's FSDP and half precision refuse to convert such. Compared by identity, so
# that what is derived from a plan can be cached beside it.
@dataclass(eq=False)
class AttentionPlan:
    """Which tokens attend to which: causal rows, each a text, or a prompt and an answer to it.

    Attributes:
        spans: [4R] int32, (prompt start, prompt length, answer start, answer length) of each row;
            a text is all answer. Answers to one prompt follow each other. Always on the CPU.
        cu_queries: [R+1] borders in the batch of the tokens whose results a row gives. A shared
            prompt takes its result from the first of its rows.
        cu_keys: [R+1] borders of what the rows attend to, row after row.
        keys: positions in the batch of what the rows attend to; None when that is the batch.
        longest: tokens of the longest row. longest_queries: most results of a row.
        full: how many leading rows have the length of the longest, which one dense kernel can
            compute; 0 unless they hold most tokens and no prompt is shared.
        predict_at: [N] positions whose hidden states predict the targets; behind the last
            layer's attention no others matter.
    """

    spans: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    keys: Tensor | None
    longest: int
    longest_queries: int
    full: int
    predict_at: Tensor

    @property
    def rows(self) -> list[Span]:
        """Where each row's tokens lie in the batch."""
        return [Span(*span) for span in self.spans.view(-1, 4).tolist()]

    def _with(self, change: Callable[[Tensor], Tensor]) -> AttentionPlan:
        names = ("cu_queries", "cu_keys", "keys", "predict_at")
        changed: dict[str, Any] = {
            name: change(x) for name in names if (x := getattr(self, name)) is not None
        }
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionPlan:
        """Move all index tensors to a device."""
        return self._with(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AttentionPlan:
        """Pin them for an asynchronous copy to a GPU."""
        return self._with(Tensor.pin_memory)


@dataclass
class PackedBatch:
    """One micro-batch of packed samples.

    Attributes:
        input_ids: [T] token ids.
        position_ids: [T] positions inside the sample; both answers of a preference start
            right after the prompt.
        cu_seqlens: [S+1] borders of the samples.
        labels: [N] target ids.
        answers: [N] number of the answer each target belongs to, 0..A-1.
        n_answers: A.
        n_tokens: tokens of the data in the batch, with those that are only targets.
        plan: which tokens attend to which, and which positions predict the targets.
        sources: file and line of each sample.
        margins: of each sample, 0 for what is no preference.
        resume_at: (epoch, micro-batch) that comes after this one in the whole run.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    labels: Tensor
    answers: Tensor
    n_answers: int
    n_tokens: int
    plan: AttentionPlan
    sources: tuple[tuple[str, int], ...] = ()
    margins: tuple[float, ...] = ()
    resume_at: tuple[int, int] = (0, 0)

    @property
    def predict_at(self) -> Tensor:
        """[N] positions whose hidden states predict the targets."""
        return self.plan.predict_at

    @property
    def answer_ends(self) -> Tensor:
        """[A] positions of the last token of each answer that the model reads."""
        spans = self.plan.spans.view(-1, 4)
        return (spans[:, 2] + spans[:, 3] - 1).to(self.input_ids.device, torch.int64)

    @property
    def is_filler(self) -> bool:
        """Whether nothing is learnt from it: it keeps processes in step at the end of an epoch."""
        return len(self.labels) == 0

    def _with(self, change: Callable[[Any], Any]) -> Self:
        tensors = {n: v for n, v in vars(self).items() if isinstance(v, Tensor | AttentionPlan)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move all tensors to a device; Lightning calls it."""
        return self._with(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Pin all tensors for an asynchronous copy to a GPU."""
        return self._with(lambda x: x.pin_memory())

    def without_targets(self) -> PackedBatch:
        """Return the batch as a filler."""
        empty = self.labels[:0]
        plan = replace(self.plan, predict_at=empty)
        return replace(self, labels=empty, answers=empty, plan=plan)


@dataclass(frozen=True)
class Sample:
    """A sample as it lies in the store: a prompt and answers to it; a text or chat is one answer.

    Attributes:
        ids: [n] token ids of the prompt and then of all answers.
        prompt: tokens of the prompt.
        answers: tokens of each answer.
        targets: [n] bool for a chat; None means all tokens of the answers.
        source: file and line.
        margin: of a preference.
        desirable: whether an unpaired row's completion is.
    """

    ids: NDArray[np.integer]
    prompt: int
    answers: tuple[int, ...]
    targets: NDArray[np.bool_] | None
    source: tuple[str, int]
    margin: float = 0.0
    desirable: bool = False


class Span(NamedTuple):
    """An attention row of a batch: where its prompt and its answer begin, and their lengths."""

    prompt_start: int
    prompt_length: int
    answer_start: int
    answer_length: int


def positions(span: Span) -> NDArray[np.int64]:
    """Return the positions in the batch of a row's tokens, in order."""
    prompt = np.arange(span.prompt_start, span.prompt_start + span.prompt_length)
    answer = np.arange(span.answer_start, span.answer_start + span.answer_length)
    return np.concatenate([prompt, answer])


def plan_attention(spans: Sequence[Span], predict_at: Tensor) -> AttentionPlan:
    """Plan the attention of a batch.

    Args:
        spans: one per attention row, in the order of the batch.
        predict_at: [N] positions whose hidden states predict the targets.
    """
    keys = [span.prompt_length + span.answer_length for span in spans]
    queries = list(keys)
    for row in range(1, len(spans)):
        span = spans[row]
        if span.prompt_length and span.prompt_start == spans[row - 1].prompt_start:
            queries[row] = span.answer_length  # the row before gives the prompt's results
    shared = queries != keys
    return AttentionPlan(
        spans=torch.tensor(np.ravel(spans), dtype=torch.int32),
        cu_queries=_borders(queries),
        cu_keys=_borders(keys),
        keys=_join([positions(span) for span in spans]) if shared else None,
        longest=max(keys),
        longest_queries=max(queries),
        full=0 if shared else _full(keys),
        predict_at=predict_at,
    )


def _full(lengths: Sequence[int]) -> int:
    """Return how many leading rows are of the longest length; 0 unless these hold most tokens."""
    longest = max(lengths)
    count = next((n for n, length in enumerate(lengths) if length < longest), len(lengths))
    return count if count > 1 and 2 * count * longest > sum(lengths) else 0


def _borders(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def _join(arrays: Sequence[NDArray[np.integer]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))


def _may_skip_last(prompt: int, answer: int) -> bool:
    """Whether the model may leave a row's last token unread."""
    return answer > 1 and (prompt + answer) % TILE > 0


def _answer_targets(sample: Sample, start: int, length: int) -> NDArray[np.bool_]:
    """Return which tokens of an answer are predicted, by where it lies in the sample."""
    if sample.targets is None:
        targets = np.ones(length, np.bool_)
    else:
        targets = np.array(sample.targets[start : start + length])
    if not sample.prompt:
        targets[0] = False  # nothing predicts the first token of a text
    return targets


def _tokens_to_drop(samples: Sequence[Sample]) -> int:
    """Return how many last tokens of answers the batch leaves out.

    The last token of an answer predicts nothing. All that may go do, except for up to
    `MULTIPLE` - 1 of them, with which the batch has a length of a multiple of it.
    """
    droppable = sum(_may_skip_last(s.prompt, length) for s in samples for length in s.answers)
    n_tokens = sum(len(sample.ids) for sample in samples)
    retained = (droppable - n_tokens) % MULTIPLE
    return droppable - retained if retained <= droppable else droppable


def collate(
    samples: Sequence[Sample], resume_at: tuple[int, int] = (0, 0), read_last: bool = False
) -> PackedBatch:
    """Pack samples into one batch, in the order given.

    A prompt of 3 tokens p with two answers, a and b, becomes (with no token dropped):

        input_ids     p0 p1 p2 a0 a1 b0 b1 b2
        position_ids   0  1  2  3  4  3  4  5
        cu_seqlens    [0, 8]
        spans         [(0, 3, 3, 2), (0, 3, 5, 3)]: the prompt's start and length, the answer's
        labels        a0 a1 b0 b1 b2
        predict_at     2  3  2  5  6: p2 predicts a0 and b0
        answers        0  0  1  1  1

    Args:
        samples: at least one.
        resume_at: of the batch.
        read_last: let the model read each answer's last token.
    """
    input_ids: list[NDArray[np.integer]] = []
    position_ids: list[NDArray[np.integer]] = []
    labels: list[NDArray[np.integer]] = []
    predict_at: list[NDArray[np.integer]] = []
    answers: list[NDArray[np.integer]] = []
    cu_seqlens = [0]
    spans: list[Span] = []
    to_drop = 0 if read_last else _tokens_to_drop(samples)
    for sample in samples:
        prompt_start, prompt = cu_seqlens[-1], sample.prompt
        input_ids.append(sample.ids[:prompt])
        position_ids.append(np.arange(prompt))
        end_in_batch = prompt_start + prompt
        start_in_sample = prompt
        for length in sample.answers:
            drop_last = to_drop > 0 and _may_skip_last(prompt, length)
            to_drop -= drop_last
            answer = sample.ids[start_in_sample : start_in_sample + length]
            targets = _answer_targets(sample, start_in_sample, length)
            span = Span(prompt_start, prompt, end_in_batch, length - drop_last)
            predictors = positions(span)[max(prompt - 1, 0) : prompt + length - 1]
            input_ids.append(answer[: span.answer_length])
            position_ids.append(np.arange(prompt, prompt + span.answer_length))
            labels.append(answer[targets])
            predict_at.append(predictors[targets[0 if prompt else 1 :]])
            answers.append(np.full(len(labels[-1]), len(spans)))
            spans.append(span)
            end_in_batch += span.answer_length
            start_in_sample += length
        cu_seqlens.append(end_in_batch)
    return PackedBatch(
        input_ids=_join(input_ids),
        position_ids=_join(position_ids),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        labels=_join(labels),
        answers=_join(answers),
        n_answers=len(spans),
        n_tokens=sum(len(sample.ids) for sample in samples),
        plan=plan_attention(spans, _join(predict_at)),
        sources=tuple(sample.source for sample in samples),
        margins=tuple(sample.margin for sample in samples),
        resume_at=resume_at,
    )
