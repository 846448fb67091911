"""A run of three small tasks, and what its models score, computed by hand in float64."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.tiny import Vectors, VectorTask
from lightning_drm import DRM, DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.analysis import Analysis
from lightning_drm.evaluation import StoredFinding
from lightning_drm.merging import Method

CLASSES = {"ant": 2, "bee": 3, "cat": 2}
SNAPSHOT = 3
METHOD = DRM(density=0.5)
Deltas = Mapping[str, Tensor]


class Validated(Vectors):
    """Its validation set is its test set."""

    def val_dataloader(self) -> DataLoader:
        return self.test_dataloader()


@dataclass(frozen=True)
class ThreeTasks:
    """The run.

    Attributes:
        folder: The run folder.
    """

    folder: Path

    def trainer(self, method: Method = METHOD, **drm: object) -> MergeTrainer:
        return MergeTrainer(
            max_steps=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[DRMMergeCallback(list(CLASSES), method, self.folder, **drm)],
        )  # fmt: skip

    def data(self) -> MultiTaskDataModule:
        return MultiTaskDataModule({task: Validated(seed, CLASSES[task]) for seed, task in enumerate(CLASSES)})

    def analyze(self, analysis: Analysis, method: Method = METHOD, **drm: object) -> list[StoredFinding]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed in a `val_dataloader`")
            trainer = self.trainer(method, **drm)
            return trainer.analyze(Template(), self.data(), only=analysis.name, analyses=[analysis])

    def table(self, analysis: Analysis, method: Method = METHOD, **drm: object) -> pd.DataFrame:
        return pd.read_csv(self.analyze(analysis, method, **drm)[0].table)

    def place(self, task: str, step: int | None = None) -> Path:
        folder = self.folder / "tasks" / task
        return folder if step is None else folder / "snapshots" / str(step)

    def deltas(self, task: str, step: int | None = None) -> dict[str, Tensor]:
        return {n: t.double() for n, t in load_file(self.place(task, step) / "deltas.safetensors").items()}

    def merged(self, method: Method, tasks: Sequence[str] = tuple(CLASSES), step: int | None = None) -> Deltas:
        """By hand: matrices by the method, all else averaged, as the recipe has it for methods on matrices."""
        vectors = [self.deltas(task, step) for task in tasks]
        by_method = {n for n, t in vectors[0].items() if t.ndim == 2 or method.elementwise}
        return {
            name: method.merge([vector[name] for vector in vectors])
            if name in by_method
            else method.scale * sum(vector[name] for vector in vectors) / len(vectors)
            for name in vectors[0]
        }

    def predictions(self, deltas: Deltas, task: str, step: int | None = None) -> tuple[Tensor, Tensor]:
        """Predicted and true classes of the validation samples."""
        module = VectorTask(CLASSES[task]).double()
        state = module.state_dict()
        for name, delta in deltas.items():
            state[name] = state[name] + delta
        module.load_state_dict(state | load_file(self.place(task, step) / "head.safetensors"))
        x, y = Vectors(list(CLASSES).index(task), CLASSES[task]).test.tensors
        return module(x.double()).argmax(1), y

    def accuracy(self, deltas: Deltas, task: str, step: int | None = None) -> float:
        predicted, target = self.predictions(deltas, task, step)
        return int((predicted == target).sum()) / len(target)

    def normalized(self, deltas: Deltas, task: str) -> float:
        return self.accuracy(deltas, task) / self.accuracy(self.deltas(task), task)


class Template(VectorTask):
    """Gets its head from the data."""

    def configure_task(self, num_classes: int) -> None:
        self.head = torch.nn.Linear(5, num_classes)


def finetuned(folder: Path) -> ThreeTasks:
    run = ThreeTasks(folder)
    run.trainer(snapshots=[SNAPSHOT]).fit(Template(lr=0.3), datamodule=run.data(), base_batches=0)
    return run
