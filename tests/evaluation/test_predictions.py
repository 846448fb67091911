"""Predictions that are noted while a model is measured are those of a plain loop."""

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from helpers.tiny import Vectors, VectorTask
from lightning_drm import MultiTaskDataModule, MultiTaskModule
from lightning_drm.evaluation import Predictions, RecordPredictions, measure
from lightning_drm.kinds import Regression

ARGUMENTS = {"accelerator": "cpu"}


def noted(module: VectorTask, data: L.LightningDataModule) -> Predictions | None:
    recorder = RecordPredictions("a")
    measure(MultiTaskModule({"a": module}), MultiTaskDataModule({"a": data}), ARGUMENTS, [recorder], intervals=False)
    return recorder.predictions


def test_classes_are_those_of_a_plain_loop():
    module, data = VectorTask(3), Vectors(4, 3)
    found = noted(module, data)
    assert found is not None
    x, y = data.test.tensors
    module.eval()
    assert torch.equal(found.predicted, module(x).argmax(1))
    assert torch.equal(found.target, y)
    assert found.num_classes == 3


class Numbers(Vectors):
    """Targets that are no classes."""

    def test_dataloader(self) -> DataLoader:
        x, y = self.test.tensors
        return DataLoader(TensorDataset(x, y.float()), batch_size=16)


class Rating(VectorTask):
    """Judged by a metric of its own."""

    score = "error"

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("error", (self(batch[0])[:, 0] - batch[1]).abs().mean())


class OfAKind(VectorTask):
    """Says that it is not about classes, though its targets are whole numbers."""

    kind = Regression()


@pytest.mark.parametrize(("module", "data"), [(Rating(), Numbers(1)), (OfAKind(), Vectors(1))])
def test_other_tasks_have_none(module: VectorTask, data: L.LightningDataModule):
    assert noted(module, data) is None


def test_no_bar_is_shown_for_callbacks_that_are_none(capsys: pytest.CaptureFixture[str]):
    noted(VectorTask(), Vectors(1))
    assert "Testing" not in capsys.readouterr().out
