"""Batch norms of merged models in whole runs: estimated on the tasks' training data, stored, and measured again."""

import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.tiny import quiet_trainer
from lightning_drm import (
    DRM,
    Average,
    DRMMergeCallback,
    MergeSession,
    MergeTrainer,
    MultiTaskDataModule,
    TaskArithmetic,
)

CLASSES = {"one": 2, "two": 3}


class SmallCNN(L.LightningModule):
    head_names = ("head",)

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
            self.head = nn.Linear(6 * 16, 3)
        self.frozen = frozen

    def configure_task(self, num_classes: int) -> None:
        self.head = nn.Linear(6 * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen:
            self.features[1].eval()
        return self.head(self.features(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Images(L.LightningDataModule):
    """Images of another brightness and contrast for each task, in the same order always."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.num_classes = CLASSES[task]
        generator = torch.Generator().manual_seed(self.num_classes)
        x = torch.randn(510, 1, 6, 6, generator=generator)
        y = (x.flatten(1) @ torch.randn(36, self.num_classes, generator=generator)).argmax(1)
        x = x * self.num_classes - 2 * self.num_classes
        self.train, self.test = TensorDataset(x[:310], y[:310]), TensorDataset(x[310:], y[310:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=20)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=16)


class Scaled(Images):
    """Its training batches are made on the device, as augmentations are."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is not None
        return [batch[0] * 2 if not self.trainer.training else batch[0], batch[1]]


def tasks(kind: type[Images] = Images) -> MultiTaskDataModule:
    return MultiTaskDataModule({task: kind(task) for task in CLASSES})


def trainer(folder: Path, method: Any = None, **options: Any) -> MergeTrainer:
    merge = DRMMergeCallback(list(CLASSES), method or Average(), folder, **options)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return MergeTrainer(callbacks=[merge], accelerator="cpu", max_epochs=4, enable_model_summary=False, **settings)


def fit(folder: Path, module: SmallCNN | None = None, data: MultiTaskDataModule | None = None, **options: Any) -> None:
    trainer(folder, **options).fit(module or SmallCNN(), datamodule=data or tasks(), base_batches=0)


def report(folder: Path) -> dict[str, float]:
    return json.loads((folder / "report.json").read_text())["accuracy"]["merged"]


def by_hand(folder: Path, data: Images, num_batches: int | None = None) -> dict[str, Tensor]:
    """Mean and unbiased variance of what the merged convolution makes of the training batches, in float64."""
    model = load_file(folder / "merged/model.safetensors")
    weight, bias = (model[f"features.0.{name}"].double() for name in ("weight", "bias"))
    outputs = [nn.functional.conv2d(x.double(), weight, bias) for x, _ in list(data.train_dataloader())[:num_batches]]
    return {
        "features.1.running_mean": torch.stack([x.mean((0, 2, 3)) for x in outputs]).mean(0),
        "features.1.running_var": torch.stack([x.var((0, 2, 3)) for x in outputs]).mean(0),
    }


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), theirs[name].double(), rtol=1e-5, atol=1e-6)


def accuracy(folder: Path, task: str) -> float:
    """Of the files of a merged model, put together by hand in float64."""
    model = load_file(folder / "merged/model.safetensors")
    model |= load_file(folder / f"merged/heads/{task}.safetensors")
    model |= load_file(folder / f"merged/batch_norm/{task}.safetensors")
    m = {name: tensor.double() for name, tensor in model.items()}
    x, y = Images(task).test.tensors
    hidden = nn.functional.conv2d(x.double(), m["features.0.weight"], m["features.0.bias"])
    statistics = (m["features.1.running_mean"], m["features.1.running_var"])
    hidden = nn.functional.batch_norm(hidden, *statistics, m["features.1.weight"], m["features.1.bias"])
    logits = hidden.relu().flatten(1) @ m["head.weight"].T + m["head.bias"]
    return float((logits.argmax(1) == y).double().mean())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norms")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "(?s).*(num_workers|log_every_n_steps|logging interval|val_dataloader)")
        fit(folder)
    return folder


def test_statistics_of_a_run_are_those_of_each_tasks_training_batches(run: Path):
    expected = {task: by_hand(run, Images(task)) for task in CLASSES}
    for task in CLASSES:
        close(load_file(run / f"merged/batch_norm/{task}.safetensors"), expected[task])
    means, variances = (
        torch.stack([expected[task][f"features.1.running_{name}"] for task in CLASSES]) for name in ("mean", "var")
    )
    model = load_file(run / "merged/model.safetensors")
    both = {name: model[name] for name in expected["one"]}
    mixture = {"features.1.running_mean": means.mean(0)}
    close(both, {**mixture, "features.1.running_var": variances.mean(0) + means.var(0, correction=0)})
    assert "`batch_norm/<task>.safetensors`" in (run / "merged/README.md").read_text()


def test_scores_of_fit_merge_and_test_are_those_of_the_stored_files(run: Path):
    expected = {task: pytest.approx(accuracy(run, task)) for task in CLASSES}
    first = report(run)
    assert {task: first[task] for task in CLASSES} == expected
    files = {path: path.read_bytes() for path in (run / "merged").rglob("*.safetensors")}
    trainer(run).merge(SmallCNN(), datamodule=tasks())
    assert report(run) == first
    assert {path: path.read_bytes() for path in (run / "merged").rglob("*.safetensors")} == files
    trainer(run).test(SmallCNN(), datamodule=tasks())
    assert report(run) == first


def test_without_batches_statistics_are_merged_like_other_buffers(tmp_path: Path):
    fit(tmp_path, batch_norm_batches=0)
    assert not (tmp_path / "merged/batch_norm").exists()
    deltas = [load_file(tmp_path / f"tasks/{task}/deltas.safetensors")["features.1.running_mean"] for task in CLASSES]
    mean = load_file(tmp_path / "merged/model.safetensors")["features.1.running_mean"]
    torch.testing.assert_close(mean, sum(deltas) / 2, rtol=0, atol=1e-6)  # the base's is 0


def test_estimating_is_worth_it(run: Path, tmp_path: Path):
    """A sum of deltas adds up statistics that were to be averaged."""
    averages = {}
    for number in (0, 100):
        again = trainer(tmp_path / str(number), TaskArithmetic(1.0), batch_norm_batches=number)
        again.fit(SmallCNN(), datamodule=tasks(), base_batches=0)
        averages[number] = report(tmp_path / str(number))["average"]
    assert averages[100] > averages[0] + 0.05


def test_fewer_batches_than_there_are(tmp_path: Path):
    fit(tmp_path, batch_norm_batches=2)
    for task in CLASSES:
        expected = by_hand(tmp_path, Images(task), 2)
        close(load_file(tmp_path / f"merged/batch_norm/{task}.safetensors"), expected)


def test_batches_are_those_of_the_datas_own_hooks(tmp_path: Path):
    fit(tmp_path, data=tasks(Scaled))
    stored = load_file(tmp_path / "merged/batch_norm/one.safetensors")
    expected = by_hand(tmp_path, Images("one"))
    model = load_file(tmp_path / "merged/model.safetensors")
    shifted = expected["features.1.running_mean"] * 2 - model["features.0.bias"].double()
    torch.testing.assert_close(stored["features.1.running_mean"], shifted, rtol=1e-5, atol=1e-5)
    first = stored
    trainer(tmp_path).merge(SmallCNN(), datamodule=tasks(Scaled))
    close(load_file(tmp_path / "merged/batch_norm/one.safetensors"), first)


def test_another_number_is_noticed_by_test_and_merged_anew(run: Path):
    with pytest.raises(ValueError, match=r"not merged as the configuration says \(batch_norm_batches: 100 → 3\): run"):
        trainer(run, batch_norm_batches=3).test(SmallCNN(), datamodule=tasks())


def test_a_file_that_is_gone_is_named(tmp_path: Path):
    fit(tmp_path)
    (tmp_path / "merged/batch_norm/two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks batch_norm/two\.safetensors; merge again"):
        trainer(tmp_path).test(SmallCNN(), datamodule=tasks())


def test_a_merge_of_before_is_measured_as_it_is(tmp_path: Path):
    fit(tmp_path, batch_norm_batches=0)
    first = report(tmp_path)
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert record.pop("batch_norm") == {"batches": 0, "tasks": []}
    (tmp_path / "merged/merge.json").write_text(json.dumps(record))
    trainer(tmp_path).test(SmallCNN(), datamodule=tasks())
    assert report(tmp_path) == first


def test_statistics_that_training_kept_fixed_stay_the_bases(tmp_path: Path):
    fit(tmp_path, SmallCNN(frozen=True))
    assert not (tmp_path / "merged/batch_norm").exists()
    assert "batch_norm" not in json.loads((tmp_path / "merged/merge.json").read_text())
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")["features.1.running_var"], torch.ones(6))


def test_a_sum_of_variances_may_be_negative_and_is_not_used(tmp_path: Path):
    merge = trainer(tmp_path, TaskArithmetic(-3.0))
    merge.fit(SmallCNN(), datamodule=tasks(), base_batches=0)
    assert load_file(tmp_path / "merged/model.safetensors")["features.1.running_var"].min() > 0
    for task in CLASSES:
        close(load_file(tmp_path / f"merged/batch_norm/{task}.safetensors"), by_hand(tmp_path, Images(task)))


def fit_one(merge: DRMMergeCallback, task: str, data: Any = None) -> None:
    L.seed_everything(0, verbose=False)
    module = SmallCNN()
    module.configure_task(CLASSES[task])
    images = Images(task)
    given = {"datamodule": images} if data is None else {"train_dataloaders": images.train_dataloader()}
    quiet_trainer(callbacks=[merge.for_task(task)]).fit(module, **given)


@pytest.mark.parametrize("given", [None, "loader"])
def test_the_callback_has_the_data_of_its_fits(tmp_path: Path, given: str | None):
    merge = DRMMergeCallback(list(CLASSES), DRM(density=0.5), tmp_path, convolutions="matrix")
    state = torch.get_rng_state()
    for task in CLASSES:
        fit_one(merge, task, given)
    assert not torch.equal(torch.get_rng_state(), state)
    for task in CLASSES:
        module = merge.merged_module.task_module(task)
        expected = by_hand(tmp_path, Images(task))
        close({name: b for name, b in module.named_buffers() if "running" in name}, expected)
        close(load_file(tmp_path / f"merged/batch_norm/{task}.safetensors"), expected)


def test_tasks_whose_data_are_elsewhere_are_named(tmp_path: Path):
    fit_one(DRMMergeCallback(list(CLASSES), Average(), tmp_path), "one")
    merge = DRMMergeCallback(list(CLASSES), Average(), tmp_path)
    with pytest.warns(UserWarning, match="No training data of one are at hand here, so their batch norms"):
        fit_one(merge, "two")
    assert [path.stem for path in (tmp_path / "merged/batch_norm").iterdir()] == ["two"]
    merge.merged_module.reestimate_batch_norm({"one": Images("one").train_dataloader()})
    found = dict(merge.merged_module.task_module("one").named_buffers())
    expected = by_hand(tmp_path, Images("one"))
    close({name: found[name] for name in expected}, expected)


def test_a_session_takes_batches_too(tmp_path: Path):
    session = MergeSession(list(CLASSES), Average(), tmp_path)
    for task in CLASSES:
        module = SmallCNN()
        module.configure_task(CLASSES[task])
        session.note_base(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for batch in Images(task).train_dataloader():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
        session.collect(module, task)
    plain = session.fuse()
    mean = {task: plain.task_module(task).features[1].running_mean for task in CLASSES}
    assert mean["one"] is mean["two"]
    merged = session.fuse(batch_norm={task: Images(task).train_dataloader() for task in CLASSES})
    for task in CLASSES:
        expected = by_hand(tmp_path, Images(task))
        found = dict(merged.task_module(task).named_buffers())
        close({name: found[name] for name in expected}, expected)
    with pytest.raises(ValueError, match="There is no task 'three'"):
        session.fuse(batch_norm={"three": []})


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="batch_norm_batches must be 0 or more, got -1"):
        DRMMergeCallback(["a"], batch_norm_batches=-1)
