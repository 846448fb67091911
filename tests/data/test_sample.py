"""A part of the validation sets: the same samples each time, classes in proportion, or a clear refusal."""

from collections import Counter
from collections.abc import Iterator

import lightning as L
import pytest
import torch
from helpers.tiny import KINDS, Vectors, save_texts, save_tiny_bert
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_drm import MultiTaskDataModule
from lightning_drm.data import SampledData, TextTask, require_validation_sets


class WithValidation(Vectors):
    """Vectors with a validation set whose loader is given."""

    def __init__(self, loader: object) -> None:
        super().__init__(0)
        self.loader = loader

    def val_dataloader(self) -> object:
        return self.loader


class Stream(IterableDataset):
    """Samples that come without numbers."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def numbers(count: int = 50) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(count)), batch_size=8)


def seen(loader: DataLoader) -> list[int]:
    return [int(x) for batch in loader for x in batch[0]]


@pytest.fixture(scope="module")
def text_task(tmp_path_factory) -> TextTask:
    folder = tmp_path_factory.mktemp("texts")
    data = save_texts(folder / "color.csv", KINDS["color"], 0, count=600)
    task = TextTask(data, save_tiny_bert(folder / "base"), batch_size=7)
    task.prepare_data()
    return task


def test_classes_keep_their_shares_and_samples_are_the_same_each_time(text_task):
    whole = Counter(int(label) for batch in text_task.val_dataloader() for label in batch["labels"])
    (loader,) = SampledData({"color": text_task}, 20).val_dataloader()
    batches = list(loader)
    part = Counter(int(label) for batch in batches for label in batch["labels"])
    assert part.total() == 20
    assert [len(batch["labels"]) for batch in batches] == [7, 7, 6]
    for label, count in whole.items():
        assert abs(part[label] - 20 * count / whole.total()) < 1
    (again,) = SampledData({"color": text_task}, 20).val_dataloader()
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    (others,) = SampledData({"color": text_task}, 20, seed=1).val_dataloader()
    assert any(
        one["input_ids"].shape != other["input_ids"].shape or not torch.equal(one["input_ids"], other["input_ids"])
        for one, other in zip(batches, others, strict=True)
    )


def test_a_users_own_data_are_sampled_too():
    data = SampledData({"a": WithValidation(numbers()), "b": WithValidation(numbers(5))}, 12)
    first, second = data.val_dataloader()
    assert len(set(seen(first))) == 12
    assert seen(first) == sorted(seen(first))
    assert seen(second) == [0, 1, 2, 3, 4]
    (alone,) = data.of_tasks(["a"]).val_dataloader()
    assert seen(alone) == seen(first)


def test_what_has_no_numbered_samples_is_refused_by_name():
    data = SampledData({"a": WithValidation(DataLoader(Stream()))}, 3)
    with pytest.raises(ValueError, match=r"Task 'a' has a validation loader .* set the number of samples to null"):
        data.val_dataloader()
    with pytest.raises(ValueError, match="at least one sample for each task, got 0"):
        SampledData({"a": WithValidation(numbers())}, 0)


def test_tasks_without_a_validation_set_are_named():
    data = MultiTaskDataModule({"a": Vectors(0), "b": WithValidation(numbers()), "c": L.LightningDataModule()})
    with pytest.raises(ValueError, match="a, c: the data have no val_dataloader"):
        require_validation_sets(data)
    require_validation_sets(data.of_tasks(["b"]))
