"""The later methods on the linear layers of a ViT-B/32 block, 8 tasks, beside DRM and beside what cannot be avoided.

The floor of a method is its products and its decompositions or solves in plain torch calls, in the precision that the
method needs them in, with nothing around them.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.floor import Floor
from benchmarks.timing import interleaved, make_deltas
from lightning_drm import DRM, STAR, SVC, WUDI, DCMerge, KnOTS, RegMean, Statistics, TaskArithmetic
from lightning_drm.merging import Method

BLOCK = {(768, 768): 4, (768, 3072): 1, (3072, 768): 1}  # one ViT-B/32 block: shape -> how many
NUM_TASKS = 8


def solved(deltas: Sequence[Tensor], grams: Sequence[Tensor], own: bool) -> Callable[[], object]:
    """Sums of deltas times Gram matrices, of inputs or of the deltas themselves, and one Cholesky solve."""
    n = deltas[0].shape[1]
    eye = torch.eye(n, dtype=torch.float64)

    def run() -> Tensor:
        met, system = torch.zeros(deltas[0].shape, dtype=torch.float64), 0.1 * eye
        for delta, gram in zip(deltas, grams, strict=True):
            double = delta.double()
            if own:
                wide = double.shape[0] <= double.shape[1]
                met += (double @ double.T) @ double if wide else double @ (double.T @ double)
                system = system + double.T @ double
            else:
                met += double @ gram.double()
                system = system + gram.double()
        return torch.cholesky_solve(met.T, torch.linalg.cholesky(system)).T

    return run


def decomposed(deltas: Sequence[Tensor], of_sum: bool) -> Callable[[], object]:
    """An eigenproblem of the shorter side of each delta, or of their sum, and the products around it."""
    matrices = [sum(deltas)] if of_sum else list(deltas)

    def run() -> None:
        for matrix in matrices:
            double = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
            _, vectors = torch.linalg.eigh(double @ double.T)
            _ = vectors.float() @ (vectors.T.float() @ double.float())
        if of_sum:
            for delta in deltas:
                _ = delta.T @ delta if delta.shape[0] > delta.shape[1] else delta @ delta.T

    return run


METHODS: dict[str, tuple[Method, Callable[..., Callable[[], object]]]] = {
    "DRM": (DRM(), lambda deltas, grams: Floor(deltas, "horizontal")),
    "KnOTS": (KnOTS(), lambda deltas, grams: Floor(deltas, "horizontal")),
    "WUDI": (WUDI(), lambda deltas, grams: solved(deltas, grams, own=True)),
    "WUDI with inputs": (WUDI(input_weight=1.0), lambda deltas, grams: solved(deltas, grams, own=True)),
    "RegMean": (RegMean(), lambda deltas, grams: solved(deltas, grams, own=False)),
    "DC-Merge": (DCMerge(), lambda deltas, grams: decomposed(deltas, of_sum=False)),
    "STAR": (STAR(), lambda deltas, grams: decomposed(deltas, of_sum=False)),
    "SVC": (SVC(TaskArithmetic()), lambda deltas, grams: decomposed(deltas, of_sum=True)),
}


@pytest.mark.parametrize("name", METHODS)
def test_block(benchmark, capsys, name):
    method, floor = METHODS[name]
    total = {"ours": 0.0, "DRM": 0.0, "floor": 0.0}
    for shape, count in BLOCK.items():
        deltas = make_deltas(shape, NUM_TASKS)
        inputs = [torch.randn(2 * shape[1], shape[1]) for _ in deltas]
        statistics = [Statistics(gram=x.T @ x / len(x)) for x in inputs]
        runs = {
            "ours": lambda deltas=deltas, statistics=statistics: method.merge(deltas, statistics=statistics),
            "floor": floor(deltas, [one.gram for one in statistics]),
        }
        if name != "DRM":
            runs["DRM"] = lambda deltas=deltas: DRM().merge(deltas)
        for one, seconds in interleaved(runs, rounds=2).items():
            total[one] += count * seconds
    benchmark.pedantic(runs["ours"], rounds=1)
    benchmark.extra_info.update(total)
    beside = f"DRM × {total['ours'] / total['DRM']:.2f}, " if total["DRM"] else ""
    ratio = total["ours"] / total["floor"]
    with capsys.disabled():
        print(f"\n  ViT-B/32 block, {name}: {total['ours']:.2f} s, {beside}its floor × {ratio:.2f}")
