"""LiNeS' numbers, and what it refuses; whole models are in tests/fusion/test_lines.py."""

import json
from pathlib import Path

import pytest
import torch

from lightning_drm.merging import DRM, SVC, TIES, Average, LiNeS, LowRank, LowRankStack, TaskArithmetic
from merging.test_reference import dense, low_rank

GOLDEN = json.loads((Path(__file__).parent / "conformance" / "index_2.json").read_text())
CASES = {case: settings["lines"] for case, settings in GOLDEN.items() if "lines" in settings}


def test_cases_are_complete():
    assert CASES.keys() == {"case_201", "case_202", "case_203"}


@pytest.mark.parametrize("case", CASES)
def test_factors_are_those_of_the_authors(case):
    golden = CASES[case]
    lines, last = LiNeS(Average(), golden["alpha"], golden["beta"]), golden["num_layers"] - 1
    found = [lines.factor(block / last) for block in range(golden["num_layers"])]
    assert found == pytest.approx(golden["factors"], rel=1e-15)
    assert lines.factor(None) == golden["rest"]


@pytest.mark.parametrize("case", ["case_201", "case_203"])
def test_one_task_keeps_its_last_block(case):
    lines = LiNeS(Average(), CASES[case]["alpha"]).of_model(num_tasks=1)
    assert lines.beta == pytest.approx(CASES[case]["beta"], rel=1e-15)
    assert lines.factor(1.0) == pytest.approx(1.0, rel=1e-15)


def test_alpha_brings_the_merge_to_the_size_of_the_mean():
    lines = LiNeS(TIES(), beta=0.3).of_model(4, norms=(24.0, 3.0))
    assert (lines.method, lines.alpha, lines.beta) == (TIES(), 24 / 3 / 4, 0.3)
    assert LiNeS(TIES()).of_model(4, norms=(24.0, 3.0)).beta == 0.5
    assert LiNeS(TIES()).of_model(1, norms=(2.0, 4.0)) == LiNeS(TIES(), 0.5, 0.5)
    assert LiNeS(TIES(), 0.7).of_model(4) == LiNeS(TIES(), 0.7, 0.5)


def test_where_nothing_was_merged_nothing_is_scaled():
    assert LiNeS(TIES()).of_model(3, norms=(0.0, 0.0)).alpha == 1.0
    assert LiNeS(TaskArithmetic(0.0)).of_model(3, norms=(5.0, 0.0)).alpha == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_scaled_is_another_tensor(dtype):
    lines, generator = LiNeS(Average(), 0.3, 0.7), torch.Generator().manual_seed(0)
    delta = torch.randn(3, 4, 5, generator=generator).to(dtype)
    before = delta.clone()
    scaled = lines.scaled(delta, 0.25)
    assert torch.equal(delta, before)
    assert scaled.dtype == dtype
    torch.testing.assert_close(scaled, delta * (0.3 + 0.7 * 0.25))


def test_factors_are_scaled_as_factors():
    lines = LiNeS(Average(), 0.3, 0.7)
    (delta,) = low_rank((12, 20), (3,))
    scaled = lines.scaled(delta, 0.5)
    assert (type(scaled), scaled.rank) == (LowRank, 3)
    torch.testing.assert_close(scaled.dense(), 0.65 * (delta.up @ delta.down))
    stack = LowRankStack(torch.ones(2, 4, 1), torch.ones(2, 1, 3))
    assert type(lines.scaled(stack, None)) is LowRankStack
    torch.testing.assert_close(lines.scaled(stack, None).dense(), torch.full((2, 4, 3), 0.3))


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (("DRM",), ["method must be a merging method, got 'DRM'"]),
        ((LiNeS(DRM()),), ["method must not be LiNeS again"]),
        ((DRM(), "best"), ["alpha must be a number or 'auto', got 'best'"]),
        ((DRM(), -0.1, float("nan")), ["alpha must be a number of at least 0, got -0.1", "beta must be", "got nan"]),
        ((DRM(), float("inf"), -1.0), ["alpha must be", "got inf", "beta must be a number of at least 0, got -1.0"]),
        ((DRM(), 0.0, 0.0), ["alpha and beta are both 0, which leaves nothing of the merge"]),
    ],
)
def test_mistakes(arguments, sentences):
    with pytest.raises(ValueError, match=r"^LiNeS: ") as refused:
        LiNeS(*arguments)
    assert all(sentence in str(refused.value) for sentence in sentences), refused.value


def test_one_of_both_may_be_zero():
    assert LiNeS(DRM(), 0.0, 0.5).factor(None) == 0.0
    assert LiNeS(DRM(), 0.5, 0.0).factor(1.0) == 0.5


def test_norms_beyond_floats_give_no_alpha():
    with pytest.raises(ValueError, match="add up to more than float64 holds; give alpha as a number"):
        LiNeS(DRM()).of_model(2, norms=(float("inf"), 1.0))


@pytest.mark.parametrize("lines", [LiNeS(DRM()), LiNeS(DRM(), 0.5), LiNeS(DRM(), beta=0.5)], ids=repr)
def test_a_factor_needs_numbers(lines):
    with pytest.raises(ValueError, match="a factor needs alpha and beta as numbers; of_model finds"):
        lines.factor(0.5)


def test_single_tensors_have_no_depth():
    lines = LiNeS(TaskArithmetic(1.0), 0.3, 0.7)
    for deltas in (dense((12, 20), 3), [torch.ones(5)], low_rank((12, 20), (2, 3))):
        with pytest.raises(ValueError, match="LiNeS scales a parameter by the depth of its block, which a"):
            lines.merge(deltas)
    with pytest.raises(ValueError, match="merge whole models"):
        lines.merge_low_rank(low_rank((12, 20), (2, 3)))
    deltas = dense((12, 20), 3)
    torch.testing.assert_close(lines.scaled(lines.method.merge(deltas), depth=0.5), 0.65 * sum(deltas))


def test_it_stands_around_svc_and_not_inside():
    assert LiNeS(SVC(DRM())).method == SVC(DRM())
    with pytest.raises(ValueError, match="SVC: method must not be LiNeS, whose factors SVC would undo; LiNeS goes ar"):
        SVC(LiNeS(DRM()))


def test_methods_are_equal_by_what_is_inside():
    assert LiNeS(TIES(0.3), 0.2) == LiNeS(TIES(0.3), 0.2)
    assert LiNeS(TIES(0.3)) != LiNeS(TIES(0.4))
    assert eval(repr(LiNeS(SVC(DRM()), beta=0.2))) == LiNeS(SVC(DRM()), beta=0.2)
