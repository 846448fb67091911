"""Tasks of texts that are predicted token by token."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_drm.data.task import Encoder
from lightning_drm.data.tokenized import PadRight, TokenizedTask, pad_token
from lightning_drm.kinds import IGNORE_INDEX, LABELS, Language


class LanguageTask(TokenizedTask):
    """Predicts texts token by token, with a causal language model such as Llama.

    Batches are dicts of `input_ids`, `attention_mask` and `labels`, padded on the right. Labels are the input's tokens,
    and -100 for prompts and padding, which neither the loss nor the scores count.

    Args:
        dataset: a hub name, a local folder or file, or a builder of `datasets` together with `data_files`.
        pretrained: whose tokenizer to use: a hub name, a local folder, or `package:<name>/<folder>`.
        text_column: the column with the text that is predicted.
        prompt_column: a column with what stands before it and is not predicted. It is tokenized on its own, so that its
            tokens do not depend on the text.
        max_length: cut prompt and text together to so many tokens; the tokenizer's own limit if left out.
        append_eos: end each text with the tokenizer's end token, which is predicted too.
        **kwargs: see `DatasetTask`.

    Example::

        LanguageTask("answers.csv", "meta-llama/Llama-3.2-1B", text_column="answer", prompt_column="question")

    """

    def __init__(
        self,
        dataset: str,
        pretrained: str,
        text_column: str = "text",
        prompt_column: str | None = None,
        max_length: int | None = None,
        append_eos: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, pretrained, kind=Language(), label_column=text_column, **kwargs)
        self.save_hyperparameters()
        if prompt_column == text_column:
            raise ValueError(f"Expected different columns for prompts and texts, got {text_column!r} for both.")
        self.prompt_column = prompt_column
        self.max_length = max_length
        self.append_eos = append_eos

    @property
    @override
    def input_columns(self) -> Sequence[str]:
        return [self.prompt_column] if self.prompt_column is not None else []

    @property
    @override
    def collate(self) -> Callable[[list[dict[str, Any]]], Any]:
        return PadRight(pad_token(self.tokenizer))

    @cached_property
    @override
    def encoder(self) -> Encoder:
        if self.append_eos and self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"Expected a tokenizer with an end token for append_eos, but that of {self.pretrained!r} has none: set "
                "append_eos to false."
            )
        return _Tokenize(self.tokenizer, self.prompt_column, self.max_length, self.append_eos)


class _Tokenize:
    """Turns rows into tokens. `datasets` finds results in its cache by its hash: it holds no more."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_column: str | None, max_length: int | None, append_eos: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt_column = prompt_column
        self.max_length = max_length
        self.append_eos = append_eos
        self.tokenizer(["a"])  # the first call changes the tokenizer's state, and so its hash

    def __call__(self, rows: dict[str, list[str]]) -> dict[str, Any]:
        texts = rows[LABELS]
        prompts = rows[self.prompt_column] if self.prompt_column is not None else [""] * len(texts)
        begun = self.tokenizer(prompts)["input_ids"]  # also with the token that starts a text, where there is one
        written = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        limit = self.max_length or self.tokenizer.model_max_length
        samples = [self._sample(*parts, limit) for parts in zip(begun, written, texts, strict=True)]
        return {name: [sample[name] for sample in samples] for name in samples[0]} if samples else {}

    def _sample(self, begun: list[int], written: list[int], text: str, limit: int) -> dict[str, list[int]]:
        end = self.tokenizer.eos_token_id
        if begun and begun[-1] == end and len(begun) > 1:  # some tokenizers end whatever they get
            begun = begun[:-1]
        written = [*written, end] if self.append_eos else written
        ids, labels = [*begun, *written][:limit], [*[IGNORE_INDEX] * len(begun), *written][:limit]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise ValueError(
                f"Expected a token to predict in every row, but the text {text[:40]!r} has none among the first "
                f"{limit} tokens of its row: leave such rows out, or raise max_length."
            )
        return {"input_ids": ids, "attention_mask": [1] * len(ids), LABELS: labels}
