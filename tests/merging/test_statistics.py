"""The methods that use statistics of the tasks' data, against plain float64 formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.devices import on
from lightning_drm import DRM, SVC, WUDI, Average, Fisher, LowRank, RegMean, Statistics
from lightning_drm.merging import Method

WITH_GRAM = [RegMean(), RegMean(alpha=0.5), RegMean(alpha=1.0), WUDI(input_weight=1.0), WUDI(0.0, input_weight=0.5)]


def made(num_tasks: int, m: int, n: int, seed: int = 0, rows: int = 50) -> tuple[list[Tensor], list[Statistics]]:
    g = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(m, n, generator=g, dtype=torch.float64) for _ in range(num_tasks)]
    found = []
    for _ in range(num_tasks):
        inputs = torch.randn(rows, n, generator=g, dtype=torch.float64) * torch.linspace(0.1, 3, n)
        fisher = torch.rand(m, n, generator=g, dtype=torch.float64) ** 8
        found.append(Statistics(gram=inputs.T @ inputs / rows, fisher=fisher))
    return deltas, found


def regmean(deltas: list[Tensor], statistics: list[Statistics], weights: list[float], alpha: float) -> np.ndarray:
    """RegMean by its formula, around the mean, with numpy's pseudoinverse."""
    D = [delta.numpy() for delta in deltas]
    G = [alpha * s.gram.numpy() + (1 - alpha) * np.diag(np.diag(s.gram.numpy())) for s in statistics]
    mean = sum(w * d for w, d in zip(weights, D, strict=True)) / sum(weights)
    missed = sum(w * (d - mean) @ g for w, d, g in zip(weights, D, G, strict=True))
    return mean + missed @ np.linalg.pinv(sum(w * g for w, g in zip(weights, G, strict=True)), rcond=1e-9)


def wudi(deltas: list[Tensor], statistics: list[Statistics], weights: list[float], ridge: float, beta: float):
    """WUDI with inputs by its formula."""
    D = [delta.numpy() for delta in deltas]
    C = [s.gram.numpy() for s in statistics]
    G = [d.T @ d / (d**2).sum() + beta * c / np.trace(c) for d, c in zip(D, C, strict=True)]
    n = D[0].shape[1]
    mu = ridge * np.trace(sum(G)) / n * np.eye(n)
    return sum(w * d @ (g + mu) for w, d, g in zip(weights, D, G, strict=True)) @ np.linalg.pinv(
        sum(G) + len(D) * mu / len(D)
    )


def error(merged: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(merged.cpu().numpy() - expected) / np.linalg.norm(expected))


def merge_on(
    device: torch.device,
    method: Method,
    deltas: list[Tensor],
    coefficients: list[float] | None,
    statistics: list[Statistics],
) -> Tensor:
    merged = method.merge(on(device, deltas), coefficients, statistics=[one.to(device) for one in statistics])
    assert merged.device.type == device.type
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.95, 1.0])
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (1, 5), (5, 1)])
def test_regmean_is_its_formula(alpha: float, m: int, n: int, device: torch.device):
    deltas, statistics = made(3, m, n)
    weights = [1.0, 0.5, 2.0]
    merged = merge_on(device, RegMean(alpha), deltas, weights, statistics)
    assert error(merged, regmean(deltas, statistics, weights, alpha)) < 1e-12


def test_regmean_minimizes_what_the_paper_says():
    """Without shrinking, no small step from it brings the outputs closer to the tasks' own."""
    deltas, statistics = made(3, 4, 5)
    merged = RegMean(alpha=1.0).merge(deltas, statistics=statistics).requires_grad_()
    loss = sum(torch.trace((merged - d) @ s.gram @ (merged - d).T) for d, s in zip(deltas, statistics, strict=True))
    loss.backward()
    assert merged.grad.abs().max() < 1e-12


@pytest.mark.parametrize("alpha", [0.95, 1.0])
def test_inputs_that_no_task_uses_keep_the_mean(alpha: float):
    deltas, statistics = made(2, 4, 6)
    for one in statistics:
        one.gram[2], one.gram[:, 2] = 0.0, 0.0
    merged = RegMean(alpha).merge(deltas, statistics=statistics)
    assert torch.allclose(merged[:, 2], (deltas[0] + deltas[1])[:, 2] / 2, rtol=1e-14)
    assert error(merged, regmean(deltas, statistics, [1.0, 1.0], alpha)) < 1e-11


def test_regmean_with_fewer_rows_than_inputs_has_the_least_change_from_the_mean(device: torch.device):
    deltas, statistics = made(2, 4, 12, rows=3)
    merged = merge_on(device, RegMean(alpha=1.0), deltas, None, statistics)
    assert error(merged, regmean(deltas, statistics, [1.0, 1.0], 1.0)) < 1e-9


@pytest.mark.parametrize("ridge", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_wudi_with_inputs_is_its_formula(ridge: float, beta: float, m: int, n: int, device: torch.device):
    deltas, statistics = made(3, m, n)
    weights = [1.0, 0.5, 2.0]
    merged = merge_on(device, WUDI(ridge, input_weight=beta), deltas, weights, statistics)
    assert error(merged, wudi(deltas, statistics, weights, ridge, beta)) < 1e-12


def test_wudi_without_inputs_needs_none():
    deltas, statistics = made(3, 6, 9)
    assert WUDI().needs is None
    assert WUDI(input_weight=0.5).needs == "gram"
    assert torch.equal(WUDI().merge(deltas, statistics=statistics), WUDI().merge(deltas))


@pytest.mark.parametrize("method", WITH_GRAM, ids=repr)
def test_low_rank_deltas_are_merged_exactly(method: Method, device: torch.device):
    _, statistics = made(3, 8, 10)
    g = torch.Generator().manual_seed(1)
    factors = [
        LowRank(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((8, 2), (2, 10))))
        for _ in range(3)
    ]
    dense = method.merge([factor.dense() for factor in factors], statistics=statistics)
    low_rank = method.merge_low_rank(on(device, factors), statistics=[one.to(device) for one in statistics])
    assert low_rank.rank <= 6
    assert error(low_rank.dense(), dense.numpy()) < 1e-8  # without a ridge, the dense solve has directions of rounding


