from __future__ import annotations

import torch
from hypothesis import given
from tiny import SHAPES, preferences
from torch import Tensor

from minigpt.accel.fast_attention import map_groups
from minigpt.accel.row_groups import row_groups
from minigpt.data.batch import AttentionPlan, Span, collate, plan_attention, positions


def plan(*rows: tuple[int, int, int, int]) -> AttentionPlan:
    return plan_attention([Span(*row) for row in rows], torch.tensor([0]))


def gathered(plan: AttentionPlan) -> list[list[list[int]]]:
    return [group.tolist() for group in row_groups(plan).gather]


def test_the_longest_row_gives_the_results_of_a_shared_prompt() -> None:
    attention_plan = plan((0, 2, 2, 1), (0, 2, 3, 2))
    assert gathered(attention_plan) == [[[0, 1, 3, 4], [0, 1, 2, 0]]]
    assert row_groups(attention_plan).scatter.tolist() == [0, 1, 6, 2, 3]


def test_rows_of_equal_length_keep_their_order() -> None:
    attention_plan = plan((0, 0, 0, 2), (2, 0, 2, 2), (4, 0, 4, 2))
    assert gathered(attention_plan) == [[[0, 1], [2, 3], [4, 5]]]
    assert row_groups(attention_plan).scatter.tolist() == list(range(6))


def test_rows_of_unlike_length_are_grouped_apart() -> None:
    attention_plan = plan((0, 0, 0, 5), (5, 0, 5, 100), (105, 0, 105, 100), (205, 0, 205, 1))
    gather, scatter = row_groups(attention_plan)
    assert [tuple(group.shape) for group in gather] == [(2, 100), (2, 5)]
    assert scatter[205] == 205


def test_layers_share_the_groups_of_a_plan_and_no_other() -> None:
    attention_plan = plan((0, 0, 0, 2))
    assert row_groups(attention_plan) is row_groups(attention_plan)
    assert row_groups(plan((0, 0, 0, 2))) is not row_groups(attention_plan)
    assert row_groups(attention_plan.to("meta")).scatter.device.type == "meta"


@given(SHAPES)
def test_a_causal_function_of_groups_equals_each_row_alone(
    shapes: list[tuple[int, int, int]],
) -> None:
    """A causal mean stands for attention: what a token gets depends on all before it."""
    batch = collate(preferences(shapes))
    values = torch.rand(len(batch.input_ids), generator=torch.manual_seed(0), dtype=torch.float64)

    def causal(x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)

    actual = map_groups(causal, [values], batch.plan)
    assert len(set(row_groups(batch.plan).scatter.tolist())) == len(values)
    for span in batch.plan.rows:
        row = positions(span)
        assert torch.allclose(actual[row], causal(values[row][None])[0], atol=1e-12)
