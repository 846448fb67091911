"""What every task made from a `datasets` table has in common: reading, splitting, encoding, batching."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from lightning import LightningDataModule
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_drm.data.loading import DataFiles, load_splits, pick_splits
from lightning_drm.data.sharing import taking_turns
from lightning_drm.data.splits import complete, limit
from lightning_drm.kinds import LABELS, Classification, Kind, MetricChoice, TaskMetrics, check_choice, make_metrics
from lightning_drm.pretrained import resolve_pretrained

Batch = dict[str, torch.Tensor]
Encoder = Callable[[dict[str, list[Any]]], dict[str, Any]]


class DatasetTask(LightningDataModule, ABC):
    """A task read with `datasets`. Its subclasses, such as `TextTask`, say how a row becomes model inputs.

    Splits that are missing are held out from the training split: seeded, every class keeping its share.

    Args:
        dataset: a hub name, a local folder or file, or a builder of `datasets` together with `data_files`.
        pretrained: whose tokenizer or image processor to use: a hub name, a local folder, or `package:<name>/<folder>`.
        config: the configuration of a hub data set that has several.
        revision: the version of a hub data set: a commit, a tag or a branch; the newest one if left out.
        pretrained_revision: the same of `pretrained`.
        data_files: files by split, or those of a single split, for the builders `csv`, `json`, `parquet` and
            `imagefolder`.
        kind: what is predicted: `Classification` (the default), `MultiLabel` or `Regression`, or a `Kind` of your own.
        metric: what is measured: a class of torchmetrics, or several; what the kind of task usually has if left out.
            Sizes such as `num_classes` are filled in from the data.
        score: which of the results is the task's score; the first one if left out.
        higher_is_better: the score's direction; the metric's own if left out.
        label_column: the column with what is predicted, as the kind of task expects it.
        group_column: rows with the same value here are never divided between splits.
        train_split: name of the training split.
        validation_split: name of the validation split; `auto`: `validation` if there is one; null: hold one out.
        test_split: name of the test split; `auto`: `test` if there is one; null: hold one out.
        validation_fraction: how much of the training split to hold out where there is no validation split.
        test_fraction: how much of the training split to hold out where there is no test split.
        max_train_samples: use at most so many training samples, classes in proportion.
        max_eval_samples: use at most so many samples for validation, and for test.
        cache: keep encoded samples on disk, so that only the first run encodes them. Without it, samples are encoded
            whenever they are needed: images of 224 × 224 pixels take 0.6 MB each in the cache.
        batch_size: samples per training batch and process.
        eval_batch_size: samples per validation or test batch and process; as in training if left out.
        num_workers: processes that load batches.
        seed: decides what is held out, what a limit leaves out, and the order of training samples.
        trust_remote_code: run Python code that comes with `pretrained`; it can do anything that you can.

    """

    def __init__(
        self,
        dataset: str,
        pretrained: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        pretrained_revision: str | None = None,
        data_files: DataFiles | None = None,
        kind: Kind | None = None,
        metric: MetricChoice | None = None,
        score: str | None = None,
        higher_is_better: bool | None = None,
        label_column: str = "label",
        group_column: str | None = None,
        train_split: str = "train",
        validation_split: str | None = "auto",
        test_split: str | None = "auto",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        max_train_samples: int | None = None,
        max_eval_samples: int | None = None,
        cache: bool = True,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        for name, fraction in {"validation_fraction": validation_fraction, "test_fraction": test_fraction}.items():
            if not 0 < fraction < 0.5:
                raise ValueError(f"Expected {name} between 0 and 0.5, got {fraction}.")
        self.dataset = dataset
        self.pretrained = pretrained
        self.config = config
        self.revision = revision
        self.pretrained_revision = pretrained_revision
        self.data_files = data_files
        self.kind = Classification() if kind is None else copy.copy(kind)  # it learns the labels' names
        check_choice(metric)
        self.metric: MetricChoice | Metric | MetricCollection | None = metric
        self.score = score
        self.higher_is_better = higher_is_better
        self.label_column = label_column
        self.group_column = group_column
        self.split_names = (train_split, validation_split, test_split)
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.max_train_samples = max_train_samples
        self.max_eval_samples = max_eval_samples
        self.cache = cache
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.trust_remote_code = trust_remote_code

    @property
    @abstractmethod
    def input_columns(self) -> Sequence[str]:
        """The columns that the encoder reads."""

    @property
    @abstractmethod
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        """Makes a batch from encoded samples."""

    @property
    @abstractmethod
    def encoder(self) -> Encoder:
        """Turns rows into model inputs, and into `labels` where the column with what is predicted is to be encoded."""

    @abstractmethod
    def check(self, table: Dataset) -> None:
        """Raise `ValueError` for input columns that the encoder cannot read."""

    def load(self) -> DatasetDict:
        """Read train and, where there are any, validation and test."""
        return pick_splits(load_splits(self.dataset, self.config, self.data_files, self.revision), *self.split_names)

    @cached_property
    def rows(self) -> DatasetDict:
        """Train, validation and test before encoding: the columns as found, and `labels`."""
        splits = self.load()
        for name, table in splits.items():
            group = [self.group_column] if self.group_column and name == "train" else []
            self._require_columns(name, table, [*self.input_columns, self.label_column, *group])
            self.check(table)
        splits = complete(
            self.kind.encode(splits, self.label_column),
            validation_fraction=self.validation_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
            group_column=self.group_column,
            strata=self.kind.strata,
        )
        self.kind.check(splits, self.dataset)
        sizes = {"train": self.max_train_samples}
        return DatasetDict(
            {
                name: limit(table, sizes.get(name, self.max_eval_samples), seed=self.seed, strata=self.kind.strata)
                for name, table in splits.items()
            }
        )

    @cached_property
    def splits(self) -> DatasetDict:
        """Train, validation and test, ready for the model."""
        return DatasetDict({name: self._encode(table) for name, table in self.rows.items()})

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of their numbers.

        Raises:
            AttributeError: For a kind of task without classes.
        """
        if (names := self.kind.classes(self.rows)) is None:
            raise AttributeError(f"{type(self.kind).__name__} tasks have no classes.")
        return names

    @property
    def num_classes(self) -> int:
        """How many outputs the task's head has: classes, or labels, or 1 for a single number."""
        return self.kind.num_outputs(self.rows)

    def metrics(self) -> TaskMetrics:
        """What is measured, afresh.

        Raises:
            ValueError: If a metric cannot be made, or none has the score.
        """
        num_outputs = self.num_classes
        if self.metric is None:
            made = self.kind.metrics(num_outputs)
        else:
            made = make_metrics(self.metric, self.kind.sizes(num_outputs))
        return TaskMetrics(made, self.score, self.higher_is_better)

    @override
    def prepare_data(self) -> None:
        """Download, read and encode once on every node; `datasets` caches all of it."""
        self.splits  # noqa: B018

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` cached. Calling it again costs nothing."""
        self.splits  # noqa: B018

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches in an order that depends on the seed, and not on the number of processes that share them."""
        generator = torch.Generator().manual_seed(self.seed)
        order = taking_turns(RandomSampler(self.splits["train"], generator=generator), self.trainer)
        return self._loader(self.splits["train"], self.batch_size, sampler=order, generator=generator)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, in order."""
        return self._eval_loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches, in order."""
        return self._eval_loader("test")

    def _encode(self, table: Dataset) -> Dataset:
        table = table.select_columns([*self.input_columns, LABELS])
        if not self.cache:
            return table.with_transform(partial(_encode_with_labels, self.encoder))
        encoded = table.map(
            self.encoder,
            batched=True,
            batch_size=256,
            remove_columns=list(self.input_columns),
            desc=f"Encoding {self.dataset}",
        )
        return encoded.with_format("numpy")

    def _eval_loader(self, split: str) -> DataLoader[Batch]:
        return self._loader(self.splits[split], self.eval_batch_size)

    def _loader(self, samples: Any, batch_size: int, **options: Any) -> DataLoader[Batch]:
        return DataLoader(
            samples,
            batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            **options,
        )

    def _require_columns(self, split: str, table: Dataset, columns: Sequence[str]) -> None:
        for column in columns:
            if column not in table.column_names:
                found = ", ".join(table.column_names)
                raise ValueError(
                    f"Expected a column {column!r} in {self.dataset!r}, but its split {split!r} has {found}."
                )

    @property
    def _resolved(self) -> dict[str, Any]:
        """What of `pretrained` to load, as arguments of every `from_pretrained`."""
        return {
            "pretrained_model_name_or_path": resolve_pretrained(self.pretrained, self.pretrained_revision),
            "trust_remote_code": self.trust_remote_code,
            **({"revision": self.pretrained_revision} if self.pretrained_revision is not None else {}),
        }


def _encode_with_labels(encoder: Encoder, rows: dict[str, list[Any]]) -> dict[str, Any]:
    return {LABELS: rows[LABELS], **encoder(rows)}  # an encoder may lay labels out anew, such as those of tokens
