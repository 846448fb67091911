"""Batch-norm statistics of a merged model: those of the tasks' own batches, computed again in float64."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_drm.deltas import backbone_parameters
from lightning_drm.modules import MultiTaskModule, batch_norms, of_all_tasks

EPS = 1e-5


class SmallCNN(L.LightningModule):
    """Two convolutions, a batch norm after each, a third one that no batch goes through, and one in the head."""

    head_names = ("head",)

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Tanh()
        )
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.BatchNorm1d(2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 5), nn.BatchNorm1d(5), nn.Linear(5, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))


def loader(seed: int) -> DataLoader:
    """Four batches, the last of which is smaller."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 1, 8, 8, generator=generator) * (seed + 1) + seed
    return DataLoader(TensorDataset(x, torch.zeros(40, dtype=torch.long)), batch_size=12)


def merged() -> MultiTaskModule:
    torch.manual_seed(0)
    modules = {"one": SmallCNN(3), "two": SmallCNN(2)}
    backbone = {n: torch.rand_like(p.tensor) for n, p in backbone_parameters(modules["one"], ("head",)).items()}
    return MultiTaskModule.assemble(modules, backbone)


def normalized(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """A batch normalized by its own statistics, and its mean and unbiased variance: written out."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
    mean, variance = x.mean(axes), x.var(axes, correction=0)
    scale, shift = (p.detach().double().reshape(shape) for p in (norm.weight, norm.bias))
    out = (x - mean.reshape(shape)) / (variance.reshape(shape) + EPS).sqrt() * scale + shift
    return out, mean, x.var(axes, correction=1)


def by_hand(module: SmallCNN, batches: Any) -> dict[str, Tensor]:
    """The mean over batches of their statistics, in float64."""
    p = {name: tensor.detach().double() for name, tensor in module.named_parameters()}
    seen: dict[str, list[Tensor]] = {}
    for x, _ in batches:
        hidden = nn.functional.conv2d(x.double(), p["features.0.weight"], p["features.0.bias"])
        hidden, *first = normalized(hidden, module.features[1])
        hidden = nn.functional.conv2d(hidden.tanh(), p["features.3.weight"], p["features.3.bias"])
        hidden, *second = normalized(hidden, module.features[4])
        hidden = hidden.tanh().flatten(1) @ p["head.1.weight"].T + p["head.1.bias"]
        _, *third = normalized(hidden, module.head[2])
        for name, (mean, variance) in {"features.1": first, "features.4": second, "head.2": third}.items():
            seen.setdefault(f"{name}.running_mean", []).append(mean)
            seen.setdefault(f"{name}.running_var", []).append(variance)
    return {name: torch.stack(found).mean(0) for name, found in seen.items()}


def running(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if "running_" in name}


def assert_equal_to(module: nn.Module, expected: dict[str, Tensor]) -> None:
    state = running(module)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_a_plain_computation_for_each_task():
    module = merged()
    before = {task: {n: t.clone() for n, t in running(module.task_module(task)).items()} for task in module.task_names}
    module.reestimate_batch_norm({task: loader(seed) for seed, task in enumerate(module.task_names)})
    expected = [by_hand(module.task_module(task), loader(seed)) for seed, task in enumerate(module.task_names)]
    assert all((expected[0][name] - expected[1][name]).abs().max() > 0.01 for name in expected[0])
    for task, of_task in zip(module.task_names, expected, strict=True):
        assert_equal_to(module.task_module(task), of_task)
        for name in ("unused.running_mean", "unused.running_var"):
            assert torch.equal(running(module.task_module(task))[name], before[task][name]), "no batch went through"
    assert not any(child.training for child in module.modules())
    assert all(layer.momentum == 0.1 for layer in batch_norms(module.task_module("one")).values())


def test_weights_are_still_one_backbone():
    module = merged()
    module.reestimate_batch_norm({task: loader(seed) for seed, task in enumerate(module.task_names)})
    one, two = (module.task_module(task) for task in module.task_names)
    assert all(a is b for a, b in zip(one.features.parameters(), two.features.parameters(), strict=True))
    assert one.features[1].running_mean is not two.features[1].running_mean


def test_statistics_are_those_of_update_bn():
    module = merged()
    theirs = copy.deepcopy(module.task_module("one"))
    theirs.dropout.p = 0.0
    update_bn(loader(0), theirs)
    module.reestimate_batch_norm({"one": loader(0)})
    for name, tensor in running(module.task_module("one")).items():
        if not name.startswith("unused"):
            torch.testing.assert_close(tensor, running(theirs)[name], rtol=1e-5, atol=1e-6)


def test_no_more_batches_are_used_than_allowed():
    module = merged()
    module.reestimate_batch_norm({"two": loader(1)}, max_batches=2)
    assert_equal_to(module.task_module("two"), by_hand(module.task_module("two"), list(loader(1))[:2]))


def test_tasks_that_are_not_named_keep_what_they_have():
    module = merged()
    before = {name: tensor.clone() for name, tensor in running(module.task_module("two")).items()}
    logits = module((torch.ones(2, 1, 8, 8), torch.zeros(2)), "two")
    module.reestimate_batch_norm({"one": loader(0)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in running(module.task_module("two")).items())
    assert torch.equal(module((torch.ones(2, 1, 8, 8), torch.zeros(2)), "two"), logits)


def test_half_precision_is_summed_in_full():
    module = merged().to(torch.bfloat16)
    batches = [(x.to(torch.bfloat16), y) for x, y in loader(0)] * 50
    found = module.estimate_batch_norm({"one": batches})["one"]
    assert all(tensor.dtype == torch.float64 for tensor in found.values())
    once = module.estimate_batch_norm({"one": batches[:4]})["one"]
    assert all(torch.allclose(found[name], once[name], rtol=1e-12, atol=0) for name in found)


def test_broken_statistics_are_mended():
    """A merge of variances may be negative, which gives NaN."""
    module = merged()
    for layer in batch_norms(module.task_module("one")).values():
        layer.running_var.fill_(math.nan)
    module.reestimate_batch_norm({"one": loader(0)})
    assert_equal_to(module.task_module("one"), by_hand(module.task_module("one"), loader(0)))


def test_synchronized_batch_norms_are_plain_in_a_merged_model():
    module = SmallCNN()
    module.features = nn.SyncBatchNorm.convert_sync_batchnorm(module.features)
    assembled = MultiTaskModule.assemble({"one": module})
    assert isinstance(module.features[1], nn.SyncBatchNorm), "the module stays as it is"
    assert not any(isinstance(child, nn.SyncBatchNorm) for child in assembled.modules())
    assembled.reestimate_batch_norm({"one": loader(0)})
    assert_equal_to(assembled.task_module("one"), by_hand(assembled.task_module("one"), loader(0)))


class Frozen(SmallCNN):
    """Keeps its first batch norm as in a test, whatever mode is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        self.features[1].eval()
        return super().forward(x)


def test_a_layer_that_is_kept_fixed_is_left_alone():
    module = MultiTaskModule({"one": Frozen()})
    module.reestimate_batch_norm({"one": loader(0)})
    layers = batch_norms(module.task_module("one"))
    assert torch.equal(layers["features.1"].running_mean, torch.zeros(4))
    assert layers["features.4"].running_mean.abs().min() > 1e-4


class Unread:
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("nobody asks for these batches")


def test_a_model_without_batch_norms_costs_nothing():
    class Bare(L.LightningModule):
        head_names = ()

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    module = MultiTaskModule({"one": Bare()})
    layers = list(module.modules())
    module.reestimate_batch_norm({"one": Unread()})
    assert list(module.modules()) == layers


def test_no_batches_and_unknown_tasks_are_refused_by_name():
    module = merged()
    before = {name: tensor.clone() for name, tensor in running(module).items()}
    with pytest.raises(ValueError, match="Task 'one': There are no batches"):
        module.reestimate_batch_norm({"one": []})
    with pytest.raises(ValueError, match="Task 'one': Expected more than 1 value per channel"):
        module.reestimate_batch_norm({"one": [(torch.zeros(1, 1, 8, 8), torch.zeros(1))]})
    with pytest.raises(KeyError, match="No task 'three'"):
        module.reestimate_batch_norm({"three": loader(0)})
    assert not any(child.training for child in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in running(module).items())


def test_statistics_of_all_tasks_are_those_of_the_mixture():
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(500, 3, dtype=torch.float64, generator=generator) * s + s for s in (1, 3)]
    each = {
        str(i): {"norm.running_mean": x.mean(0), "norm.running_var": x.var(0, correction=0)}
        for i, x in enumerate(samples)
    }
    both = of_all_tasks({**each, "0": {**each["0"], "other.running_mean": torch.zeros(1)}})
    assert both.keys() == {"norm.running_mean", "norm.running_var"}
    torch.testing.assert_close(both["norm.running_mean"], torch.cat(samples).mean(0))
    torch.testing.assert_close(both["norm.running_var"], torch.cat(samples).var(0, correction=0))
