"""Which part of a tensor is a sample's, and how one sample of a batch is changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normconv.auditing.batches import batch_of
from normconv.auditing.slots import change_of, heal_, relative_change, slots_of
from normconv.errors import UsageError


def changed(tensor: Tensor, where: object) -> Tensor:
    new = tensor.clone()
    new[where] += 1.0  # type: ignore[index]
    return new


@pytest.mark.parametrize(
    ("shape", "where", "kind"),
    [
        ((3, 5), 1, "own"),
        ((3, 5), 2, "mixed"),
        ((3, 5), slice(0, 2), "mixed"),
        ((5, 3), (slice(None), 1), "own"),  # time first
        ((6, 5), slice(2, 4), "own"),  # tokens of a sample one after the other
        ((6, 5), slice(1, None, 3), "own"),  # time first, flattened
        ((6, 5), slice(None), "suspect"),
        ((5, 5), slice(None), "gathered"),
        ((3, 5), slice(0, 0), "same"),
        ((3, 3), (slice(None), 1), "own"),  # time first, as long as the batch
        ((3, 3), slice(None), "mixed"),
    ],
)
def test_a_change_is_judged_in_every_layout_that_the_size_allows(
    shape: tuple[int, ...], where: object, kind: str
) -> None:
    base = torch.randn(shape, dtype=torch.float64)
    assert change_of(base, changed(base, where), 3, 1, 1e-9).kind == kind


def test_rounding_is_no_change() -> None:
    base = torch.randn(3, 4, dtype=torch.float64)
    assert change_of(base, base * (1 + 1e-13), 3, 1, 1e-9).kind == "same"
    assert change_of(base, base * (1 + 1e-7), 3, 1, 1e-9).kind == "mixed"


def test_nan_where_there_was_none_is_a_change() -> None:
    base = torch.tensor([[1.0], [2.0]])
    assert change_of(base, torch.tensor([[1.0], [float("nan")]]), 2, 0, 1e-6).kind == "mixed"
    same = torch.tensor([float("nan"), float("inf"), 1.0])
    assert relative_change(same, same.clone()) == 0.0


def test_healing_leaves_the_sample_its_own_part() -> None:
    base, now = torch.zeros(3, 2), torch.ones(3, 2)
    assert heal_(now, base, slots_of((3, 2), 3, 1)[0][0])
    assert now.tolist() == [[0, 0], [1, 1], [0, 0]]
    assert not heal_(torch.ones(1, 2).expand(3, 2), base, None)


def test_only_one_sample_changes_and_stays_in_the_range_of_the_input() -> None:
    x = torch.rand(4, 3, 5)
    before = x.clone()
    new = next(batch_of((x,), {}).changed(2)).args[0]
    assert torch.equal(x, before)
    assert [torch.equal(new[i], x[i]) for i in range(4)] == [True, True, False, True]
    assert new.min() >= 0
    assert new.max() <= 1
    assert torch.equal(next(batch_of((x,), {}).changed(2)).args[0], new)


def test_tokens_are_rolled_masks_and_other_sizes_left_alone() -> None:
    ids, mask = torch.arange(12).view(3, 4), torch.ones(3, 4, dtype=torch.long)
    given = {"ids": ids, "mask": mask, "scale": torch.tensor(2.0), "table": torch.arange(7)}
    new = next(batch_of((), given).changed(0)).kwargs
    assert new["ids"][0].tolist() == [3, 0, 1, 2]
    assert torch.equal(new["ids"][1:], ids[1:])
    assert all(new[name] is given[name] for name in ("mask", "scale", "table"))


def test_one_sample_is_made_three() -> None:
    batch = batch_of((torch.randn(1, 4),), {"label": torch.tensor([3])})
    assert batch.samples == 3
    assert batch.enlarged
    rows = batch.args[0]
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])
    assert batch.kwargs["label"].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((torch.tensor([[1.0], [float("nan")]]),), "NaN"),
        ((torch.tensor(1.0),), "axis 0"),
        ((3,), "axis 0"),
        ((torch.zeros(0, 3),), "no sample"),
        ((torch.zeros(4, 3, dtype=torch.long),), "can be changed"),
    ],
)
def test_inputs_that_cannot_show_anything_are_refused(args: tuple[object, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        batch_of(args, {})
