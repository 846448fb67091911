"""What coefficients are learned by: each task's own loss, or the entropy of classes; and what has neither."""

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.tiny import VectorTask
from lightning_drm.kinds import Choice, Classification, Kind, Language, MultiLabel, Regression, Tokens
from lightning_drm.tuning import loss_of, problem_of

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1])


class OfKind(nn.Module):
    """Gives what a test says, as a module of some kind of task."""

    def __init__(self, kind: Kind | None, logits: Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.logits = logits

    def classify(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits, batch


def entropy_by_hand(logits: Tensor) -> float:
    exponentials = np.exp(logits.double().numpy())
    p = exponentials / exponentials.sum(-1, keepdims=True)
    return float(np.mean([-sum(q * np.log(q) for q in row) for row in p.reshape(-1, p.shape[-1])]))


class Steps(VectorTask):
    """Its training_step gives what a test says."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def training_step(self, batch: Any) -> Any:
        self.log("anything", 3.0)
        return self.found


@pytest.mark.parametrize("found", [torch.tensor(2.5), {"loss": torch.tensor(2.5), "other": 1}])
def test_the_loss_on_labels_is_that_of_the_modules_own_step(found: Any):
    assert float(loss_of("labels")(Steps(found), (X, Y), 0, None)) == 2.5


def test_a_step_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="Expected a loss from the training_step of Steps, got NoneType"):
        loss_of("labels")(Steps(None), (X, Y), 0, None)


@pytest.mark.parametrize(
    ("module", "logits", "target", "counted"),
    [
        (Classification(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), slice(None)),
        (Choice(), torch.randn(8, 1), torch.tensor([0, 1]), "choices"),
        (Tokens(), torch.randn(2, 3, 4), torch.tensor([[-100, 1, 2], [0, -100, -100]]), "tokens"),
        (None, torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), slice(None)),
    ],
)
def test_the_entropy_is_that_of_all_classes_that_count(module: Kind, logits: Tensor, target: Tensor, counted: Any):
    task = OfKind(module, logits)
    expected = logits.reshape(2, 4) if counted == "choices" else logits
    expected = logits[target != -100] if counted == "tokens" else expected
    assert problem_of(task, target, "entropy") is None
    found = loss_of("entropy")(task, target, 0, None)
    assert float(found) == pytest.approx(entropy_by_hand(expected), abs=1e-6)


def test_no_label_is_looked_at():
    logits = torch.randn(2, 3, 4)
    target = torch.tensor([[-100, 1, 2], [0, -100, -100]])
    others = torch.where(target == -100, target, 3)
    found = [float(loss_of("entropy")(OfKind(Tokens(), logits), labels, 0, None)) for labels in (target, others)]
    assert found[0] == found[1]


class ByItself(VectorTask):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Untrained(L.LightningModule):
    pass


@pytest.mark.parametrize(
    ("module", "batch", "objective", "message"),
    [
        (OfKind(Regression(), torch.zeros(2, 1)), torch.zeros(2), "entropy", "no class logits: its kind is Regression"),
        (OfKind(MultiLabel(), torch.zeros(2, 3)), torch.zeros(2, 3), "entropy", "its kind is MultiLabel"),
        (OfKind(Language(), torch.zeros(2, 3, 9)), torch.zeros(2, 3), "entropy", "its kind is Language"),
        (
            OfKind(None, torch.zeros(2, 1)),
            torch.zeros(2),
            "entropy",
            r"its outputs are \(2, 1\), its targets .*float32",
        ),
        (OfKind(None, torch.zeros(2, 3)), torch.zeros(2), "entropy", r"its targets torch.float32 \(2,\)"),
        (Untrained(), {"x": X}, "entropy", r"Untrained has no classify\(batch\)"),
        (Untrained(), (X, Y), "labels", "no loss to learn from: Untrained has no training_step"),
        (ByItself(), (X, Y), "labels", "the training_step of ByItself optimizes by itself"),
    ],
)
def test_what_has_no_such_loss_is_told(module: nn.Module, batch: Any, objective: str, message: str):
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem_of(module, batch, objective))


@pytest.mark.parametrize("objective", ["labels", "entropy"])
def test_a_users_own_module_has_both(objective: str):
    module = VectorTask()
    assert problem_of(module, (X, Y), objective) is None
    logits = module(X).detach()
    expected = entropy_by_hand(logits) if objective == "entropy" else float(nn.functional.cross_entropy(logits, Y))
    assert float(loss_of(objective)(module, (X, Y), 0, None)) == pytest.approx(expected, abs=1e-6)
