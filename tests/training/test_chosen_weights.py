"""Which weights of a fit are merged: the last step's, the best checkpoint's, or averaged ones; and who is refused."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import Average, DRMMergeCallback

DECAY = 0.8


class Normed(VectorTask):
    """Has running statistics, and a validation loss that is best after the second of four epochs."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        self.backbone.append(nn.BatchNorm1d(5))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", [3.0, 1.0, 2.0, 4.0][self.current_epoch])


class Validated(Vectors):
    def val_dataloader(self) -> DataLoader:
        return self.test_dataloader()


class Steps(Callback):
    """Notes all weights after each step, in float64."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.states.append({name: t.detach().double().clone() for name, t in pl_module.state_dict().items()})


class Never(EMAWeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return False


def fit(merge: DRMMergeCallback, callbacks: list[Callback], first: bool = False, **arguments: Any) -> Normed:
    L.seed_everything(0, verbose=False)
    module = Normed()
    callbacks = [merge, *callbacks] if first else [*callbacks, merge]
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {"max_epochs": 4, "enable_checkpointing": checkpoints, "callbacks": callbacks, **arguments}
    quiet_trainer(**settings).fit(module, Validated(0))
    return module


def collected(merge: DRMMergeCallback, name: str) -> Tensor:
    """A tensor of the collected task in float64: the base and its delta, or the head's."""
    (vector,) = merge.task_vectors.values()
    if name in vector.head:
        return vector.head[name].double()
    return Normed().state_dict()[name].double() + vector.deltas[name].double()


