"""Metrics that tasks bring: made from their paths, with sizes from the data; scores and their direction."""

import pytest
import torch
import torchmetrics
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.text import ROUGEScore

from lightning_drm.kinds import MetricInfo, TaskMetrics, check_choice, make_metrics

SIZES = {"num_classes": 3, "task": "multiclass"}


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("torchmetrics.classification.MulticlassMatthewsCorrCoef", ["matthews_corr_coef"]),
        ({"class_path": "torchmetrics.classification.MulticlassF1Score"}, ["f1_score"]),
        ("torchmetrics.AUROC", ["auroc"]),
        (["torchmetrics.F1Score", "torchmetrics.classification.MulticlassAccuracy"], ["f1_score", "accuracy"]),
        (MulticlassF1Score(3), ["f1_score"]),
        (MetricCollection({"f1": MulticlassF1Score(3), "acc": MulticlassAccuracy(3)}), ["acc", "f1"]),
        ("Accuracy", ["accuracy"]),
    ],
)
def test_metrics_are_made_with_the_sizes_of_the_data(chosen, names):
    made = make_metrics(chosen, SIZES)
    assert list(made) == names
    for metric in made.values():
        metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
        assert 0 < float(metric.compute()) < 1


def test_what_the_user_says_goes_before_what_the_data_know():
    path = "torchmetrics.classification.MulticlassF1Score"
    (metric,) = make_metrics({"class_path": path, "init_args": {"num_classes": 5, "average": None}}, SIZES).values()
    assert metric.num_classes == 5
    assert metric.average is None


def test_objects_are_copied():
    given = MulticlassF1Score(3)
    (made,) = make_metrics(given, {}).values()
    made.update(torch.eye(3), torch.tensor([0, 1, 1]))
    assert not given.update_called


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("torchmetrics.classification.MulticlasF1", "path of a torchmetrics class as metric, got .*MulticlasF1"),
        ("nowhere.Metric", "path of a torchmetrics class as metric, got 'nowhere.Metric'"),
        ("torchmetrics.__version__", "path of a subclass of torchmetrics.Metric"),
        ({"class": "torchmetrics.F1Score"}, r"a metric as \{class_path: …, init_args: \{…\}\}, got"),
        ({"class_path": "torchmetrics.F1Score", "average": "macro"}, r"a metric as \{class_path"),
        ({"class_path": "torchmetrics.F1Score", "init_args": {"avrage": "macro"}}, "cannot be made with .*avrage"),
        ("collections.OrderedDict", "path of a subclass of torchmetrics.Metric as metric, got 'collections"),
        (["torchmetrics.F1Score", "torchmetrics.classification.MulticlassF1Score"], "got 'f1_score' twice"),
    ],
)
def test_what_is_no_metric_is_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        make_metrics(chosen, SIZES)


def test_a_misspelled_path_is_refused_before_there_are_data():
    with pytest.raises(ValueError, match="path of a torchmetrics class"):
        check_choice(["torchmetrics.F1Score", "torchmetrics.F1Scores"])
    check_choice("torchmetrics.F1Score")
    check_choice(None)


def test_the_first_result_is_the_score_unless_another_is_named():
    metrics = {"mse": MeanSquaredError(), "r2": torchmetrics.R2Score()}
    first, named = TaskMetrics(metrics), TaskMetrics(metrics, "r2")
    assert first.score_info == MetricInfo("mse", higher_is_better=False, is_fraction=False)
    assert named.score_info == MetricInfo("r2", higher_is_better=True, is_fraction=True)
    assert named.score_metric is metrics["r2"]
    assert TaskMetrics(metrics, "r2", higher_is_better=False).score_info.higher_is_better is False
    with pytest.raises(ValueError, match="one of mse, r2 as score, got 'mae'"):
        TaskMetrics(metrics, "mae")


def test_results_that_come_as_a_dictionary():
    metrics = TaskMetrics({"rouge": ROUGEScore(rouge_keys=("rouge1", "rougeL"))}, "rougeL_fmeasure")
    metrics.update(["a red cat"], ["a cat"])
    results = metrics.results()
    parts = ("fmeasure", "precision", "recall")
    assert set(results) == {f"{key}_{part}" for key in ("rouge1", "rougeL") for part in parts}
    assert float(results["rougeL_recall"]) == 1.0
    assert metrics.score_metric is metrics.metrics["rouge"]
    assert metrics.score_info == MetricInfo("rougeL_fmeasure", is_fraction=True)
    metrics.reset()
    assert not metrics.score_metric.update_called


def test_a_metric_that_does_not_fit_the_task_is_named():
    metrics = TaskMetrics({"mse": MeanSquaredError()})
    with pytest.raises(ValueError, match=r"metric 'mse' \(MeanSquaredError\) cannot measure .* shape \(2, 3\)"):
        metrics.update(torch.zeros(2, 3), torch.zeros(2))


def test_a_result_of_several_numbers_is_refused():
    metrics = TaskMetrics({"f1": MulticlassF1Score(3, average=None)})
    metrics.update(torch.eye(3), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"single number as the result of the metric 'f1', got a .* \(3,\)"):
        metrics.results()


def test_descriptions_tell_metrics_apart():
    def of(**options):
        return TaskMetrics({"f1": MulticlassF1Score(3, **options)}).describe()

    assert of() == of()
    assert of() != of(average="micro")
    assert of() != TaskMetrics({"f1": MulticlassF1Score(3)}, higher_is_better=False).describe()


def test_a_metric_that_would_hang_is_refused_on_several_processes(monkeypatch: pytest.MonkeyPatch):
    """torchmetrics gathers each entry of such lists, of which processes have different numbers."""
    metrics = TaskMetrics({"rouge": ROUGEScore(rouge_keys="rougeL")})
    metrics.update(["a red cat"], ["a cat"])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"'rouge' \(ROUGEScore\) keeps lists .* such as lightning_drm.kinds.Rouge"):
        metrics.results()
