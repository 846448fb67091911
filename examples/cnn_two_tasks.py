"""Merging a network that has nothing to do with transformers: a small CNN on two image tasks.

Any LightningModule can be merged once it says which part is its head. The two tasks read the same pictures of
handwritten digits: which digit it is, and whether it is odd. The digits come with scikit-learn.

    python examples/cnn_two_tasks.py
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_drm import DRM, DRMMergeCallback, MultiTaskModule


class SmallCNN(L.LightningModule):
    """Two convolutions, a hidden layer, and a head for one task."""

    head_names = ("head",)  # all that lightning_drm needs to know

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(128, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        return nn.functional.cross_entropy(self(images), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Digits(L.LightningDataModule):
    """Handwritten digits with the labels of one task: ``digit`` or ``odd``."""

    def __init__(self, task: str) -> None:
        super().__init__()
        pictures, digits = load_digits(return_X_y=True)
        images = torch.tensor(pictures, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        labels = torch.tensor(digits if task == "digit" else digits % 2)
        train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits)
        self.train = TensorDataset(images[train], labels[train])
        self.test = TensorDataset(images[test], labels[test])
        self.num_classes = int(labels.max()) + 1

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=256)


def trainer(**arguments: object) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, **arguments
    )


def pretrained() -> SmallCNN:
    """The base that both tasks start from: a few epochs on telling large digits from small ones."""
    L.seed_everything(0, verbose=False)
    data = Digits("digit")
    images, digits = data.train.tensors
    base = SmallCNN(num_classes=2)
    trainer(max_epochs=3).fit(base, DataLoader(TensorDataset(images, (digits > 4).long()), batch_size=64, shuffle=True))
    return base


def main() -> dict[str, dict[str, float]]:
    base = pretrained()
    tasks = {"digit": Digits("digit"), "odd": Digits("odd")}
    merge = DRMMergeCallback(list(tasks), method=DRM(density=0.5), convolutions="matrix")
    accuracy: dict[str, dict[str, float]] = {"individual": {}, "merged": {}}
    for name, data in tasks.items():
        L.seed_everything(0, verbose=False)
        module = SmallCNN(data.num_classes)
        module.features.load_state_dict(base.features.state_dict())
        trainer(max_epochs=5, callbacks=[merge.for_task(name)]).fit(module, data)
        metrics = trainer().test(MultiTaskModule({name: module}), data, verbose=False)
        accuracy["individual"][name] = metrics[0][f"accuracy/{name}"]
    results = trainer().test(merge.merged_module, [d.test_dataloader() for d in tasks.values()], verbose=False)
    for name, metrics in zip(tasks, results, strict=True):
        accuracy["merged"][name] = metrics[f"accuracy/{name}"]
    for row, values in accuracy.items():
        print(f"{row:>10}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in values.items()))
    return accuracy


if __name__ == "__main__":
    main()
