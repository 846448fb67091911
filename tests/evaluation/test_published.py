"""Published numbers, and when they stand beside measured ones."""

import csv
from pathlib import Path

import pytest

from lightning_drm import DARETIES, DRM, TIES, Average, IsoC, TaskArithmetic
from lightning_drm.evaluation import Published, published
from lightning_drm.fusion import Override, Recipe

TABLE = Path(published.__file__).with_name("published.csv")
TASKS = ["wino_grande", "PAWS", "qasc", "Quartz", "story_cloze", "wiki_qa"]


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in TABLE.read_text().splitlines() if not line.startswith("#")))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (DRM(), "DRM-H"),
        (DRM("vertical"), "DRM-V"),
        (TIES(), "TIES Merging"),
        (DARETIES(seed=3), "Dare-TIES"),
        (TaskArithmetic(), "Task Arithmetic"),
        (Average(), "Simple Averaging"),
    ],
)
def test_numbers_are_those_of_the_table(method, name):
    expected = {
        row["task"].lower(): float(row["accuracy"]) / 100
        for row in rows()
        if (row["model"], row["method"], row["tuned_on_validation"]) == ("T5-Large", name, "no")
    }
    found = Published("T5-Large").merged(Recipe(method), TASKS)
    assert {task.replace("_", "").lower(): value for task, value in found.items()} == pytest.approx(expected)
    some = Published("T5-Large").merged(Recipe(method), ["paws", "mine"])
    assert some == pytest.approx({"paws": expected["paws"]}), "no average, which would be of other tasks"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(IsoC()),
        Recipe(DRM(density=0.3)),
        Recipe(DRM(rank_drop=0.1)),
        Recipe(TIES(scale=0.9)),
        Recipe(DRM(), coefficients={"PAWS": 0.9}),
        Recipe(DRM(), overrides=[Override("*.bias", rule="average")]),
        Recipe(DRM(), non_matrix="elect"),
    ],
)
def test_other_merges_have_no_published_number(recipe):
    assert Published("T5-Base").merged(recipe, TASKS) == {}
    assert Published("T5-Base").changes(recipe, TASKS) == {}


def test_changes_without_a_step_are_those_of_tables_3_and_7():
    found = Published("T5-Base").changes(Recipe(DRM()), TASKS)
    assert found == pytest.approx(
        {"no renormalization": -0.05, "no pruning": -0.012, "no sign election": 0.031, "no disjoint average": -0.161}
    )
    assert Published("T5-Base").changes(Recipe(DRM()), TASKS[:3]) == {}, "of other tasks"
    assert Published("DeBERTa-v3-Base").changes(Recipe(DRM()), TASKS) == pytest.approx({"no renormalization": -0.088})
    assert Published("T5-Large").changes(Recipe(DRM()), TASKS) == {}


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"Nothing was published about 'ViT-B/16', but about ViT-B/32, ViT-L/14, "):
        Published("ViT-B/16")
