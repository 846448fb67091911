"""What is measured of texts and of their tokens. All states are sums, so that samples count alike in any batch.

torchmetrics' own `ROUGEScore` keeps a list entry per sample and gathers these one by one: processes that have tested
different numbers of samples would wait for each other for ever. Here only its function is used.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score
from typing_extensions import override


class _Fraction(Metric):
    """A share of what was counted, between 0 and 1; higher is better. The states are sums."""

    higher_is_better: bool | None = True
    is_differentiable: bool | None = False
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    num_right: Tensor
    num_all: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("num_right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_all", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def compute(self) -> Any:
        return self.num_right / self.num_all


class ExactMatch(_Fraction):
    """The share of texts that are the expected ones to the letter, white space around them aside.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["yes", "no "], ["yes", "no"])
        >>> metric.update(["Yes"], ["yes"])
        >>> metric.compute()
        tensor(0.6667)
    """

    @override
    def update(self, preds: Sequence[str], target: Sequence[str]) -> None:
        """Adds texts.

        Args:
            preds: Texts as they were written.
            target: Texts as they should be.
        """
        self.num_right += sum(ours.strip() == theirs.strip() for ours, theirs in zip(preds, target, strict=True))
        self.num_all += len(target)


class Rouge(Metric):
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004): mean F-measures of common words, pairs of words, and subsequences.

    Words are found as `torchmetrics.functional.text.rouge_score` finds them: in lower case, letters and digits only.

    Example:
        >>> metric = Rouge()
        >>> metric.update(["my name is John"], ["Is your name John"])
        >>> metric.compute()
        {'rouge1': tensor(0.7500), 'rouge2': tensor(0.), 'rougeL': tensor(0.5000)}
    """

    higher_is_better: bool | None = True
    is_differentiable: bool | None = False
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    keys: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL")  # rougeLsum would need nltk and its data
    num_texts: Tensor

    def __init__(self) -> None:
        super().__init__()
        for key in self.keys:
            self.add_state(f"{key}_sum", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_texts", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, preds: Sequence[str], target: Sequence[str]) -> None:
        """Adds texts.

        Args:
            preds: Texts as they were written.
            target: Texts as they should be.
        """
        if len(target) == 0:
            return
        means = rouge_score(list(preds), list(target), rouge_keys=self.keys)
        for key in self.keys:
            total = getattr(self, f"{key}_sum")
            setattr(self, f"{key}_sum", total + means[f"{key}_fmeasure"].to(total) * len(target))
        self.num_texts += len(target)

    @override
    def compute(self) -> dict[str, Tensor]:
        return {key: (getattr(self, f"{key}_sum") / self.num_texts).float() for key in self.keys}


class TokenAccuracy(_Fraction):
    """The share of tokens that a model finds the most likely ones.

    Args:
        ignore_index: The target that does not count.

    Example:
        >>> metric = TokenAccuracy()
        >>> scores = torch.tensor([[[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]])
        >>> metric.update(scores, torch.tensor([[1, 1, -100]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds tokens.

        Args:
            preds: Logits or probabilities, ``(batch, tokens, vocabulary)``.
            target: The tokens, ``(batch, tokens)``.
        """
        counts = target != self.ignore_index
        self.num_right += (counts & (preds.argmax(-1) == target)).sum()
        self.num_all += counts.sum()
