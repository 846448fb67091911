"""Measuring with a Trainer of its own: exact accuracies, and no other Trainer touched."""

import sys
from collections.abc import Sequence
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_drm.evaluation import Score, measure
from lightning_drm.kinds import IGNORE_INDEX
from lightning_drm.modules import MultiTaskModule


class Task(L.LightningModule):
    head_names = ("head",)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sets(L.LightningDataModule):
    def __init__(self, sets: list[TensorDataset]) -> None:
        super().__init__()
        self.sets = sets

    def test_dataloader(self) -> list[DataLoader]:
        return [DataLoader(data, batch_size=4) for data in self.sets]


@pytest.fixture
def module() -> MultiTaskModule:
    torch.manual_seed(0)
    task = Task(3)
    heads = {
        name: {"head.weight": torch.randn(classes, 5), "head.bias": torch.randn(classes)}
        for name, classes in (("a", 3), ("b", 6))
    }
    return MultiTaskModule.assemble(dict.fromkeys(heads, task), heads=heads)


def make_sets() -> Sets:
    torch.manual_seed(1)
    sets = []
    for classes, count in ((3, 13), (6, 9)):
        x, y = torch.randn(count, 4), torch.randint(0, classes, (count,))
        # Samples that pad the set to a multiple of the world size, a whole last batch of them in one of the sets.
        x = torch.cat([x, x[:3]])
        y = torch.cat([y, torch.full((3,), IGNORE_INDEX)])
        sets.append(TensorDataset(x, y))
    return Sets(sets)


def plain_accuracy(module: MultiTaskModule, data: Sets) -> dict[str, float]:
    accuracies = {}
    for name, part in zip(("a", "b"), data.sets, strict=True):
        x, y = part.tensors
        guesses = module.task_module(name)(x).argmax(1)
        right = [int(guess == target) for guess, target in zip(guesses, y, strict=True) if target != IGNORE_INDEX]
        accuracies[name] = sum(right) / len(right)
    return accuracies


ARGUMENTS = {
    "accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": None, "plugins": None, "max_epochs": 7,
    "limit_test_batches": None, "num_nodes": 1, "inference_mode": True, "logger": True, "default_root_dir": "nowhere",
    "callbacks": None, "fast_dev_run": True,
}  # fmt: skip


def values(scores: dict[str, Score]) -> dict[str, float]:
    return {task: score.value for task, score in scores.items()}


def test_counts_exactly_and_leaves_padding_out(module: MultiTaskModule) -> None:
    data = make_sets()
    expected = plain_accuracy(module, data)
    assert expected["a"] != expected["b"]
    for _ in range(2):
        assert values(measure(module, data, ARGUMENTS, [])) == pytest.approx(expected)


def test_limit_of_test_batches_is_kept(module: MultiTaskModule) -> None:
    data = make_sets()
    few = Sets([TensorDataset(*(tensor[:4] for tensor in part.tensors)) for part in data.sets])
    limited = measure(module, data, {**ARGUMENTS, "limit_test_batches": 1}, [])
    assert values(limited) == pytest.approx(plain_accuracy(module, few))


def test_nothing_to_measure_is_told(module: MultiTaskModule) -> None:
    with pytest.raises(ValueError, match=r"Nothing was measured of a, b: does limit_test_batches leave any"):
        measure(module, make_sets(), {**ARGUMENTS, "limit_test_batches": 0}, [])


def test_writes_nothing(module: MultiTaskModule, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measure(module, make_sets(), ARGUMENTS, [])
    assert list(tmp_path.iterdir()) == []


class Counter(L.Callback):
    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.batches.append(dataloader_idx)


def test_callbacks_take_part(module: MultiTaskModule) -> None:
    counter = Counter()
    measure(module, make_sets(), ARGUMENTS, [counter])
    assert counter.batches == [0] * 4 + [1] * 3


def test_weights_and_gradients_stay(module: MultiTaskModule) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if "accuracies" not in name}
    measure(module, make_sets(), ARGUMENTS, [])
    for name, tensor in before.items():
        assert torch.equal(module.state_dict()[name], tensor)
    # Inference mode must not leave tensors behind that later training cannot use.
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    task = module.task_module("a").train()
    for parameter in task.parameters():
        parameter.requires_grad_(True)
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    trainer.fit(task, DataLoader(TensorDataset(x, y), batch_size=4))
    assert not torch.equal(task.head.weight, before["task_modules.0.head.weight"])


class Timed:
    """Samples whose results take time on a clock that stands still otherwise: at once, and for each set."""

    def __init__(self, clock: list[float], at_once: float, each: float) -> None:
        self._clock, self._at_once, self._each = clock, at_once, each

    def __len__(self) -> int:
        return 10

    def results(self, choices: Sequence[object]) -> list[float]:
        self._clock[0] += self._at_once + self._each * len(choices)
        return [0.5] * len(choices)


@pytest.mark.parametrize(
    ("at_once", "each", "affordable"),
    [(0.0, 0.05, 1000), (0.4, 0.001, 1000), (5.0, 0.05, 1000), (0.0, 0.5, 100), (0.0, 1.0, 0), (61.0, 0.0, 0)],
)
def test_the_time_of_an_interval_is_judged_by_what_another_set_takes(
    at_once: float, each: float, affordable: int, monkeypatch: pytest.MonkeyPatch
):
    clock = [0.0]
    measuring = sys.modules["lightning_drm.evaluation.measure"]
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert measuring._affordable(Timed(clock, at_once, each), at_once + each) == affordable
