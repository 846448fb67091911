"""How a task of any kind is measured in the merged module: by its own test_step, or by its logits."""

import math

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassF1Score

from helpers.tiny import quiet_trainer
from lightning_drm.data.sharing import Share
from lightning_drm.kinds import MetricInfo, TaskMetrics
from lightning_drm.modules import MultiTaskModule
from lightning_drm.modules.counted_samples import first_samples
from lightning_drm.modules.measurement import OF_DATA, Measurement, unmeasurable

X, Y = torch.arange(8.0).view(4, 2), torch.arange(4)


class Plain(L.LightningModule):
    """A small network without any test of its own."""

    head_names = ("head",)

    def __init__(self, num_outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class WithF1(Plain):
    score = "f1"

    def __init__(self) -> None:
        super().__init__()
        self.f1 = MulticlassF1Score(3, average="macro")

    def test_step(self, batch, batch_idx):
        self.f1(self(batch[0]), batch[1])
        self.log("test_f1", self.f1)
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


class Regressor(Plain):
    """Logs its own number at the end of the test set."""

    score = "rmse"
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__(1)
        self.mse = MeanSquaredError(squared=False)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        assert dataloader_idx == 0
        self.mse.update(self(batch[0])[:, 0], batch[1])

    def on_test_epoch_end(self):
        assert self.trainer.testing
        self.log_dict({"rmse": self.mse.compute()})
        self.mse.reset()


class WithAccuracy(Plain):
    """Logs accuracy its own way, and so is judged by that."""

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", torch.tensor(0.125))


class OtherName(Plain):
    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


def classes(num: int = 11) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(num, 4), torch.randint(0, 3, (num,)))


def numbers(num: int = 9) -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(num, 4), torch.randn(num))


def measured(modules: dict[str, nn.Module], *sets: TensorDataset, record: bool = False):
    merged = MultiTaskModule(modules)
    merged.record_samples = record
    trainer = quiet_trainer()
    for _ in range(2):  # a second test starts anew
        trainer.test(merged, [DataLoader(data, 4) for data in sets], verbose=False)
    return merged, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_every_task_is_judged_by_what_its_own_test_step_logs():
    data, values = classes(), numbers()
    modules = {"f": WithF1(), "r": Regressor(), "p": Plain(), "o": OtherName(), "a": WithAccuracy()}
    merged, logged = measured(modules, data, values, data, data, data)
    x, y = data.tensors
    guesses = modules["p"](x).argmax(1)
    accuracy = float((guesses == y).double().mean())
    per_class = []
    for label in range(3):
        hits = int(((guesses == label) & (y == label)).sum())
        wrong = int((guesses == label).sum() + (y == label).sum()) - 2 * hits
        per_class.append(2 * hits / (2 * hits + wrong) if hits + wrong else 0.0)
    with torch.no_grad():
        rmse = float((modules["r"](values.tensors[0])[:, 0].double() - values.tensors[1]).square().mean().sqrt())
        loss = float(nn.functional.cross_entropy(modules["f"](x).double(), y))
    assert logged == {
        "f1/f": pytest.approx(sum(per_class) / 3),
        "loss/f": pytest.approx(loss),
        "score/f": pytest.approx(sum(per_class) / 3),
        "rmse/r": pytest.approx(rmse),
        "score/r": pytest.approx(rmse),
        "accuracy/p": pytest.approx(accuracy),
        "score/p": pytest.approx(accuracy),
        "acc/o": pytest.approx(accuracy),
        "accuracy/o": pytest.approx(accuracy),
        "score/o": pytest.approx(accuracy),
        "accuracy/a": pytest.approx(0.125),
        "score/a": pytest.approx(0.125),
    }
    assert merged.metric_of("f") == MetricInfo("f1", higher_is_better=True, is_fraction=True)
    assert merged.metric_of("r") == MetricInfo("rmse", higher_is_better=False, is_fraction=False)
    assert merged.metric_of("a") == MetricInfo("accuracy", is_fraction=True)


def test_samples_are_recorded_where_a_metric_tells_them():
    data = classes()
    merged, logged = measured({"f": WithF1(), "p": Plain(), "o": WithAccuracy()}, data, data, data, record=True)
    for task in ("f", "p"):
        samples = merged.samples(task)
        assert samples is not None
        assert samples.results([range(11)])[0] == pytest.approx(logged[f"score/{task}"])
    assert merged.samples("o") is None, "batches log a number, which tells nothing of samples"


