"""Image classification tasks."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset, Image
from transformers import AutoImageProcessor, BaseImageProcessor, DefaultDataCollator
from typing_extensions import override

from lightning_drm.data.task import DatasetTask, Encoder


class ImageTask(DatasetTask):
    """Classifies images. Batches are dicts of `pixel_values` and `labels`.

    Args:
        dataset: a hub name, a local folder with one folder of images per class, a local file, or a builder of
            `datasets` together with `data_files`.
        pretrained: whose image processor to use: a hub name, a local folder, or `package:<name>/<folder>`.
        image_column: the column with the image.
        **kwargs: see `DatasetTask`.

    Example::

        ImageTask("photos/", "google/vit-base-patch16-224-in21k")

    """

    def __init__(self, dataset: str, pretrained: str, image_column: str = "image", **kwargs: Any) -> None:
        super().__init__(dataset, pretrained, **kwargs)
        self.save_hyperparameters()
        self.image_column = image_column

    @cached_property
    def processor(self) -> BaseImageProcessor:
        """The image processor of `pretrained`, on PIL and numpy: the other backend needs torchvision."""
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(backend="pil", **self._resolved)
        return processor

    @property
    @override
    def input_columns(self) -> Sequence[str]:
        return [self.image_column]

    @property
    @override
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        return DefaultDataCollator()

    @cached_property
    @override
    def encoder(self) -> Encoder:
        return _Process(self.processor, self.image_column)

    @override
    def check(self, table: Dataset) -> None:
        kind = table.features[self.image_column]
        if type(kind) is not Image:
            raise ValueError(f"Expected images in column {self.image_column!r} of {self.dataset!r}, got {kind}.")


class _Process:
    """Turns rows into pixel values. `datasets` finds results in its cache by its hash: it holds no more."""

    def __init__(self, processor: BaseImageProcessor, column: str) -> None:
        self.processor = processor
        self.column = column

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[self.column]]
        return dict(self.processor(images, return_tensors="np"))
