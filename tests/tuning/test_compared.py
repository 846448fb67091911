"""What is said of methods that were compared, from scores that are known."""

import numpy as np
import pytest
from rich.console import Console

from lightning_drm.evaluation import Comparison, Score
from lightning_drm.kinds import MetricInfo
from lightning_drm.tuning import ComparedMethods, compared_finding, compared_table, result_line

ACCURACY = MetricInfo("accuracy", is_fraction=True)
PERPLEXITY = MetricInfo("perplexity", higher_is_better=False)
NUM = 400


def right(share: float, seed: int) -> np.ndarray:
    """Which of some samples a model gets right."""
    return np.random.RandomState(seed).rand(NUM) < share


def score(hits: np.ndarray) -> Score:
    """Of an accuracy, the score with its results on the resampled sets, plainly."""
    draws = np.random.RandomState(0)
    resampled = [float(hits[draws.randint(NUM, size=NUM)].mean()) for _ in range(1000)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(float(hits.mean()), ACCURACY, (float(low), float(high)), resampled)


def compared(models: dict[str, dict[str, Score]]) -> ComparedMethods:
    tasks = list(next(iter(models.values())))
    individual = next(iter(models.values()))
    by_title = {
        title: Comparison(tasks, {}, individual, merged, {"class_path": f"x.{title}", "init_args": {}}, title)
        for title, merged in models.items()
    }
    return ComparedMethods(by_title, "validation")


@pytest.fixture
def three() -> ComparedMethods:
    """B errs where A does and on a few samples more; C is as good as A, on samples of its own."""
    a = {task: right(0.8, seed) for seed, task in enumerate(["one", "two"])}
    b = {task: hits & right(0.95, 10 + seed) for seed, (task, hits) in enumerate(a.items())}
    c = {task: right(0.8, 20 + seed) for seed, task in enumerate(a)}
    return compared(
        {name: {task: score(hits) for task, hits in of.items()} for name, of in zip("ABC", (a, b, c), strict=True)}
    )


def test_noise_is_that_of_paired_differences(three: ComparedMethods):
    best, other = three.by_title["A"], three.by_title["B"]
    assert three.best == "A"
    assert other.intervals["merged"]["average"][1] > best.intervals["merged"]["average"][0], "the intervals overlap"
    assert three.level_with_best == ["C"], "yet B is told apart, as it errs wherever A does"
    average = 100 * np.mean([score.value for score in best.merged.values()])
    assert f"The best average of 3 methods is that of A: {average:.1f} % on the validation sets" in three.sentence
    assert "The samples do not tell it from C: the 95 % interval of the difference includes 0." in three.sentence


def test_one_method_above_all_others(three: ComparedMethods):
    two = ComparedMethods({name: three.by_title[name] for name in "AB"}, "test")
    assert two.level_with_best == []
    assert two.sentence.endswith("It is above every other method by more than the noise of the samples.")


def test_without_intervals_nothing_is_said_of_noise():
    found = compared({name: {"one": Score(value, ACCURACY)} for name, value in (("A", 0.5), ("B", 0.75))})
    assert found.sentence == (
        "The best average of 2 methods is that of B: 75.0 % on the validation sets, "
        "150.0 % of the individual finetunes."
    )


def test_many_tasks_have_no_columns():
    hits = {f"a_task_with_a_long_name_{number}": score(right(0.8, number)) for number in range(8)}
    found = compared({"DRM, horizontal, density 0.2": hits, "TaskArithmetic": hits})
    console = Console(width=80, record=True)
    console.print(compared_table(found))
    text = console.export_text()
    assert "a_task" not in text
    assert f"{100 * np.mean([one.value for one in hits.values()]):.1f} ±" in text
    assert "The scores of each of the 8 tasks are in the report." in text


def test_the_table_marks_the_best_of_each_column(three: ComparedMethods):
    console = Console(width=120, record=True, force_terminal=True, color_system="standard")
    console.print(compared_table(three))
    lines = console.export_text(styles=True).splitlines()
    for name, of in three.by_title.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        average = f"{100 * of.scores['merged']['average']:.1f}"
        assert (f"\x1b[1m{average} ±" in line) == (name == "A")


def test_scores_that_cannot_be_averaged():
    """Lower is better: the best perplexity is the lowest one, and there is no average."""
    models = {name: {"text": Score(value, PERPLEXITY)} for name, value in (("A", 20.0), ("[B]", 12.5))}
    found = compared(models)
    assert found.best is None
    assert found.sentence == "2 methods; their scores cannot be averaged."
    assert result_line("[B]", found.by_title["[B]"]) == "[B]: text perplexity 12.5"
    console = Console(width=120, record=True, force_terminal=True, color_system="standard")
    console.print(compared_table(found))
    printed = console.export_text(styles=True)
    assert "\x1b[1m12.5" in printed
    assert "[B]" in printed
    table = compared_finding(found).table
    assert table[table.method == "[B]"].score.tolist()[0] == 12.5


def test_the_figure_shows_averages_where_they_are(three: ComparedMethods):
    finding = compared_finding(three)
    (axes,) = finding.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B", "C"]
    assert axes.get_xlabel() == "score (%)"
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == [f"{100 * of.scores['merged']['average']:.1f}" for of in three.by_title.values()]
    for place, of in enumerate(three.by_title.values()):
        bars = [bar.get_segments()[0] for bar in axes.collections if hasattr(bar, "get_segments")]
        low, high = (100 * end for end in of.intervals["merged"]["average"])
        assert bars[place][:, 0] == pytest.approx([low, high])
        assert bars[place][:, 1] == pytest.approx([place, place])