def test_a_metric_of_the_module_takes_its_logits():
    module = Plain()
    module.metric = MulticlassF1Score(3, average="macro")
    with_own, by_logits = measured({"f": WithF1()}, classes())[1], measured({"m": module}, classes())[1]
    assert by_logits["score/m"] == by_logits["f1_score/m"] == pytest.approx(with_own["score/f"])
    module = Plain(1)
    module.classify = lambda batch: (Plain.forward(module, batch[0])[:, 0], batch[1])
    module.metric = TaskMetrics({"mse": MeanSquaredError(), "rmse": MeanSquaredError(squared=False)}, "rmse")
    merged, logged = measured({"m": module}, numbers())
    assert logged["score/m"] == logged["rmse/m"] == pytest.approx(logged["mse/m"] ** 0.5)
    assert merged.metric_of("m").higher_is_better is False


class Silent(Plain):
    score = "f1"

    def test_step(self, batch, batch_idx):
        self.log("test_F1", torch.tensor(0.5))


class DividesNothing(Plain):
    """Sees a part of the set on each process, and logs what it found there."""

    score = "hits"

    def test_step(self, batch, batch_idx):
        pass

    def on_test_epoch_end(self):
        self.log("hits", 0.5)


class Language(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape, 7)


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (Silent(), classes(), "Task 't' is to be judged by 'f1', but its test_step logs F1"),
        (Plain(1), numbers(), r"Task 't' cannot be measured by accuracy.* gives \(4, 1\) and torch.float32 \(4,\)"),
        (
            Language(),
            TensorDataset(torch.randn(8, 4), torch.randint(0, 7, (8, 4))),
            r"Task 't' cannot be measured by accuracy.* \(4, 4, 7\) and torch.int64 \(4, 4\)\. Give Language a `score`",
        ),
    ],
)
def test_what_cannot_be_measured_is_named(module, data, message):
    with pytest.raises(ValueError, match=message):
        measured({"t": module}, data)


def test_a_test_set_without_samples_is_named():
    empty = TensorDataset(torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="Task 'e' cannot be measured: its test set has no batch"):
        measured({"p": Plain(), "e": Plain()}, classes(), empty)


def test_a_score_that_nothing_can_log_is_refused_by_the_class():
    module = Plain()
    assert unmeasurable(module) is None
    module.score = "f1"
    assert unmeasurable(module) == "Plain names 'f1' as its score, but has no test_step that could log it: define one."
    module.score = 3
    assert "as Plain.score, got 3" in str(unmeasurable(module))
    assert unmeasurable(WithF1()) is None


def test_numbers_that_differ_between_processes_are_refused():
    measurement = Measurement("t", DividesNothing())
    everywhere = {}
    measurement.start(record=False)
    measurement.measure((X, Y), 0, Share(4, 4, (0, 1)), everywhere.__setitem__, None)
    measurement.finish(everywhere.__setitem__, None, lambda number: number.expand(2))
    assert float(everywhere["score/t"]) == 0.5
    measurement.start(record=False)
    measurement.measure((X, Y), 0, Share(4, 4, (0, 1)), everywhere.__setitem__, None)
    with pytest.raises(ValueError, match="'hits' at the end of its test set as a number that differs between"):
        measurement.finish(everywhere.__setitem__, None, lambda number: torch.stack([number, number + 0.1]))


class Hooked(WithF1):
    """Every hook of a test is called, as if the task were alone."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def on_test_start(self):
        self.called.append("start")

    def on_test_epoch_start(self):
        self.called.append("epoch start")

    def on_test_batch_start(self, batch, batch_idx):
        self.called.append(f"batch {batch_idx} start")

    def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.called.append(f"batch {batch_idx} end")

    def on_test_epoch_end(self):
        self.called.append("epoch end")

    def on_test_end(self):
        self.called.append("end")


def test_the_hooks_of_a_test_are_called():
    module = Hooked()
    measured({"h": module}, classes(8))
    once = ["start", "epoch start", "batch 0 start", "batch 0 end", "batch 1 start", "batch 1 end", "epoch end", "end"]
    assert module.called == once * 2
    assert "log" not in vars(module)


@pytest.mark.parametrize(
    ("batch", "shortened"),
    [
        ((X, Y), (X[:3], Y[:3])),
        ([X, Y], [X[:3], Y[:3]]),
        ({"x": X, "y": Y, "scale": torch.tensor(2.0)}, {"x": X[:3], "y": Y[:3], "scale": torch.tensor(2.0)}),
        ((X, ["a", "b", "c", "d"]), (X[:3], ["a", "b", "c"])),
        ([{"boxes": torch.ones(7, 2)}] * 4, [{"boxes": torch.ones(7, 2)}] * 3),
        ({"x": X, "nested": {"y": [Y, Y]}}, {"x": X[:3], "nested": {"y": [Y[:3], Y[:3]]}}),
    ],
)
def test_batches_are_shortened(batch, shortened):
    result = first_samples(batch, Share(4, 3, (0, 1)))
    assert str(result) == str(shortened)


@pytest.mark.parametrize("batch", [{"patches": torch.ones(9, 3)}, object()])
def test_batches_of_unknown_form_are_not_shortened(batch):
    module = WithF1()
    with pytest.raises(ValueError, match="Task 't': the last batch repeats samples for other processes, and cannot be"):
        Measurement("t", module).measure(batch, 0, Share(4, 3, (0, 1)), print, None)


def test_a_batch_of_repeated_samples_counts_nowhere():
    module = WithF1()
    measurement = Measurement("t", module)
    measurement.start(record=True)
    logged = {}
    loader = DataLoader(classes(1), 4, sampler=DistributedSampler(classes(1), 2, 1, shuffle=False))
    share = Share.of(loader, 0)
    assert (share.size, share.new) == (1, 0)
    measurement.measure(next(iter(loader)), 0, share, logged.__setitem__, None)
    assert not module.f1.update_called
    assert logged["score/t"] is module.f1, "all processes must log the same names"
    assert not logged["loss/t"].update_called


class KeepsItsSums(Plain):
    """Logs its metric's number without resetting it, as a test that runs once may."""

    score = "mse"

    def __init__(self) -> None:
        super().__init__(1)
        self.mse = MeanSquaredError()

    def test_step(self, batch):
        self.mse.update(self(batch[0])[:, 0], batch[1])

    def on_test_epoch_end(self):
        self.log("test_mse", float(self.mse.compute()))


