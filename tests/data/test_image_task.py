import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from lightning_drm.data import ImageTask

COLORS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("processor")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def save_images(folder: Path, num_each: int, backwards: bool = False) -> str:
    """Noisy blue, green and red images, in modes and sizes that differ."""
    for position, color in list(enumerate(COLORS))[:: -1 if backwards else 1]:
        (folder / color).mkdir(parents=True)
        for number in range(num_each)[:: -1 if backwards else 1]:
            pixels = np.random.default_rng(number).integers(0, 60, (20 + number, 24, 3), dtype=np.uint8)
            pixels[..., 2 - position] += 150
            image = Image.fromarray(pixels).convert(("RGB", "RGBA", "P")[number % 3])
            image.save(folder / color / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_images(tmp_path_factory.mktemp("photos"), 20)


@pytest.mark.usefixtures("no_network")
def test_a_folder_of_images_becomes_batches_without_torchvision(photos, processor):
    task = ImageTask(photos, processor, batch_size=8)
    task.prepare_data()
    task.setup("fit")
    assert task.class_names == list(COLORS)
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 48, "validation": 6, "test": 6}
    assert "torchvision" not in sys.modules
    for batch in task.test_dataloader():
        assert batch.keys() == {"pixel_values", "labels"}
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["pixel_values"].shape[1:] == (3, 16, 16)
        brightest = batch["pixel_values"].mean((2, 3)).argmax(1)
        assert batch["labels"].tolist() == (2 - brightest).tolist()


def test_without_the_cache_batches_are_the_same(photos, processor):
    cached, fresh = (ImageTask(photos, processor, cache=cache).train_dataloader() for cache in (True, False))
    for expected, batch in zip(cached, fresh, strict=True):
        assert torch.equal(expected["pixel_values"], batch["pixel_values"])
        assert torch.equal(expected["labels"], batch["labels"])


def test_the_second_time_nothing_is_processed(photos, processor):
    first, second = (ImageTask(photos, processor).splits["test"].cache_files for _ in range(2))
    assert first == second
    assert first[0]["filename"].endswith(".arrow")


def test_splits_do_not_depend_on_the_order_of_files_in_a_folder(tmp_path, processor):
    tests = [
        [np.asarray(row["image"]).tolist() for row in ImageTask(folder, processor).rows["test"]]
        for folder in (save_images(tmp_path / "a", 20), save_images(tmp_path / "b", 20, backwards=True))
    ]
    assert tests[0] == tests[1]


def test_a_folder_per_split(tmp_path, processor):
    save_images(tmp_path / "train", 10)
    save_images(tmp_path / "test", 4)
    task = ImageTask(str(tmp_path), processor)
    assert {name: len(split) for name, split in task.rows.items()} == {"train": 27, "validation": 3, "test": 12}


def test_a_column_without_images_is_named(photos, processor):
    with pytest.raises(ValueError, match="Expected images in column 'label' of "):
        ImageTask(photos, processor, image_column="label").setup("fit")