def floating(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def assert_collected(merge: DRMMergeCallback, expected: dict[str, Tensor]) -> None:
    assert len(floating(expected)) == 12, "weights, biases and statistics of the backbone, and the head"
    for name, tensor in floating(expected).items():
        torch.testing.assert_close(collected(merge, name), tensor.double(), rtol=0, atol=1e-6)


def apart(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    telling = ("backbone.0.weight", "backbone.4.running_mean", "head.weight")
    return all(float((state[name].double() - other[name].double()).abs().max()) > 1e-3 for name in telling)


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("averaging", [lambda: EMAWeightAveraging(decay=DECAY), WeightAveraging], ids=["ema", "swa"])
def test_the_last_steps_weights_are_the_last_steps_beside_averaging(averaging: Any, first: bool):
    merge, steps = DRMMergeCallback(["a"], Average()), Steps()
    module = fit(merge, [averaging(), steps], first)
    assert apart(module.state_dict(), steps.states[-1]), "the case shows nothing"
    assert_collected(merge, steps.states[-1])


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_averaged_weights_are_the_exponential_average(first: bool):
    merge, steps = DRMMergeCallback(["a"], Average(), weights="averaged"), Steps()
    fit(merge, [EMAWeightAveraging(decay=DECAY), steps], first)
    average = steps.states[0]
    for state in steps.states[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * state[name] for name in average}
    assert apart(average, steps.states[-1]), "the case shows nothing"
    assert_collected(merge, average)


def test_averaged_weights_are_the_mean():
    merge, steps = DRMMergeCallback(["a"], Average(), weights="averaged"), Steps()
    fit(merge, [WeightAveraging(), steps])
    assert_collected(merge, {n: sum(s[n] for s in steps.states) / len(steps.states) for n in steps.states[0]})


@pytest.mark.parametrize("saving", [{}, {"save_weights_only": True}, {"save_top_k": -1, "save_last": True}], ids=str)
def test_the_best_checkpoints_weights_are_those_in_its_file(tmp_path: Path, saving: dict[str, Any]):
    merge, steps = DRMMergeCallback(["a"], Average(), weights="best"), Steps()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", **saving)
    module = fit(merge, [checkpoint, steps])
    assert Path(checkpoint.best_model_path).name == "epoch=1-step=8.ckpt"
    assert apart(steps.states[7], steps.states[-1]), "the case shows nothing"
    assert_collected(merge, steps.states[7])
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.double(), steps.states[-1][name]), "the module keeps the last step's"


def test_the_best_checkpoint_of_averaged_weights_holds_the_average(tmp_path: Path):
    merge = DRMMergeCallback(["a"], Average(), weights="best")
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    fit(merge, [EMAWeightAveraging(decay=DECAY), checkpoint])
    stored = torch.load(checkpoint.best_model_path, weights_only=True)
    assert apart(stored["state_dict"], stored["current_model_state"])
    assert_collected(merge, stored["state_dict"])


@pytest.mark.parametrize("weights", ["last", "best", "averaged"])
def test_checkpoints_and_the_module_are_those_of_a_fit_without_merging(tmp_path: Path, weights: Any):
    def callbacks(folder: str) -> list[Callback]:
        own = EMAWeightAveraging(decay=DECAY)
        # The second one saves nothing before on_train_end.
        late = ModelCheckpoint(tmp_path / folder / "late", every_n_epochs=9, save_last=True)
        return [own, ModelCheckpoint(tmp_path / folder, monitor="val_loss", save_top_k=-1), late]

    ours = fit(DRMMergeCallback(["a"], Average(), weights=weights), callbacks("ours"))
    L.seed_everything(0, verbose=False)
    theirs = Normed()
    quiet_trainer(max_epochs=4, callbacks=callbacks("plain"), enable_checkpointing=True).fit(theirs, Validated(0))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.ckpt"))
    assert len(files) == 5
    for file in files:
        states = [torch.load(tmp_path / folder / file, weights_only=True) for folder in ("ours", "plain")]
        for kind in ("state_dict", "current_model_state"):
            assert all(torch.equal(states[0][kind][name], tensor) for name, tensor in states[1][kind].items())


class InPieces(TorchCheckpointIO):
    """Leaves a file that is cut short."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        Path(path).write_bytes(Path(path).read_bytes()[:-1000])


def monitoring(**arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(**{"monitor": "val_loss", **arguments})


BEFORE: dict[str, tuple[str, Any, str]] = {
    "no checkpoints": ("best", lambda: [], "has no ModelCheckpoint with a monitor"),
    "no monitor": ("best", lambda: [ModelCheckpoint()], "has no ModelCheckpoint with a monitor"),
    "two monitors": ("best", lambda: [monitoring(), monitoring(monitor="loss")], r"that monitor \(val_loss, loss\)"),
    "nothing kept": ("best", lambda: [monitoring(save_top_k=0)], "save_top_k=0"),
    "no averaging": ("averaged", lambda: [], "has no WeightAveraging or EMAWeightAveraging callback"),
    "two averages": ("averaged", lambda: [EMAWeightAveraging(), Never()], r"\(EMAWeightAveraging, Never\): keep one"),
    "old averaging": ("averaged", lambda: [StochasticWeightAveraging(0.1)], "take WeightAveraging in its place"),
    "old averages": ("last", lambda: [StochasticWeightAveraging(0.1)], "take WeightAveraging with weights 'averaged'"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_a_fit_without_the_chosen_weights_is_refused_before_it_begins(tmp_path: Path, case: str):
    weights, callbacks, message = BEFORE[case]
    steps = Steps()
    with pytest.raises(ValueError, match=f"Task 'a' is to be merged with weights '{weights}', but .*{message}"):
        fit(DRMMergeCallback(["a"], weights=weights), [*callbacks(), steps], default_root_dir=tmp_path)
    assert not steps.states


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"plugins": [AsyncCheckpointIO()]}, "AsyncCheckpointIO may still be"), ({"fast_dev_run": True}, "fast_dev_run")],
)
def test_checkpoints_that_cannot_be_read_in_time_are_refused_before(tmp_path: Path, arguments: Any, message: str):
    with pytest.raises(ValueError, match=message):
        fit(DRMMergeCallback(["a"], weights="best"), [monitoring(dirpath=tmp_path)], **arguments)


def test_a_checkpoint_callback_of_another_fit_is_refused(tmp_path: Path):
    """Its best may be another task's, where this one's is never better."""
    merge, checkpoint = DRMMergeCallback(["a", "b"], weights="best"), monitoring(dirpath=tmp_path)
    fit(merge.for_task("a"), [checkpoint])
    with pytest.raises(ValueError, match=r"its ModelCheckpoint holds another fit's best, .*\.ckpt: give each fit"):
        fit(merge.for_task("b"), [checkpoint])
    assert merge.missing == ["b"]


AFTER: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "never updated": ("averaged", lambda _: Never(), {}, "Never has averaged nothing"),
    "never logged": ("best", lambda path: monitoring(dirpath=path, every_n_epochs=9), {}, "saved none by 'val_loss'"),
    "cut short": ("best", lambda path: monitoring(dirpath=path), {"plugins": [InPieces()]}, "cannot be read"),
}


@pytest.mark.parametrize("case", AFTER)
def test_weights_that_are_not_there_in_the_end_are_refused(tmp_path: Path, case: str):
    weights, callback, arguments, message = AFTER[case]
    merge = DRMMergeCallback(["a"], weights=weights)
    with pytest.raises(ValueError, match=f"Task 'a' is to be merged with weights '{weights}', but .*{message}"):
        fit(merge, [callback(tmp_path)], **arguments)
    assert merge.missing == ["a"]


class Deleting(Callback):
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Path(trainer.checkpoint_callback.best_model_path).unlink()


def test_a_best_checkpoint_that_is_gone_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"epoch=1-step=8\.ckpt, which ModelCheckpoint calls the best, is no file"):
        fit(DRMMergeCallback(["a"], weights="best"), [Deleting(), monitoring(dirpath=tmp_path)])


def test_a_checkpoint_without_frozen_weights_is_enough_and_without_others_is_refused(tmp_path: Path):
    class Partial(Callback):
        def __init__(self, left_out: str) -> None:
            self.left_out = left_out

        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            pl_module.backbone[0].weight.requires_grad_(False)

        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
            del checkpoint["state_dict"][self.left_out]

    merge, steps = DRMMergeCallback(["a"], Average(), weights="best"), Steps()
    fit(merge, [Partial("backbone.0.weight"), monitoring(dirpath=tmp_path / "frozen"), steps])
    assert "backbone.0.weight" not in merge.task_vectors["a"].deltas
    torch.testing.assert_close(collected(merge, "head.weight"), steps.states[7]["head.weight"], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"is not of this module: head\.bias missing or of another shape"):
        fit(DRMMergeCallback(["a"], weights="best"), [Partial("head.bias"), monitoring(dirpath=tmp_path / "trained")])


def test_an_average_of_frozen_weights_is_no_change():
    class Frozen(Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            pl_module.backbone[0].requires_grad_(False)

    merge = DRMMergeCallback(["a"], Average(), weights="averaged")
    averaging = EMAWeightAveraging(decay=DECAY)
    module = fit(merge, [Frozen(), averaging])
    assert not torch.equal(module.backbone[0].weight, Normed().backbone[0].weight), (
        "rounding, or the case shows nothing"
    )
    assert "backbone.0.weight" not in merge.task_vectors["a"].deltas
    assert torch.equal(merge.merged_module.task_module("a").backbone[0].weight, Normed().backbone[0].weight)
    torch.testing.assert_close(collected(merge, "head.weight"), module.head.weight.double(), rtol=0, atol=1e-6)


def test_tied_weights_come_back(tmp_path: Path):
    class Tied(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.backbone.extend([nn.Linear(5, 5), nn.Linear(5, 5)])
            self.backbone[-1].weight = self.backbone[-2].weight

    L.seed_everything(0, verbose=False)
    module, merge, steps = Tied(), DRMMergeCallback(["a"], Average(), weights="best"), Steps()
    callbacks = [merge, steps, monitoring(dirpath=tmp_path)]
    base = module.backbone[-1].weight.detach().double().clone()
    quiet_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True).fit(module, Validated(0))
    assert torch.equal(module.backbone[-1].weight.double(), steps.states[-1]["backbone.6.weight"])
    delta = merge.task_vectors["a"].deltas["backbone.5.weight"].double()
    torch.testing.assert_close(base + delta, steps.states[7]["backbone.6.weight"], rtol=0, atol=1e-6)


def test_a_fit_that_goes_on_from_its_end_has_the_chosen_weights_too(tmp_path: Path):
    """Nothing is left to train there, so that Lightning calls on_fit_end alone."""
    steps = Steps()
    checkpoint = monitoring(dirpath=tmp_path, save_last=True, save_top_k=-1)
    fit(DRMMergeCallback(["a"]), [EMAWeightAveraging(decay=DECAY), checkpoint, steps])
    for weights, expected in (("averaged", "epoch=3-step=16"), ("best", "epoch=1-step=8")):
        merge = DRMMergeCallback(["a"], Average(), weights=weights)
        resumed = [EMAWeightAveraging(decay=DECAY), monitoring(dirpath=tmp_path, save_last=True, save_top_k=-1), merge]
        trainer = quiet_trainer(max_epochs=4, callbacks=resumed, enable_checkpointing=True)
        trainer.fit(Normed(), Validated(0), ckpt_path=tmp_path / "epoch=3-step=16.ckpt", weights_only=True)
        assert_collected(merge, torch.load(tmp_path / f"{expected}.ckpt", weights_only=True)["state_dict"])
    trainer = quiet_trainer(max_epochs=4, callbacks=[EMAWeightAveraging(), DRMMergeCallback(["a"])])
    with pytest.raises(ValueError, match="which may hold averaged weights in place of the last step's"):
        trainer.fit(Normed(), Validated(0), ckpt_path=tmp_path / "epoch=3-step=16.ckpt", weights_only=True)


def test_tasks_of_other_weights_are_not_mixed(tmp_path: Path):
    fit(DRMMergeCallback(["a", "b"], dirpath=tmp_path).for_task("a"), [])
    merge = DRMMergeCallback(["a", "b"], dirpath=tmp_path, weights="averaged")
    with pytest.raises(ValueError, match=r"Task 'b' .* weights 'averaged', but others .* other weights: a \('last'\)"):
        fit(merge.for_task("b"), [EMAWeightAveraging()])
    fit(DRMMergeCallback(["a", "b"], dirpath=tmp_path, weights="averaged").for_task("a"), [EMAWeightAveraging()])
    fit(DRMMergeCallback(["a", "b"], dirpath=tmp_path, weights="averaged").for_task("b"), [EMAWeightAveraging()])
    assert (tmp_path / "merged").is_dir()


def test_there_are_three_choices():
    with pytest.raises(ValueError, match="weights must be last, best or averaged, got 'first'"):
        DRMMergeCallback(["a"], weights="first")
