"""Image classification tasks."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset, Image
from transformers import AutoImageProcessor, BaseImageProcessor, DefaultDataCollator
from typing_extensions import override

from lightning_drm.data.labels import LABELS
from lightning_drm.data.task import DatasetTask


class ImageTask(DatasetTask):
    """Classifies images. Batches are dicts of `pixel_values` and `labels`.

    Args:
        dataset: a hub name, a local folder with one folder of images per class, a local file, or a builder of
            `datasets` together with `data_files`.
        pretrained: whose image processor to use: a hub name, a local folder, or `package:<name>/<folder>`.
        image_column: the column with the image.
        cache: keep processed images on disk: fast, but 0.6 MB for each image of 224 × 224 pixels. Off, they are
            processed again every time that they are needed.
        **kwargs: see `DatasetTask`.

    Example::

        ImageTask("photos/", "google/vit-base-patch16-224-in21k")

    """

    def __init__(
        self, dataset: str, pretrained: str, image_column: str = "image", cache: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(dataset, pretrained, **kwargs)
        self.save_hyperparameters()
        self.image_column = image_column
        self.cache = cache

    @cached_property
    def processor(self) -> BaseImageProcessor:
        """The image processor of `pretrained`, on PIL and numpy: the other backend needs torchvision."""
        return AutoImageProcessor.from_pretrained(self._resolved(), backend="pil")

    @property
    @override
    def input_columns(self) -> Sequence[str]:
        return [self.image_column]

    @property
    @override
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        return DefaultDataCollator()

    @override
    def encode(self, table: Dataset) -> Dataset:
        table = table.select_columns([self.image_column, LABELS]).cast_column(self.image_column, Image(mode="RGB"))
        if not self.cache:
            return table.with_transform(self._process)
        processed = table.map(self._process, batched=True, batch_size=64, remove_columns=[self.image_column])
        return processed.with_format("numpy")

    def _process(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = self.processor(rows[self.image_column], return_tensors="np")
        return {**pixels, LABELS: rows[LABELS]}
