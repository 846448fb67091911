"""TIES and task arithmetic on models of 100 million parameters × 8 tasks."""

import torch

from benchmarks import published
from lightning_drm.merging import TIES, TaskArithmetic

NUM_TASKS = 8
PARAMETERS = 25
SIZE = 4_000_000


def model():
    """25 parameters of 4 million entries: views of one flat vector for each task, as the published code holds them."""
    g = torch.Generator().manual_seed(0)
    flat = [torch.randn(PARAMETERS * SIZE, generator=g).mul_(1e-3) for _ in range(NUM_TASKS)]
    return flat, list(zip(*(vector.split(SIZE) for vector in flat), strict=True))


def test_ties(compare):
    """The published code gets one task less: eight and their stack do not fit into 24 GB. Its time is scaled up."""
    flat, parameters = model()

    def ours():
        method = TIES().calibrate(lambda: parameters)
        for deltas in parameters:
            method.merge(deltas)

    def argsort():
        published.ties(flat[:2])

    times = compare("TIES 100 M × 8 (argsort: 100 M × 2)", ours, {"argsort": argsort}, rounds=1)
    compare.say(f"  argsort over 8 tasks, at four times that: {4 * times['argsort'] / times['ours']:.1f} ×")


def test_task_arithmetic(compare):
    flat, parameters = model()

    def ours():
        for deltas in parameters:
            TaskArithmetic().merge(deltas)

    def floor():
        for deltas in parameters:
            total = deltas[0].clone()
            for delta in deltas[1:]:
                total.add_(delta)

    others = {"stacked": lambda: published.task_arithmetic(flat[:4]), "floor": floor}
    times = compare("task arithmetic 100 M × 8 (stacked: 100 M × 4)", ours, others, rounds=2)
    compare.say(f"  stacked over 8 tasks, at twice that: {2 * times['stacked'] / times['ours']:.1f} ×")
