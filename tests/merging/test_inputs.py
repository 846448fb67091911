"""What a merge refuses, and that the message says what is wrong and with which task."""

import pytest
import torch

from lightning_drm.merging import DARETIES, DRM, TIES, TSVM, Average, IsoC, IsoCTS, LowRank, TaskArithmetic

METHODS = [DRM(), TIES(), DARETIES(), TaskArithmetic(), Average(), IsoC(), IsoCTS(), TSVM()]
MATRIX_METHODS = [method for method in METHODS if not method.elementwise]
A, B = torch.ones(3, 4), torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ([], "no deltas"),
        ([A, torch.ones(4, 3)], r"task 1 has shape \(4, 3\), task 0 has \(3, 4\)"),
        ([A, LowRank(torch.ones(3, 1), torch.ones(1, 5))], r"task 1 has shape \(3, 5\)"),
        ([A, B, A.clone().fill_(float("nan"))], "task 2 holds NaN or infinite"),
        ([A.clone().fill_(float("inf")), B], "task 0 holds NaN or infinite"),
        ([A, -float("inf") * A.double()], "task 1 holds NaN or infinite"),
        ([A, LowRank(torch.full((3, 1), float("nan")), torch.ones(1, 4))], "task 1 holds NaN or infinite"),
        ([A, B.int()], "task 1 must be floating point, got torch.int32"),
        ([A, B.to(torch.complex64)], "task 1 must be floating point"),
        ([A, None], "task 1 must be a tensor or LowRank, got NoneType"),
        ([A, A.to("meta")], "task 1 is on meta, task 0 on cpu"),
    ],
)
def test_bad_deltas(method, deltas, message):
    with pytest.raises(ValueError, match=message):
        method.merge(deltas)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ([1.0], "2 deltas need 2 coefficients, got 1"),
        ([1.0, 2.0, 3.0], "got 3"),
        ([1.0, float("nan")], "coefficient of task 1 must be a finite number"),
    ],
)
def test_bad_coefficients(method, coefficients, message):
    with pytest.raises(ValueError, match=message):
        method.merge([A, B], coefficients)


@pytest.mark.parametrize("method", MATRIX_METHODS, ids=repr)
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
def test_matrix_methods_take_matrices(method, shape):
    with pytest.raises(ValueError, match="merges matrices only"):
        method.merge([torch.ones(shape)])


def test_every_bad_task_is_named_at_once():
    bad = torch.full((3, 4), float("nan"))
    with pytest.raises(ValueError, match=r"task 0 holds.*task 2 holds"):
        DRM().merge([bad, A, bad])


@pytest.mark.parametrize(
    ("method", "arguments", "problems"),
    [
        (
            DRM,
            {
                "direction": "diagonal",
                "density": 0.0,
                "rank_tol": 1.0,
                "rank_drop": -0.1,
                "prune": "all",
                "scale": float("nan"),
            },
            ["direction", "density", "rank_tol", "rank_drop", "prune", "scale"],
        ),
        (TIES, {"density": 1.5, "scope": "layer", "scale": float("inf")}, ["density", "scope", "scale"]),
        (DARETIES, {"density": -1.0, "scale": float("inf")}, ["density", "scale"]),
        (TaskArithmetic, {"scale": float("nan")}, ["scale"]),
        (IsoC, {"scale": float("nan")}, ["scale"]),
        (IsoCTS, {"common_fraction": 1.1, "scale": float("nan")}, ["common_fraction", "scale"]),
        (TSVM, {"scale": float("-inf")}, ["scale"]),
    ],
)
def test_constructor_lists_every_problem(method, arguments, problems):
    with pytest.raises(ValueError, match=method.__name__) as caught:
        method(**arguments)
    assert all(f"{problem} must be" in str(caught.value) for problem in problems)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_parameters_without_entries_stay_empty(method):
    assert method.merge([torch.ones(0, 4), torch.ones(0, 4)]).shape == (0, 4)
    assert method.merge([torch.ones(4, 0)]).shape == (4, 0)


def test_widest_precision_wins():
    assert TaskArithmetic().merge([A, B.double()]).dtype == torch.float64
    assert TaskArithmetic().merge([A.bfloat16(), B.half()]).dtype == torch.float32


def test_coefficients_of_zero_leave_a_task_out_of_the_sum():
    for method in (TaskArithmetic(), IsoC(), IsoCTS()):
        torch.testing.assert_close(method.merge([A, B], [1.0, 0.0]), method.merge([A, torch.zeros_like(B)]))
