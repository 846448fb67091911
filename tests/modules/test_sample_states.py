"""What is recorded of each sample makes a metric's result again, on any choice of samples."""

import numpy as np
import pytest
import torch
from torchmetrics import AUROC, MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.regression import MeanAbsoluteError, PearsonCorrCoef, R2Score, SpearmanCorrCoef
from torchmetrics.text import Perplexity, ROUGEScore
from torchmetrics.wrappers import ClasswiseWrapper

from lightning_drm.data.sharing import Share
from lightning_drm.modules import sample_states
from lightning_drm.modules.sample_states import SampleRecorder

NUM = 23
BATCH = 5


def class_batches() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(NUM, 4).softmax(-1), torch.randint(0, 4, (NUM,))


def number_batches() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    target = torch.randn(NUM)
    return target + torch.randn(NUM), target


def token_batches() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    target = torch.randint(0, 7, (NUM, 6))
    target[torch.rand(NUM, 6) < 0.3] = -100
    return torch.randn(NUM, 6, 7), target


WORDS = np.array(["a", "red", "cat", "sat", "on", "mats"])


def text_batches() -> tuple[list[str], list[str]]:
    draws = np.random.RandomState(3)
    written, expected = ([" ".join(draws.choice(WORDS, 4)) for _ in range(NUM)] for _ in range(2))
    return written, expected


CASES = {
    "accuracy": (lambda: MulticlassAccuracy(4, average="micro"), class_batches, None),
    "macro f1": (lambda: MulticlassF1Score(4), class_batches, None),
    "mcc": (lambda: MulticlassMatthewsCorrCoef(4), class_batches, None),
    "auroc": (lambda: AUROC(task="multiclass", num_classes=4), class_batches, None),
    "mse": (MeanSquaredError, number_batches, None),
    "pearson": (PearsonCorrCoef, number_batches, None),
    "spearman": (SpearmanCorrCoef, number_batches, None),
    "r2": (R2Score, number_batches, None),
    "perplexity": (lambda: Perplexity(ignore_index=-100), token_batches, None),
    "one class of several": (
        lambda: ClasswiseWrapper(MulticlassF1Score(4, average=None)),
        class_batches,
        "multiclassf1score_2",
    ),
    "a sum of metrics": (lambda: MeanSquaredError() + 0.5 * MeanAbsoluteError(), number_batches, None),
    "rouge": (lambda: ROUGEScore(rouge_keys=("rouge1", "rougeL")), text_batches, "rougeL_fmeasure"),
}


def picked(values, chosen: list[int]):
    return values[chosen] if isinstance(values, torch.Tensor) else [values[sample] for sample in chosen]


def recorded(metric: Metric, predictions, target, how: str, key: str | None):
    recorder = SampleRecorder(metric)
    for start in range(0, NUM, BATCH):
        share = Share(min(BATCH, NUM - start), min(BATCH, NUM - start), (start, 1))
        with recorder.listening(share):
            batch = (predictions[start : start + BATCH], target[start : start + BATCH])
            metric.update(*batch) if how == "update" else metric(*batch)
    return recorder.gathered(key)


@pytest.mark.parametrize("how", ["update", "forward"])
@pytest.mark.parametrize("case", CASES)
def test_any_choice_of_samples_has_the_result_of_a_fresh_metric(case: str, how: str, monkeypatch):
    monkeypatch.setattr(sample_states, "_TOGETHER", 2 * NUM)  # two choices at a time
    make, batches, key = CASES[case]
    predictions, target = batches()
    metric = make()
    samples = recorded(metric, predictions, target, how, key)
    assert samples is not None
    assert len(samples) == NUM
    draws = np.random.RandomState(0)
    choices = [
        list(range(NUM)),
        list(range(NUM))[::-1],
        *(draws.randint(NUM, size=NUM).tolist() for _ in range(5)),
        [3, 3, 8, 1],
    ]
    for chosen, result in zip(choices, samples.results(choices), strict=True):
        fresh = make()
        fresh.update(picked(predictions, chosen), picked(target, chosen))
        expected = fresh.compute()
        assert result == pytest.approx(float(expected[key] if key else expected), rel=1e-5)
    whole = metric.compute()
    assert samples.results([range(NUM)])[0] == pytest.approx(float(whole[key] if key else whole), rel=1e-5)


def test_the_metric_itself_stays_as_it_is():
    predictions, target = class_batches()
    metric, alone = MulticlassAccuracy(4, average="micro"), MulticlassAccuracy(4, average="micro")
    recorded(metric, predictions, target, "forward", None)
    alone.update(predictions, target)
    assert torch.equal(metric.compute(), alone.compute())
    assert "forward" not in vars(metric)


def test_a_metric_that_gets_tokens_has_no_samples():
    recorder = SampleRecorder(metric := MulticlassAccuracy(4, average="micro"))
    with recorder.listening(Share(2, 2, (0, 1))):
        metric.update(torch.randn(6, 4).softmax(-1), torch.randint(0, 4, (6,)))
    assert recorder.gathered() is None


def test_samples_of_several_processes_come_in_the_order_of_the_set():
    recorder = SampleRecorder(metric := MeanSquaredError())
    with recorder.listening(Share(2, 2, (1, 2))):
        metric.update(torch.tensor([10.0, 30.0]), torch.zeros(2))
    with recorder.listening(Share(1, 1, (0, 2))):
        metric.update(torch.tensor([0.0]), torch.zeros(1))
    samples = recorder.gathered()
    assert samples is not None
    assert samples.results([[0], [1], [2]]) == [0.0, 100.0, 900.0]
