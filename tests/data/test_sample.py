"""A part of the validation sets: the same samples each time, classes in proportion, or a clear refusal."""

from collections import Counter
from collections.abc import Iterator

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from helpers.tiny import KINDS, Vectors, save_texts, save_tiny_bert
from lightning_drm import MultiTaskDataModule
from lightning_drm.data import SampledData, TextTask, halves, require_validation_sets


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


def test_halves_share_no_sample_and_keep_the_shares_of_classes(text_task):
    data = MultiTaskDataModule({"color": text_task})
    whole = Counter(int(label) for batch in text_task.val_dataloader() for label in batch["labels"])
    first, second = halves(data, None, batch_size=16, seed=3)["color"]
    assert not set(first.dataset.indices) & set(second.dataset.indices)
    assert sorted([*first.dataset.indices, *second.dataset.indices]) == list(range(whole.total()))
    for loader in (first, second):
        part = Counter(int(label) for batch in loader for label in batch["labels"])
        assert all(abs(part[label] - count / 2) <= 1 for label, count in whole.items())
        assert len(next(iter(loader))["labels"]) == 16


def test_halves_of_a_sample_are_those_of_the_sampled_data_and_depend_on_the_seed():
    data = MultiTaskDataModule({"a": WithValidation(numbers())})
    (sampled,) = SampledData(data.tasks, 13).val_dataloader()
    first, second = halves(data, 13, batch_size=4, seed=0)["a"]
    assert sorted([*seen(first), *seen(second)]) == seen(sampled)
    assert (len(seen(first)), len(seen(second))) == (6, 7)
    assert seen(second) == sorted(seen(second)), "what judges is in order"
    again = halves(data, 13, batch_size=4, seed=0)["a"][0]
    orders = [seen(again) for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert set(map(tuple, map(sorted, orders))) == {tuple(sorted(seen(first)))}
    assert orders == [seen(loader) for loader in [halves(data, 13, batch_size=4, seed=0)["a"][0]] for _ in range(3)]
    assert set(seen(halves(data, 13, batch_size=4, seed=1)["a"][0])) != set(seen(first))


def test_what_cannot_be_halved_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Task 'a' has a validation loader .*: give it a DataLoader whose data set"):
        halves(MultiTaskDataModule({"a": WithValidation(DataLoader(Stream()))}), None, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="Task 'a': expected two validation samples or more, got 1"):
        halves(MultiTaskDataModule({"a": WithValidation(numbers(1))}), None, batch_size=2, seed=0)
