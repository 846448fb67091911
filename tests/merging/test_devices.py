"""A GPU merges what the CPU does, by every method and at sizes that its solvers treat differently."""

import pytest

from benchmarks.gpu import allowed_off, off_the_cpu
from benchmarks.gpu_cases import Model, methods_for
from helpers.devices import CUDA, needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]

MODELS = [
    Model("small", {(256, 384): 1}, 8),
    Model("tall", {(640, 100): 1}, 3),
    Model("square", {(640, 640): 1}, 5),
    Model("one task", {(300, 600): 1}, 1),
    Model("adapters", {(512, 600): 1}, 5, rank=16),
]
CASES = [(model, name) for model in MODELS for name in methods_for(model)]


@pytest.mark.parametrize(("model", "name"), CASES, ids=[f"{model.title}-{name}" for model, name in CASES])
def test_every_method_gives_the_values_of_the_cpu(model: Model, name: str):
    method = methods_for(model)[name]
    assert off_the_cpu(method, model, CUDA) <= allowed_off(method)
