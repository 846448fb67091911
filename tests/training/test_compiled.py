"""Modules that `torch.compile` was given: names, files and merged model are those without it, whoever restores them."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertModel

from helpers.tiny import KINDS, QUIET, Vectors, VectorTask, quiet_trainer, save_texts, save_tiny_bert
from helpers.vectors_run import ValidatedTask, VectorsRun
from lightning_drm import (
    DRM,
    Average,
    DRMMergeCallback,
    MergeSession,
    MergeTrainer,
    MultiTaskDataModule,
    RegMean,
    TransformerTask,
    load_merged,
)
from lightning_drm.data import TextTask

Compile = Callable[[L.LightningModule], L.LightningModule]


def compiled(module: nn.Module, backend: str = "eager") -> nn.Module:
    return torch.compile(module, backend=backend)


def submodule(module: L.LightningModule) -> L.LightningModule:
    module.backbone = compiled(module.backbone)
    return module


def layers(module: L.LightningModule) -> L.LightningModule:
    for name in ("0", "3"):
        setattr(module.backbone, name, compiled(getattr(module.backbone, name)))
    module.head = compiled(module.head)
    return module


def in_place(module: L.LightningModule) -> L.LightningModule:
    module.backbone.compile(backend="eager")
    return module


def method(module: L.LightningModule) -> L.LightningModule:
    module.forward = torch.compile(module.forward, backend="eager")
    return module


WAYS: dict[str, Compile] = {
    "submodule": submodule,
    "layers": layers,
    "in_place": in_place,
    "method": method,
    "whole": compiled,
    "aot": lambda module: compiled(module, "aot_eager"),
}


def fitted(folder: Path, compile_: Compile, lora: bool = False, **options: object) -> DRMMergeCallback:
    """Both tasks' fits by the callback, with statistics."""
    merge = DRMMergeCallback(["one", "two"], RegMean(), folder, statistics=["gram", "fisher"], **options)
    for seed, task in enumerate(merge.tasks):
        L.seed_everything(seed)
        module = ValidatedTask(lr=0.3)
        if lora:
            adapters = LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights="gaussian")
            inject_adapter_in_model(adapters, module.backbone)
        quiet_trainer(callbacks=[merge.for_task(task)]).fit(compile_(module), Vectors(seed))
    return merge


def files_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_same_files(ours: Path, theirs: Path, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    ours_found, theirs_found = files_of(ours), files_of(theirs)
    assert ours_found.keys() == theirs_found.keys()
    assert {p.name for p in ours.rglob("*")} == {p.name for p in theirs.rglob("*")}
    for file, tensors in theirs_found.items():
        assert ours_found[file].keys() == tensors.keys(), file
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours_found[file][name], tensor, rtol=rtol, atol=atol, msg=f"{file} {name}")


@pytest.mark.parametrize(("way", "lora"), [*((way, False) for way in WAYS), ("layers", True), ("aot", True)])
def test_a_run_is_that_of_the_plain_module(way: str, lora: bool, tmp_path: Path):
    plain = fitted(tmp_path / "plain", lambda module: module, lora)
    other = fitted(tmp_path / "other", WAYS[way], lora)
    assert_same_files(tmp_path / "other", tmp_path / "plain")
    ours, theirs = other.merged_module, plain.merged_module
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = Vectors(0).test.tensors[0]
    with torch.no_grad():
        before = ours.task_module("one")(x)
        torch.testing.assert_close(before, theirs.task_module("one")(x), rtol=1e-5, atol=1e-6)
        ours.task_module("one").head.weight.zero_()
        ours.task_module("one").head.bias.zero_()
        assert not ours.task_module("one")(x).any(), "it computes with its own weights"


@pytest.mark.parametrize("fitted_as", ["plain", "compiled"])
def test_either_restores_what_the_other_has_stored(fitted_as: str, tmp_path: Path):
    compile_ = {"plain": lambda module: module, "compiled": submodule}
    done = fitted(tmp_path, compile_.pop(fitted_as))
    (restored_as,) = compile_.values()
    session = MergeSession(done.tasks, RegMean(), tmp_path)
    session.note_base(restored_as(ValidatedTask()))
    assert session.restore() == done.tasks
    merged = session.fuse(module=restored_as(ValidatedTask()))
    for name, tensor in done.merged_module.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor)
    loaded = load_merged(tmp_path / "merged", "two", restored_as(ValidatedTask()))
    x = Vectors(1).test.tensors[0]
    assert torch.equal(loaded(x), merged.task_module("two")(x))


