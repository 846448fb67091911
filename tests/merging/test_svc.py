"""SVC around other methods: what it hands on to them, and what it refuses."""

import pytest
import torch

from lightning_drm.merging import DARETIES, DRM, STAR, SVC, TIES, Average, IsoC, IsoCTS, TaskArithmetic
from merging.test_reference import dense, low_rank


def test_the_inner_method_is_calibrated_on_the_whole_model():
    model = [dense((12, 20), 3), dense((7, 5), 3, seed=1)]
    ready = SVC(TIES(0.3)).calibrate(lambda: iter(model))
    assert ready.method == TIES(0.3).calibrate(lambda: iter(model))
    assert ready != SVC(TIES(0.3))
    merged = ready.method.merge(model[1])
    assert not torch.equal(merged, TIES(0.3).merge(model[1])), "the threshold is that of the whole model"
    assert torch.equal(ready.merge(model[1]), SVC(ready.method).merge(model[1]))


def test_the_inner_method_draws_by_names():
    deltas, keys = dense((12, 20), 2), ["a/weight", "b/weight"]
    keyed = SVC(DARETIES(0.5, seed=3)).keyed(keys)
    assert keyed.method == DARETIES(0.5, seed=3).keyed(keys)
    assert torch.equal(keyed.merge(deltas), SVC(DARETIES(0.5, seed=3).keyed(keys)).merge(deltas))


def test_what_is_not_exact_on_factors_inside_is_not_outside():
    assert SVC(DRM()).supports_low_rank
    assert not SVC(TIES()).supports_low_rank
    with pytest.raises(ValueError, match=f"SVC has no low-rank result: {TIES().not_low_rank}"):
        SVC(TIES()).merge_low_rank(low_rank((12, 20), (2, 3)))


@pytest.mark.parametrize("method", [DRM(density=0.3), DRM("vertical", density=0.3)], ids=repr)
def test_low_rank_results_that_leave_the_span_of_the_factors(method: DRM):
    """DRM prunes one side of a matrix, and so its result has rows, or columns, that no factor has."""
    factors = low_rank((30, 42), (3, 2))
    merged = SVC(method).merge_low_rank(factors)
    assert merged.rank <= 5
    expected = SVC(method).merge([delta.dense() for delta in factors])
    torch.testing.assert_close(merged.dense(), expected, rtol=1e-8, atol=1e-8)


def test_the_shared_factor_of_task_arithmetic_is_undone():
    """Of equal tasks, whatever they are multiplied by, one is left."""
    (delta,) = dense((12, 20), 1)
    for scale in (0.5, 1.0, 3.0):
        torch.testing.assert_close(SVC(TaskArithmetic(scale)).merge([delta, delta]), delta)


@pytest.mark.parametrize(
    ("method", "alpha", "sentences"),
    [
        ("DRM", None, ["method must be a merging method, got 'DRM'"]),
        (IsoC(), None, ["method must leave singular values apart, which IsoC makes equal"]),
        (IsoCTS(), 0.0, ["which IsoCTS makes equal", "alpha must be a number above 0, got 0.0"]),
        (Average(), float("nan"), ["alpha must be a number above 0, got nan"]),
    ],
)
def test_mistakes(method: object, alpha: float | None, sentences: list[str]):
    with pytest.raises(ValueError, match=r"^SVC: ") as refused:
        SVC(method, alpha)
    assert all(sentence in str(refused.value) for sentence in sentences)


def test_methods_are_equal_by_what_is_inside():
    assert SVC(STAR(), 0.2) == SVC(STAR(), 0.2)
    assert SVC(STAR()) != SVC(STAR(60.0))
    assert eval(repr(SVC(STAR(), 0.2))) == SVC(STAR(), 0.2)
