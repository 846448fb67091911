"""A merged model's task, loaded for predictions from its folder alone."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from helpers.loaded import assert_loads
from helpers.tiny import KINDS, Vectors, VectorTask, quiet_trainer, save_texts, save_tiny_bert
from lightning_drm import DRMMergeCallback, MultiTaskDataModule, TaskArithmetic, TransformerTask, load_merged
from lightning_drm.data import TextTask


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MultiTaskDataModule, DRMMergeCallback]:
    folder = tmp_path_factory.mktemp("run")
    base = save_tiny_bert(folder / "base")
    data = MultiTaskDataModule(
        {task: TextTask(save_texts(folder / f"{task}.csv", kinds, 0), base) for task, kinds in KINDS.items()}
    )
    merge = DRMMergeCallback(data.task_names, TaskArithmetic(), folder / "out")
    for task, own in data.tasks.items():
        L.seed_everything(0, verbose=False)
        module = TransformerTask(base, pooling="mean")
        own.setup("fit")
        module.configure_for(own)
        quiet_trainer(callbacks=[merge.for_task(task)], max_steps=3, limit_val_batches=0).fit(module, datamodule=own)
    shutil.rmtree(base)  # which is not needed any more
    return folder / "out" / "merged", data, merge


def test_the_folder_is_enough(run: tuple[Path, MultiTaskDataModule, DRMMergeCallback]):
    folder, data, merge = run
    assert_loads(folder, data, merge.merged_module)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = load_merged(str(folder), "color")(**tokenizer(["a red word", "green"], return_tensors="pt", padding=True))
    assert logits.shape == (2, len(KINDS["color"]))


def test_what_is_not_there(run: tuple[Path, MultiTaskDataModule, DRMMergeCallback], tmp_path: Path):
    folder = run[0]
    with pytest.raises(FileNotFoundError, match=r"no merged model of task 'sound'; it has color, pet\.$"):
        load_merged(folder, "sound")
    with pytest.raises(FileNotFoundError, match="it has no heads at all"):
        load_merged(tmp_path, "color")
    with pytest.raises(ValueError, match="There is no file or folder"):
        load_merged(tmp_path / "nowhere", "color")


@pytest.mark.parametrize(
    "changed",
    ["{", "[]", "{}", '{"kind": {"Nothing": {}}}', '{"kind": {"make_metrics": {}}}', '{"kind": {"Kind": {}}}'],
)
def test_a_damaged_description(run: tuple[Path, MultiTaskDataModule, DRMMergeCallback], tmp_path: Path, changed: str):
    folder = shutil.copytree(run[0], tmp_path / "merged")
    file = folder / "heads" / "color.safetensors"
    save_file(load_file(file), file, {"task": "color", "module": changed})
    with pytest.raises(ValueError, match=r"color\.safetensors is damaged"):
        load_merged(folder, "color")


class Normed(VectorTask):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.append(nn.BatchNorm1d(5))


def test_a_module_of_ones_own(tmp_path: Path):
    """Also its batch norms, which have statistics of their own for each task."""
    merge = DRMMergeCallback(["one", "two"], TaskArithmetic(), tmp_path)
    for seed, task in enumerate(merge.tasks):
        quiet_trainer(callbacks=[merge.for_task(task)], max_steps=3).fit(Normed(), datamodule=Vectors(seed))
    with pytest.raises(ValueError, match=r"give load_merged one, as in load_merged\(folder, 'one', MyModule\(\)\)\.$"):
        load_merged(tmp_path / "merged", "one")
    given = Normed()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    rows = Vectors(0).test.tensors[0]
    for task in merge.tasks:
        loaded, expected = load_merged(tmp_path / "merged", task, given), merge.merged_module.task_module(task).eval()
        assert not torch.equal(loaded.backbone[-1].running_mean, before["backbone.4.running_mean"])
        with torch.no_grad():
            assert torch.equal(loaded(rows), expected(rows))
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items()), "it stays as it is"


class Mine(TransformerTask):
    pass


def test_a_subclass_of_ones_own_is_not_described(tmp_path: Path):
    """Its code is needed, which the card says, too."""
    base = save_tiny_bert(tmp_path / "base")
    task = TextTask(save_texts(tmp_path / "pet.csv", KINDS["pet"], 0), base)
    merge = DRMMergeCallback(["pet"], TaskArithmetic(), tmp_path / "out")
    fit = quiet_trainer(callbacks=[merge.for_task("pet")], max_steps=1, limit_val_batches=0)
    fit.fit(Mine(base, 2, pooling="mean"), datamodule=task)
    folder = tmp_path / "out" / "merged"
    assert "load_merged(folder_or_hub_name, 'pet', Mine(…))" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="give load_merged one"):
        load_merged(folder, "pet")
    loaded = load_merged(folder, "pet", Mine(base, 2, pooling="mean"))
    batch = next(iter(task.test_dataloader()))
    with torch.no_grad():
        assert torch.equal(loaded.classify(batch)[0], merge.merged_module.task_module("pet").eval().classify(batch)[0])


def test_a_stand_in_describes_no_task(tmp_path: Path):
    """A task that was only restored here has another one's module in the merged model."""
    base = save_tiny_bert(tmp_path / "base")
    task = TextTask(save_texts(tmp_path / "pet.csv", KINDS["pet"], 0), base)
    task.setup("fit")
    for name in ("color", "pet"):
        merge = DRMMergeCallback(["color", "pet"], TaskArithmetic(), tmp_path / "out")
        L.seed_everything(0, verbose=False)
        module = TransformerTask(base, pooling="mean")
        module.configure_for(task)
        fit = quiet_trainer(callbacks=[merge.for_task(name)], max_steps=1, limit_val_batches=0)
        fit.fit(module, datamodule=task)
    described = {}
    for name in ("color", "pet"):
        with safe_open(tmp_path / "out/merged/heads" / f"{name}.safetensors", framework="pt") as file:
            assert len(file.metadata()) == 1, "safetensors writes several entries in any order"
            described[name] = json.loads(file.metadata().get("module", "null"))
    assert described["color"] is None
    assert described["pet"]["class_names"] == sorted(KINDS["pet"])