@pytest.mark.parametrize("whole", [False, True], ids=["submodule", "whole"])
def test_a_loop_written_by_hand(whole: bool):
    session, plain = (MergeSession(["one"], Average()) for _ in range(2))
    L.seed_everything(0)
    unwrapped = ValidatedTask()
    wrapped = compiled(copy.deepcopy(unwrapped)) if whole else submodule(copy.deepcopy(unwrapped))
    for own, module in ((session, wrapped), (plain, unwrapped)):
        own.note_base(module, "one")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        for x, y in zip(*(tensor.split(16) for tensor in Vectors(0).train.tensors), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
        own.collect(module, "one")
    ours, theirs = (own.task_vectors["one"] for own in (session, plain))
    assert ours.base_hashes == theirs.base_hashes
    assert list(ours.deltas) == list(theirs.deltas)
    finetuned = session.finetuned(compiled(ValidatedTask()), "one").task_module("one")
    for name, delta in theirs.deltas.items():
        torch.testing.assert_close(ours.deltas[name], delta, rtol=1e-5, atol=1e-7)
        expected = ValidatedTask().get_parameter(name) + delta
        torch.testing.assert_close(finetuned.get_parameter(name), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", ["best", "averaged"])
def test_chosen_weights_of_a_compiled_submodule(weights: str, tmp_path: Path):
    """Checkpoints and averages have the names of the compiled module."""
    found = []
    for compile_ in (lambda module: module, submodule):
        place = tmp_path / str(len(found))
        chosen = {
            "best": lambda place=place: L.pytorch.callbacks.ModelCheckpoint(place, monitor="train_loss"),
            "averaged": lambda: L.pytorch.callbacks.EMAWeightAveraging(decay=0.5),
        }
        merge = DRMMergeCallback(["one"], Average(), weights=weights)
        L.seed_everything(0)
        options = {"enable_checkpointing": weights == "best"}
        trainer = quiet_trainer(callbacks=[merge, chosen[weights]()], **options)
        trainer.fit(compile_(LogsLoss()), Vectors(0))
        found.append(merge.task_vectors["one"].deltas)
    assert found[0].keys() == found[1].keys()
    for name, delta in found[0].items():
        torch.testing.assert_close(found[1][name], delta, rtol=1e-5, atol=1e-7)


class LogsLoss(VectorTask):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss


class CompilesLater(ValidatedTask):
    """Compiles where Lightning advises it."""

    def configure_model(self) -> None:
        self.backbone.compile(backend="eager")


def run_of(folder: Path, template: Callable[[], L.LightningModule]) -> VectorsRun:
    run = VectorsRun(folder)
    L.seed_everything(0)
    run.trainer(DRM(), snapshots=[3]).fit(template(), datamodule=run.data)
    return run


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> VectorsRun:
    return run_of(tmp_path_factory.mktemp("plain"), ValidatedTask)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["submodule", "whole", "configure_model"])
def test_all_of_a_merge_trainers_run(way: str, plain_run: VectorsRun, tmp_path: Path):
    templates = {
        "submodule": lambda: submodule(ValidatedTask()),
        "whole": lambda: compiled(ValidatedTask()),
        "configure_model": CompilesLater,
    }
    run = run_of(tmp_path / "run", templates[way])
    assert_same_files(run.folder, plain_run.folder)
    ours, theirs = (one.report()["scores"] for one in (run, plain_run))
    assert ours == theirs
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("deltas.safetensors")}
    other = CompilesLater if way == "configure_model" else ValidatedTask
    run.trainer(DRM()).fit(other(), datamodule=run.data)  # everything is done
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is trained again"
    run.trainer(DRM()).test(templates[way](), datamodule=run.data)
    assert run.report()["scores"] == theirs


@pytest.mark.parametrize(
    ("way", "named"), [("in_place", "backbone"), ("method", "forward")], ids=["in_place", "method"]
)
def test_what_copies_would_lose_is_refused_before_training(way: str, named: str, tmp_path: Path):
    run = VectorsRun(tmp_path)
    with pytest.raises(ValueError, match=rf"ValidatedTask has compiled {named} in place, which is lost in the copies"):
        run.trainer(DRM()).fit(WAYS[way](ValidatedTask()), datamodule=run.data)
    assert not any(tmp_path.rglob("deltas.safetensors"))


class EncoderCompiled(TransformerTask):
    """As a user does it: once the model is there."""

    def configure_for(self, data: L.LightningDataModule) -> None:
        super().configure_for(data)
        self.model.encoder = compiled(self.model.encoder)


class ModelCompiled(TransformerTask):
    def configure_for(self, data: L.LightningDataModule) -> None:
        super().configure_for(data)
        self.model = compiled(self.model)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A tiny BERT, and a file of texts for each task."""
    folder = tmp_path_factory.mktemp("texts")
    base = save_tiny_bert(folder / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return base, {name: save_texts(folder / f"{name}.csv", words, 0) for name, words in KINDS.items()}


def fitted_to_texts(kind: type[TransformerTask], lora: bool, texts: tuple[str, dict[str, str]], folder: Path) -> Path:
    base, files = texts
    data = MultiTaskDataModule({name: TextTask(file, base, batch_size=16) for name, file in files.items()})
    merge = DRMMergeCallback(data.task_names, DRM(), folder, statistics=["gram"])
    trainer = MergeTrainer(callbacks=[merge], max_steps=6, limit_val_batches=0, **QUIET)
    L.seed_everything(0)
    adapters = LoraConfig(r=2, target_modules=["query", "dense"]) if lora else None
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    trainer.fit(kind(base, pooling="mean", lora=adapters, optimizer=optimizer), datamodule=data)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def plain_texts_run(request: pytest.FixtureRequest, texts, tmp_path_factory) -> tuple[bool, Path]:
    """Whether it is LoRA, and the folder of a run that compiles nothing."""
    return request.param, fitted_to_texts(TransformerTask, request.param, texts, tmp_path_factory.mktemp("run"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EncoderCompiled, ModelCompiled])
def test_a_transformers_model(kind: type[TransformerTask], plain_texts_run: tuple[bool, Path], texts, tmp_path: Path):
    lora, plain = plain_texts_run
    fitted_to_texts(kind, lora, texts, tmp_path)
    assert_same_files(tmp_path, plain, rtol=1e-4, atol=1e-6)
    ours, theirs = (BertModel.from_pretrained(folder / "merged").state_dict() for folder in (tmp_path, plain))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)