def test_what_earlier_tests_left_does_not_count():
    """`measured` tests twice; what came before is another set."""
    module, data = KeepsItsSums(), numbers()
    module.mse.update(torch.full((50,), 9.0), torch.zeros(50))
    _, logged = measured({"k": module}, data)
    with torch.no_grad():
        expected = (module(data.tensors[0])[:, 0].double() - data.tensors[1]).square().mean()
    assert logged["score/k"] == pytest.approx(float(expected))


def test_a_score_may_be_named_as_it_is_logged():
    module = KeepsItsSums()
    module.score = "test_mse"
    assert measured({"k": module}, numbers())[0].metric_of("k").name == "mse"


class LogsScore(WithF1):
    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.log("test_score", 0.5)


def test_the_name_of_all_scores_is_nobodys_metric():
    with pytest.raises(ValueError, match="Task 't' logs 'score', under which each task's score is logged"):
        measured({"t": LogsScore()}, classes())


class Diverged(Plain):
    score = "loss"

    def test_step(self, batch, batch_idx):
        self.log("loss", torch.tensor(float("nan") if batch_idx == 1 else 1.0))


def test_one_batch_that_is_no_number_makes_the_score_none():
    assert math.isnan(measured({"t": Diverged()}, classes())[1]["score/t"])


def test_metrics_of_the_data_go_before_what_the_module_logs():
    module = WithAccuracy()
    module.metric = nn.Identity()  # its own affair
    setattr(module, OF_DATA, TaskMetrics({"accuracy": MulticlassF1Score(3, average="macro")}))
    with_own = measured({"f": WithF1()}, classes())[1]["score/f"]
    assert measured({"t": module}, classes())[1]["score/t"] == pytest.approx(with_own)


class Scales(WithF1):
    """Its inputs are scaled on the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert dataloader_idx == 0
        return [100 * batch[0], batch[1]]


def test_the_modules_own_batch_hooks_are_called():
    data, module = classes(), Scales()
    _, logged = measured({"p": Plain(), "s": module}, data, data)
    scaled = TensorDataset(100 * data.tensors[0], data.tensors[1])
    assert logged["score/s"] == pytest.approx(measured({"f": WithF1()}, scaled)[1]["score/f"])
    assert logged["score/p"] == pytest.approx(measured({"p": Plain()}, data)[1]["score/p"])


def test_sums_of_half_precision_are_kept_in_double():
    module = KeepsItsSums().to(torch.bfloat16)
    measurement = Measurement("t", module)
    measurement.start(record=False)
    module.mse.update(torch.full((600,), 1.3), torch.zeros(600))
    assert float(module.mse.compute()) == pytest.approx(1.69, rel=1e-6)


def test_statistics_that_are_estimated_again_are_what_is_measured():
    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    torch.manual_seed(3)
    data = TensorDataset(5 * torch.randn(30, 4) + 3, torch.randint(0, 3, (30,)))
    merged = MultiTaskModule({"n": Normed()})
    merged.reestimate_batch_norm({"n": DataLoader(data, 10)})
    trainer = quiet_trainer()
    trainer.test(merged, DataLoader(data, 4), verbose=False)
    expected = (merged.task_module("n")(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
    assert float(trainer.callback_metrics["score/n"]) == pytest.approx(float(expected))
