"""The entries that `helpers.ties` leaves out of comparisons: all that a small error can move, and few others."""

import pytest
import torch

from helpers import reference, ties
from lightning_drm.merging import DRM, TIES

NOISE = 1e-5
METHODS = [
    DRM(),
    DRM("vertical", 0.5),
    DRM(prune="individual", density=0.4),
    DRM(renormalize=False, density=0.5),
    TIES(0.4),
]


def plain(method, deltas):
    if isinstance(method, DRM):
        return reference.drm(deltas, **method.hyperparameters())
    return reference.ties(deltas, density=method.density)


def scale(method, deltas, choose):
    """What `noise` is a fraction of."""
    if isinstance(method, DRM):
        stack = torch.cat(deltas, dim=1 if method.direction == "horizontal" else 0)
        return torch.linalg.matrix_norm(stack, 2)
    return choose(delta.abs().max() for delta in deltas)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_what_a_small_error_moves_was_left_out(method):
    """Plain loops on the deltas, and on the deltas with an error: a jump is far larger than the error explains."""
    num_jumps, num_left_out, num_entries = 0, 0, 0
    for seed in range(400):
        g = torch.Generator().manual_seed(seed)
        deltas = [torch.randn(14, 18, generator=g, dtype=torch.float64) for _ in range(3)]
        errors = [torch.randn(14, 18, generator=g, dtype=torch.float64) for _ in deltas]
        size = scale(method, deltas, min) / scale(method, errors, max)
        before, after = (
            plain(method, parts)
            for parts in (deltas, [d + NOISE * size * e for d, e in zip(deltas, errors, strict=True)])
        )
        jumps = (after - before).abs() > 1e-2 * before.abs().max()
        left_out = ties.undecided(method, deltas, torch.float64, NOISE)
        assert not (jumps & ~left_out).any()
        num_jumps += int(jumps.sum())
        num_left_out += int(left_out.sum())
        num_entries += jumps.numel()
    assert num_jumps > 0, "the case shows nothing"
    assert num_left_out < 0.25 * num_entries


def test_a_draw_is_left_out():
    """The vote at the second position is a draw but for the last bit."""
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -3.0])
    left_out = ties.undecided(TIES(1.0), [first, second], torch.float32)
    assert left_out.tolist() == [False, True]


def test_a_comparison_that_leaves_out_too_much_fails():
    deltas = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, -3.0])]
    with pytest.raises(AssertionError, match=r"rounding decides 50\.0% of the entries"):
        ties.settled(TIES(1.0).merge(deltas), reference.ties(deltas, density=1.0), TIES(1.0), deltas)