@pytest.mark.parametrize("method", [*WITH_GRAM, Fisher()], ids=repr)
@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_deltas_of_any_size(method: Method, size: float):
    deltas, statistics = made(3, 6, 6)
    merged = method.merge([size * delta for delta in deltas], statistics=statistics)
    expected = method.merge(deltas, statistics=statistics)
    assert torch.allclose(merged / size, expected, rtol=1e-8)


@pytest.mark.parametrize("method", [*WITH_GRAM, Fisher()], ids=repr)
def test_a_task_alone_is_itself(method: Method):
    deltas, statistics = made(1, 5, 7)
    assert torch.allclose(method.merge(deltas, statistics=statistics), deltas[0], rtol=1e-9)


@pytest.mark.parametrize("method", [RegMean(), Fisher()], ids=repr)
def test_a_factor_on_all_coefficients_changes_nothing(method: Method):
    deltas, statistics = made(3, 5, 7)
    merged = method.merge(deltas, [1.0, 2.0, 3.0], statistics=statistics)
    assert torch.allclose(method.merge(deltas, [0.5, 1.0, 1.5], statistics=statistics), merged, rtol=1e-13)
    with pytest.raises(ValueError, match=r"weights of a mean: none below 0 and not all 0, got \[1\.0, -1\.0, 1\.0\]"):
        method.merge(deltas, [1.0, -1.0, 1.0], statistics=statistics)


@pytest.mark.parametrize("norms", [None, [1.0, 5.0, 0.2]])
def test_fisher_is_its_formula(norms: list[float] | None, device: torch.device):
    deltas, statistics = made(3, 5, 7)
    if norms is not None:
        statistics = [Statistics(fisher=s.fisher, fisher_norm=n) for s, n in zip(statistics, norms, strict=True)]
    weights = [1.0, 0.5, 2.0]
    top, bottom = np.zeros((5, 7)), np.zeros((5, 7))
    for task, (delta, one) in enumerate(zip(deltas, statistics, strict=True)):
        norm = np.linalg.norm(one.fisher.numpy()) if norms is None else norms[task]
        for i in range(5):
            for j in range(7):
                weight = weights[task] * max(float(one.fisher[i, j]), 1e-3) / norm
                top[i, j] += weight * float(delta[i, j])
                bottom[i, j] += weight
    assert error(merge_on(device, Fisher(floor=1e-3), deltas, weights, statistics), top / bottom) < 1e-14


def test_fisher_takes_tensors_of_any_shape_and_tasks_that_say_nothing():
    deltas = [torch.ones(4), torch.zeros(4)]
    statistics = [Statistics(fisher=torch.zeros(4)), Statistics(fisher=torch.zeros(4))]
    assert torch.equal(Fisher().merge(deltas, statistics=statistics), torch.full((4,), 0.5))


def test_a_step_around_a_method_hands_its_statistics_on(device: torch.device):
    deltas, statistics = made(3, 5, 7)
    method = SVC(RegMean(alpha=0.9))
    assert method.needs == "gram"
    plain = RegMean(alpha=0.9).merge(deltas, statistics=statistics)
    U, S, Vh = torch.linalg.svd(plain, full_matrices=False)
    expected = torch.zeros_like(plain)
    for u, s, v in zip(U.T, S, Vh, strict=True):
        overshoot = [max(1 / 3, float(s * v @ (d.T @ u) / (d.T @ u).square().sum())) for d in deltas]
        expected += s / (sum(overshoot) / 3) * torch.outer(u, v)
    assert error(merge_on(device, method, deltas, None, statistics), expected.numpy()) < 1e-12


def test_methods_without_needs_leave_statistics_aside():
    deltas, statistics = made(3, 5, 7)
    for method in (DRM(), Average()):
        assert torch.equal(method.merge(deltas, statistics=statistics), method.merge(deltas))


@pytest.mark.parametrize(
    ("statistics", "said"),
    [
        (None, "RegMean needs statistics of the tasks' data .gram., one for each task, got none"),
        ([Statistics(gram=torch.eye(3))], "2 deltas need 2 statistics, got 1"),
        ([Statistics(), Statistics(gram=torch.eye(3))], "statistics of task 0 have no gram"),
        (
            [Statistics(gram=torch.eye(2)), Statistics(gram=torch.eye(3))],
            r"gram of task 0 has shape \(2, 2\), expected",
        ),
        ([Statistics(gram=torch.eye(3)), Statistics(gram=-torch.eye(3))], "gram of task 1 has negative squares"),
        ([Statistics(gram=torch.eye(3)), Statistics(gram=torch.eye(3) / 0)], "gram of task 1 holds NaN or infinite"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(statistics: list[Statistics] | None, said: str):
    with pytest.raises(ValueError, match=said):
        RegMean().merge([torch.ones(2, 3), torch.ones(2, 3)], statistics=statistics)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: RegMean(alpha=2.0, num_samples=0),
            r"RegMean: alpha must be in \[0, 1\], got 2.0; num_samples must be 1",
        ),
        (lambda: Fisher(floor=0.0), "floor must be a number above 0, got 0.0"),
        (lambda: WUDI(input_weight=-1.0), "input_weight must be a number of at least 0, got -1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, said: str):
    with pytest.raises(ValueError, match=said):
        make()
