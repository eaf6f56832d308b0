"""Mean-only batch norm: the formula in both modes, the running mean as torch's, every edge."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

from normconv.graph.coupling import couples_in_training
from normconv.graph.families import NormState, has_known_forward, is_leaf, is_norm, norm_state
from normconv.layers import MeanOnlyBatchNorm
from normconv.numerics import apply_affine, relative_l2


def trained(channels: int, dtype: torch.dtype = torch.float64) -> MeanOnlyBatchNorm:
    norm = MeanOnlyBatchNorm(channels, dtype=dtype)
    with torch.no_grad():
        norm.bias.normal_()
        norm.running_mean.normal_()
    return norm


def channel_means(x: Tensor) -> Tensor:
    return torch.stack([x[:, c].sum() / x[:, c].numel() for c in range(x.shape[1])])


@pytest.mark.parametrize("rank", range(2, 6))
def test_the_formula_in_both_modes(rank: int) -> None:
    norm, x = trained(3), torch.randn(4, 3, *(2,) * (rank - 2)).double() + 5
    kept = norm.running_mean.clone()
    shape = (1, 3, *(1,) * (rank - 2))
    means = channel_means(x)
    expected = x - means.view(shape) + norm.bias.view(shape)
    assert relative_l2(norm(x), expected) <= 1e-15
    torch.testing.assert_close(norm.running_mean, 0.9 * kept + 0.1 * means, rtol=1e-14, atol=0)
    norm.eval()
    expected = x - norm.running_mean.view(shape) + norm.bias.view(shape)
    assert relative_l2(norm(x), expected) <= 1e-15
    assert norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, 0.0, None])
def test_the_running_mean_is_that_of_batch_norm(momentum: float | None) -> None:
    ours = MeanOnlyBatchNorm(3, momentum=momentum)
    theirs = nn.BatchNorm2d(3, momentum=momentum)
    for _ in range(4):
        x = torch.randn(2, 3, 5, 5) + 3
        ours(x)
        theirs(x)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)
    ours.reset_running_stats()
    assert not bool(ours.running_mean.any())
    assert ours.num_batches_tracked.item() == 0


def test_gradients_are_those_of_the_centered_batch() -> None:
    norm = trained(3)
    x = torch.randn(4, 3, 2).double().requires_grad_()
    torch.autograd.gradcheck(norm, (x,))
    out = norm(x)
    (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    assert bool((grad.mean((0, 2)).abs() <= 1e-15).all())
    norm.eval()
    torch.autograd.gradcheck(norm, (x,))
    assert not norm.running_mean.requires_grad


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_one_value_a_channel_is_refused_in_training(shape: tuple[int, ...]) -> None:
    norm, x = trained(3), torch.randn(shape).double()
    kept = norm.running_mean.clone()
    told = (
        rf"one value a channel.*got {re.escape(str(shape))} in training; use a larger batch.*'wn'"
    )
    with pytest.raises(ValueError, match=told):
        norm(x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        nn.BatchNorm1d(3).double()(x.reshape(1, 3))
    assert torch.equal(norm.running_mean, kept)
    assert norm.num_batches_tracked.item() == 0
    assert torch.equal(norm.eval()(x), (x.flatten() - kept + norm.bias).view(shape))
    assert norm.train()(x.expand(2, *shape[1:])).shape == (2, *shape[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_mean_wide(dtype: torch.dtype) -> None:
    """Sums of 65,536 ones end at 256 in bfloat16 and overflow in float16."""
    x = torch.ones(4, 1, 128, 128, dtype=dtype) * 3
    for norm in (MeanOnlyBatchNorm(1), MeanOnlyBatchNorm(1, dtype=dtype)):
        out = norm(x)
        assert out.dtype == dtype
        assert not bool(out.any())
        assert abs(norm.running_mean.item() - 0.3) <= 0.3 * torch.finfo(dtype).eps
        assert norm.eval()(x).dtype == dtype


def test_inputs_that_do_not_fit_are_told() -> None:
    norm = MeanOnlyBatchNorm(3)
    for shape in ((0, 3), (2, 3, 0, 4)):
        with pytest.raises(ValueError, match="a batch without values has no mean"):
            norm(torch.empty(shape))
    for shape in ((3,), (2, 4), (2, 4, 3, 3)):
        with pytest.raises(ValueError, match=r"expected \(N, 3\)"):
            norm(torch.zeros(shape))
    assert norm.num_batches_tracked.item() == 0
    assert norm.eval()(torch.empty(0, 3, 2)).shape == (0, 3, 2)


def test_it_reads_as_a_norm_that_divides_by_nothing() -> None:
    norm = trained(3).eval()
    state, x = norm_state(norm), torch.randn(4, 3, 2, 2).double()
    assert isinstance(state, NormState)
    assert (state.eps, state.channels, state.weight) == (0.0, 3, None)
    assert state.bias_trainable
    assert bool((state.var == 1).all())
    assert relative_l2(apply_affine(x, state.affine), norm(x)) <= 1e-15
    assert is_leaf(norm)
    assert not is_norm(norm)
    assert has_known_forward(norm)
    assert couples_in_training(norm)
    norm.running_mean[1] = torch.nan
    assert norm_state(norm) == "running_mean holds NaN or infinity"


def test_state_copies_and_compilation() -> None:
    norm, x = trained(3), torch.randn(2, 3, 4).double()
    assert list(norm.state_dict()) == ["bias", "running_mean", "num_batches_tracked"]
    assert repr(norm) == "MeanOnlyBatchNorm(3, momentum=0.1)"
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin.eval()(x), copy.deepcopy(norm).eval()(x))
    for momentum in (0.1, None):
        norm.momentum = momentum
        other = copy.deepcopy(norm)
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), norm(x))
        torch.testing.assert_close(other.running_mean, norm.running_mean)
    assert MeanOnlyBatchNorm(2, device="meta")(torch.empty(2, 2, device="meta")).is_meta
