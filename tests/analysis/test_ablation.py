"""The ablation's merges are those of DRM with one argument changed, whatever the configuration."""

from pathlib import Path

import pandas as pd
import pytest

from helpers.studied import Sets
from helpers.three_tasks import CLASSES, ThreeTasks
from helpers.tiny import QUIET, VectorTask
from lightning_drm import DRM, Average, DRMMergeCallback, MergeTrainer, MultiTaskDataModule
from lightning_drm.analysis.ablation import Ablation
from lightning_drm.evaluation import StoredFinding
from lightning_drm.fusion import Override


def scores_of(table: pd.DataFrame, direction: str, variation: str, rank_drop: float = 0.0) -> dict[str, float]:
    rows = table[(table["direction"] == direction) & (table["variation"] == variation)]
    return rows[rows["rank drop (fraction)"] == rank_drop].set_index("task")["score"].to_dict()


def by_hand(run: ThreeTasks, method: DRM) -> dict[str, float]:
    merged = run.merged(method)
    found = {task: run.accuracy(merged, task) for task in CLASSES}
    return {**found, "average": sum(found.values()) / len(found)}


@pytest.fixture(scope="module")
def finding(three_tasks: ThreeTasks) -> StoredFinding:
    (finding,) = three_tasks.analyze(Ablation(rank_drops=[0.5]))
    return finding


@pytest.fixture(scope="module")
def table(finding: StoredFinding) -> pd.DataFrame:
    return pd.read_csv(finding.table)


def test_changes_are_paired(three_tasks: ThreeTasks, table: pd.DataFrame):
    """Two models on the same samples differ by less than each of them is sure to."""
    averages = table[table["task"] == "average"].set_index(["direction", "variation", "rank drop (fraction)"])
    assert table[table["task"] != "average"]["change of the average"].isna().all()
    for (direction, _, _), row in averages.iterrows():
        whole = averages.loc[(direction, "all steps", 0.0)]
        assert row["change of the average"] == pytest.approx(row["score"] - whole["score"])
        assert row["change of the average, 95 % from"] <= row["change of the average"] + 1e-9
        assert row["change of the average, 95 % to"] >= row["change of the average"] - 1e-9
    same = averages.loc[("horizontal", "all steps", 0.0)]
    assert same["change of the average, 95 % from"] == same["change of the average, 95 % to"] == 0.0
    widths = averages["change of the average, 95 % to"] - averages["change of the average, 95 % from"]
    alone = averages["score, 95 % to"] - averages["score, 95 % from"]
    assert widths.mean() < 0.8 * alone.mean()


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
@pytest.mark.parametrize(
    ("variation", "changed"),
    [
        ("all steps", {}),
        ("no renormalization", {"renormalize": False}),
        ("no sign election", {"elect_sign": False}),
        ("no disjoint average", {"disjoint": False}),
        ("no pruning", {"density": 1.0}),
        ("individual pruning", {"prune": "individual"}),
    ],
)
def test_each_variation_is_drm_with_one_argument_changed(
    three_tasks: ThreeTasks, table: pd.DataFrame, direction: str, variation: str, changed: dict[str, object]
):
    expected = by_hand(three_tasks, DRM(**{"direction": direction, "density": 0.5, **changed}))
    assert scores_of(table, direction, variation) == pytest.approx(expected)


def test_directions_are_dropped_and_nothing_else_is_in_the_table(three_tasks: ThreeTasks, table: pd.DataFrame):
    for direction in ("horizontal", "vertical"):
        expected = by_hand(three_tasks, DRM(direction, density=0.5, rank_drop=0.5))
        assert scores_of(table, direction, "all steps", 0.5) == pytest.approx(expected)
    assert len(table) == 2 * 7 * (len(CLASSES) + 1)
    assert len(table["score"].round(6).unique()) > 5, "the case shows nothing"


def test_the_sentence_has_the_numbers(three_tasks: ThreeTasks, finding: StoredFinding):
    full, plain = (by_hand(three_tasks, DRM("vertical", 0.5, disjoint=on))["average"] for on in (True, False))
    assert f"DRM, vertical, with all steps: average score {100 * full:.1f} ±" in finding.sentence
    assert f"no disjoint average {100 * (plain - full):+.1f} ±" in finding.sentence
    assert f">{100 * (plain - full):+.1f}</text>" in finding.figure.read_text()


def test_switches_that_are_off_are_switched_on_and_exceptions_do_not_prune_where_nothing_does(three_tasks: ThreeTasks):
    method = DRM(density=0.5, elect_sign=False, prune="individual", rank_drop=0.3)
    overrides = [Override("backbone.0.*", density=0.2)]
    table = three_tasks.table(Ablation(["horizontal"], [0.5]), method, overrides=overrides)
    assert set(table["variation"]) == {
        "all steps", "no renormalization", "with sign election", "no disjoint average", "no pruning", "joint pruning"
    }  # fmt: skip
    assert sorted(table.loc[table["variation"] == "all steps", "rank drop (fraction)"].unique()) == [0, 0.3, 0.5]
    expected = by_hand(three_tasks, DRM(density=1.0, elect_sign=False, prune="individual", rank_drop=0.3))
    assert scores_of(table, "horizontal", "no pruning", 0.3) == pytest.approx(expected)


def test_another_method_is_named_and_drm_with_its_defaults_studied(three_tasks: ThreeTasks):
    (finding,) = three_tasks.analyze(Ablation(["horizontal"], []), Average())
    assert finding.sentence.endswith("The configured method is Average, so this is DRM with its defaults.")
    assert finding.title == "Ablation of 3 tasks' merge (DRM, horizontal, density 0.2)"
    found = scores_of(pd.read_csv(finding.table), "horizontal", "all steps")
    assert found == pytest.approx(by_hand(three_tasks, DRM()))


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rank_drops must be at least 0 and below 1, got 1"):
        Ablation(rank_drops=[0.5, 1.0])
    with pytest.raises(ValueError, match="directions must be some of horizontal, vertical"):
        Ablation(directions=[])


@pytest.mark.usefixtures("few_resampled_sets")
def test_published_changes_stand_beside_measured_ones(tmp_path: Path):
    """Of a run with all tasks of the paper's table, and a model whose ablation it has."""
    tasks = ["paws", "qasc", "quartz", "story_cloze", "wiki_qa", "winogrande"]
    data = MultiTaskDataModule({task: Sets(seed) for seed, task in enumerate(tasks)})
    ablation = Ablation(directions=["horizontal"], rank_drops=[])

    def trainer() -> MergeTrainer:
        callback = DRMMergeCallback(tasks, dirpath=tmp_path / "run", published="T5-Base")
        return MergeTrainer(max_epochs=1, limit_val_batches=0, callbacks=[callback], **QUIET)

    trainer().fit(VectorTask(lr=0.3), datamodule=data)
    (finding,) = trainer().analyze(VectorTask(lr=0.3), data, analyses=[ablation], only="ablation", num_samples=40)
    said = "Published of DRM, horizontal (arXiv 2505.23117): no renormalization -5.0 points, no pruning -1.2 points"
    assert said in finding.sentence
    table = pd.read_csv(finding.table)
    published = table.dropna(subset="change of the average, published")
    assert published["variation"].tolist() == [
        "no renormalization", "no sign election", "no disjoint average", "no pruning"
    ]  # fmt: skip
    assert published["change of the average, published"].tolist() == [-0.05, 0.031, -0.161, -0.012]
    assert set(published["task"]) == {"average"}
