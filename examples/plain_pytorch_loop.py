"""Two tasks trained by a loop written by hand, merged by a `MergeSession`: no Trainer, no LightningModule.

Both tasks read the same pictures of handwritten digits, which come with scikit-learn: which digit it is, and whether it
is odd. They start from one network that was trained to tell large digits from small ones.

    python examples/plain_pytorch_loop.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_drm import DRM, MergeSession

PICTURES, DIGITS = (torch.tensor(values) for values in load_digits(return_X_y=True))
TRAIN, TEST = train_test_split(range(len(DIGITS)), test_size=0.25, random_state=0, stratify=DIGITS)
IMAGES = PICTURES.float() / 16
LABELS = {"large": (DIGITS > 4).long(), "digit": DIGITS, "odd": DIGITS % 2}


class Network(nn.Module):
    """Two hidden layers that all tasks share, and a head of one task."""

    head_names = ("head",)  # all that lightning_drm needs to know

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images))


def train(network: Network, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.tensor(TRAIN)[torch.randperm(len(TRAIN))].split(64):
            optimizer.zero_grad()
            cross_entropy(network(IMAGES[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, labels: Tensor) -> float:
    return float((network(IMAGES[TEST]).argmax(1) == labels[TEST]).float().mean())


def main() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    base = Network(2)
    train(base, LABELS["large"], epochs=5)

    tasks = ["digit", "odd"]
    session = MergeSession(tasks, method=DRM(density=0.5))
    results: dict[str, dict[str, float]] = {"individual": {}, "merged": {}}
    for task in tasks:
        network = Network(int(LABELS[task].max()) + 1)
        network.hidden = copy.deepcopy(base.hidden)
        session.note_base(network)
        train(network, LABELS[task], epochs=5)
        session.collect(network, task)
        results["individual"][task] = accuracy(network, LABELS[task])
    merged = session.fuse()
    for task in tasks:
        results["merged"][task] = accuracy(merged.task_module(task), LABELS[task])
    for row, values in results.items():
        print(f"{row:>10}: " + ", ".join(f"{task} {100 * value:.1f} %" for task, value in values.items()))
    return results


if __name__ == "__main__":
    main()
