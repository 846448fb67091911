"""Confusions and conflicts of one task, counted by hand."""

from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError

from helpers.three_tasks import CLASSES, ThreeTasks
from lightning_drm import DRM, DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.analysis.conflicts import Conflicts
from lightning_drm.evaluation import StoredFinding

METHOD = DRM(density=0.5)


@pytest.fixture(scope="module")
def of_bee(three_tasks: ThreeTasks) -> list[StoredFinding]:
    return three_tasks.analyze(Conflicts("bee"))


def test_pairs_and_merges_without_one_task(three_tasks: ThreeTasks, of_bee: list[StoredFinding]):
    finding, _ = of_bee
    table = pd.read_csv(finding.table, keep_default_na=False).set_index(["model", "other task"])["score"].astype(float)
    pairs = {"ant": ("ant", "bee"), "cat": ("bee", "cat")}
    for other in ("ant", "cat"):
        remaining = tuple(task for task in CLASSES if task != other)
        pair = three_tasks.accuracy(three_tasks.merged(METHOD, pairs[other]), "bee")
        left = three_tasks.accuracy(three_tasks.merged(METHOD, remaining), "bee")
        assert table["merged with one other", other] == pytest.approx(pair)
        assert table["merged without one other", other] == pytest.approx(left)
    own = three_tasks.accuracy(three_tasks.deltas("bee"), "bee")
    merged = three_tasks.accuracy(three_tasks.merged(METHOD), "bee")
    assert (table["finetuned", ""], table["merged", ""]) == pytest.approx((own, merged))
    assert f"bee falls from accuracy {100 * own:.1f} % to accuracy {100 * merged:.1f} %" in finding.sentence
    worst = table["merged with one other"].idxmin()
    assert f"merged with {worst} alone it has accuracy {100 * table['merged with one other', worst]:.1f} %" in (
        finding.sentence
    )


def test_confusions_are_counted_before_and_after(three_tasks: ThreeTasks, of_bee: list[StoredFinding]):
    _, finding = of_bee
    table = pd.read_csv(finding.table)
    models = {"finetuned": three_tasks.deltas("bee"), "merged": three_tasks.merged(METHOD)}
    for model, deltas in models.items():
        expected = np.zeros((3, 3), dtype=int)
        for predicted, target in zip(*three_tasks.predictions(deltas, "bee"), strict=True):
            expected[target, predicted] += 1
        found = table[table["model"] == model].pivot(index="true class", columns="predicted class", values="samples")
        assert (found.to_numpy() == expected).all()
    right = [100 * three_tasks.accuracy(deltas, "bee") for deltas in models.values()]
    assert finding.sentence.startswith(
        f"Of 32 samples, {right[0]:.1f} % are put into their own class before the merge and {right[1]:.1f} % after it."
    )


def test_the_task_that_lost_most_is_taken(three_tasks: ThreeTasks):
    merged = three_tasks.merged(METHOD)
    lowest = min(CLASSES, key=lambda task: three_tasks.normalized(merged, task))
    finding, _ = three_tasks.analyze(Conflicts())
    assert finding.title.startswith(f"Conflicts of {lowest} in the merge of 3 tasks (DRM, horizontal, density 0.5)")


def test_an_unknown_task_is_named(three_tasks: ThreeTasks):
    with pytest.raises(ValueError, match="conflicts: There is no task 'dog'; tasks: ant, bee, cat"):
        three_tasks.analyze(Conflicts("dog"))


class Rating(L.LightningModule):
    """Predicts a number, judged by its mean absolute error."""

    head_names = ("head",)
    score = "error"
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = nn.Linear(6, 5)
        self.head = nn.Linear(5, 1)
        self.error = MeanAbsoluteError()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])).squeeze(1), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.error(self.head(self.backbone(batch[0])).squeeze(1), batch[1])
        self.log("error", self.error)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Numbers(L.LightningDataModule):
    """Vectors and a number of each, by a linear rule."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(48, 6, generator=generator)
        self.rows = TensorDataset(x, x @ torch.randn(6, generator=generator))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=16)

    val_dataloader = test_dataloader = train_dataloader


def test_a_task_without_classes_has_scores_alone_and_lower_errors_are_better(tmp_path: Path):
    data = MultiTaskDataModule({"up": Numbers(1), "down": Numbers(2)})

    def trainer() -> MergeTrainer:
        return MergeTrainer(
            max_steps=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[DRMMergeCallback(["up", "down"], METHOD, tmp_path)],
        )  # fmt: skip

    trainer().fit(Rating(), datamodule=data, base_batches=0)
    (finding,) = trainer().analyze(Rating(), data, only="conflicts", analyses=[Conflicts("up")])
    assert finding.sentence.endswith(" up has no classes, so there is no confusion matrix.")
    table = pd.read_csv(finding.table, keep_default_na=False).set_index("model")
    assert set(table["metric"]) == {"error (own unit)"}
    vectors = {task: load_file(tmp_path / f"tasks/{task}/deltas.safetensors") for task in ("up", "down")}
    head = load_file(tmp_path / "tasks/up/head.safetensors")
    weights = {name: vectors["up"][name].double() for name in vectors["up"]}
    both = {
        "backbone.weight": METHOD.merge([vector["backbone.weight"].double() for vector in vectors.values()]),
        "backbone.bias": sum(vector["backbone.bias"].double() for vector in vectors.values()) / 2,
    }
    errors = {}
    for name, deltas in (("finetuned", weights), ("merged", both)):
        module = Rating().double()
        state = {key: tensor + deltas.get(key, 0) for key, tensor in module.state_dict().items()}
        module.load_state_dict({**state, **head})
        x, y = data.tasks["up"].rows.tensors
        errors[name] = float((module(x.double()).squeeze(1) - y.double()).abs().mean())
        assert float(table.loc[name, "score"]) == pytest.approx(errors[name], rel=1e-5)
    ratio = float(table.loc["merged", "normalized (fraction of the finetune's)"])
    assert ratio == pytest.approx(errors["finetuned"] / errors["merged"], rel=1e-5)
    assert ratio < 0.95, "the case shows nothing"
