"""The same with Lightning Fabric, which moves model and batches to the device and can train on several processes.

Three methods merge what was trained once.

    python examples/fabric_loop.py
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_drm import DRM, TIES, Average, MergeSession

PICTURES, DIGITS = (torch.tensor(values) for values in load_digits(return_X_y=True))
LABELS = {"digit": DIGITS, "odd": DIGITS % 2}
NUM_TRAIN = 1200


class Network(nn.Module):
    """Two hidden layers that all tasks share, drawn from one seed, and a head of one task."""

    head_names = ("head",)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images))


def dataset(task: str, rows: slice) -> TensorDataset:
    return TensorDataset(PICTURES[rows].float() / 16, LABELS[task][rows])


@torch.no_grad()
def accuracy(network: nn.Module, task: str) -> float:
    images, labels = dataset(task, slice(NUM_TRAIN, None)).tensors
    device = next(network.parameters()).device
    return float((network(images.to(device)).argmax(1).cpu() == labels).float().mean())


def main(epochs: int = 5) -> dict[str, dict[str, float]]:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    session = MergeSession(list(LABELS), method=DRM(density=0.5))
    results: dict[str, dict[str, float]] = {"individual": {}}
    for task, labels in LABELS.items():
        network = Network(int(labels.max()) + 1)
        model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
        loader = fabric.setup_dataloaders(DataLoader(dataset(task, slice(NUM_TRAIN)), batch_size=64, shuffle=True))
        session.note_base(model)
        for _ in range(epochs):
            for images, target in loader:
                optimizer.zero_grad()
                fabric.backward(cross_entropy(model(images), target))
                optimizer.step()
        session.collect(model, task)
        results["individual"][task] = accuracy(network, task)
    for method in (DRM(density=0.5), TIES(density=0.5), Average()):
        merged = session.fuse(method)
        results[type(method).__name__] = {task: accuracy(merged.task_module(task), task) for task in LABELS}
    for row, values in results.items():
        fabric.print(f"{row:>10}: " + ", ".join(f"{task} {100 * value:.1f} %" for task, value in values.items()))
    return results


if __name__ == "__main__":
    main()
