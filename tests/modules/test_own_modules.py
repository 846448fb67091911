"""Every task keeps its own module in the merged one: hyper-parameters, metrics, label maps, steps."""

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score

from helpers.tiny import quiet_trainer
from lightning_drm import DRMMergeCallback, TransformerTask
from lightning_drm.modules import MultiTaskModule
from lightning_drm.modules.reused_layers import reuse_layers

TAGS = {"three": ["O", "B", "I"], "five": ["NOUN", "VERB", "ADJ", "DET", "X"]}


class Tagger(L.LightningModule):
    """Tags every token of a sentence; its shapes, its metric and its predictions depend on the task's own tags."""

    head_names = ("head",)

    def __init__(self, tags: list[str], smoothing: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(20, 8)
            self.mix = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Tanh())
        self.head = nn.Linear(8, len(tags))
        self.f1 = MulticlassF1Score(len(tags), average="macro")

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids))).view(*ids.shape, len(self.hparams.tags))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, tags = batch
        scores = self(ids).view(-1, len(self.hparams.tags))
        return cross_entropy(scores, tags.flatten(), label_smoothing=self.hparams.smoothing)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        ids, tags = batch
        self.f1(self(ids).flatten(0, 1), tags.flatten())
        self.log("f1", self.f1)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> list[list[str]]:
        return [[self.hparams.tags[tag] for tag in row] for row in self(batch[0]).argmax(-1).tolist()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def sentences(task: str) -> DataLoader:
    generator = torch.Generator().manual_seed(len(task))
    ids = torch.randint(0, 20, (32, 7), generator=generator)
    return DataLoader(TensorDataset(ids, ids % len(TAGS[task])), batch_size=8)


@pytest.fixture(scope="module")
def trained() -> tuple[DRMMergeCallback, dict[str, Tagger]]:
    merge, modules = DRMMergeCallback(list(TAGS)), {}
    for index, (task, tags) in enumerate(TAGS.items()):
        modules[task] = Tagger(tags, smoothing=0.1 * index)
        quiet_trainer(callbacks=[merge.for_task(task)]).fit(modules[task], sentences(task))
    return merge, modules


def test_hyperparameters_metrics_and_heads_are_each_tasks_own(trained) -> None:
    merge, modules = trained
    for task, tags in TAGS.items():
        own = merge.merged_module.task_module(task)
        assert isinstance(own, Tagger)
        assert own.hparams.tags == tags
        assert own.hparams.smoothing == modules[task].hparams.smoothing
        assert own.f1.num_classes == len(tags)
        assert own.head.out_features == len(tags)
        assert torch.equal(own.head.weight, modules[task].head.weight)
    first, second = (merge.merged_module.task_module(task) for task in TAGS)
    assert first.f1 is not second.f1
    assert first.mix is second.mix, "layers that compute alike are one, so that they can be sharded"
    assert first.embed.weight is second.embed.weight


def test_predict_test_and_loss_work_as_their_author_wrote_them(trained) -> None:
    merge, _ = trained
    for task, tags in TAGS.items():
        own, loader = merge.merged_module.task_module(task), sentences(task)
        ids, targets = loader.dataset.tensors
        with torch.no_grad():
            scores = own.eval()(ids)
        assert scores.shape == (32, 7, len(tags))
        rows = [row for batch in quiet_trainer().predict(own, loader) for row in batch]
        assert rows == [[tags[tag] for tag in row] for row in scores.argmax(-1).tolist()]
        expected = MulticlassF1Score(len(tags), average="macro")(scores.flatten(0, 1), targets.flatten())
        (result,) = quiet_trainer().test(own, loader, verbose=False)
        assert result["f1"] == pytest.approx(float(expected))
        assert own.training_step([ids, targets], 0).isfinite()


class Scaled(nn.Module):
    """A layer with a setting that no tensor tells."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.linear(x)


class Outer(nn.Module):
    head_names = ()

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.scaled, self.same = Scaled(factor), Scaled(1.0)


def test_a_layer_with_other_settings_stays_its_own_around_the_same_tensors() -> None:
    modules = {"one": Outer(1.0), "two": Outer(2.0)}
    merged = MultiTaskModule.assemble(modules)
    one, two = merged.task_module("one"), merged.task_module("two")
    assert one.same is two.same
    assert one.scaled is not two.scaled
    assert (one.scaled.factor, two.scaled.factor) == (1.0, 2.0)
    assert one.scaled.linear is two.scaled.linear
    x = torch.randn(3, 2)
    torch.testing.assert_close(2 * one.scaled(x), two.scaled(x))


def test_metrics_and_layers_with_other_tables_are_not_made_one() -> None:
    class WithTable(nn.Module):
        def __init__(self, start: int) -> None:
            super().__init__()
            self.linear = shared
            self.register_buffer("table", torch.arange(start, start + 3), persistent=False)

    shared = nn.Linear(2, 2)
    first, second = nn.Module(), nn.Module()
    first.layer, second.layer, first.metric, second.metric = (
        WithTable(0), WithTable(1), MulticlassF1Score(3), MulticlassF1Score(3)
    )  # fmt: skip
    own_layer, own_metric = second.layer, second.metric
    reuse_layers(first, second)
    assert second.layer is own_layer
    assert second.metric is own_metric


def test_another_backbone_is_refused_by_name() -> None:
    other = Outer(1.0)
    other.more = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"Outer has another backbone than the first task: more\.weight"):
        MultiTaskModule.assemble({"one": Outer(1.0), "two": other})


def test_label_maps_of_transformers_stay(pretrained) -> None:
    modules = {}
    for task, num_classes in {"a": 2, "b": 5}.items():
        modules[task] = TransformerTask(pretrained("bert"), num_classes)
        modules[task].model.config.id2label = {index: f"{task}{index}" for index in range(num_classes)}
    merged = MultiTaskModule.assemble(modules)
    for task, num_classes in {"a": 2, "b": 5}.items():
        own = merged.task_module(task)
        assert own.hparams.num_classes == num_classes
        assert own.model.config.id2label == {index: f"{task}{index}" for index in range(num_classes)}
    assert merged.task_module("a").backbone.encoder is merged.task_module("b").backbone.encoder
