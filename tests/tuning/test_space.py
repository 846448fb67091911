"""What is searched: the paper's grids, a user's own, and what cannot be."""

import re

import pytest

from helpers.own_method import Largest
from lightning_drm import DRM, SVC, TIES, TSVM, Average, IsoC, LiNeS, RegMean, TaskArithmetic
from lightning_drm.deltas import TaskVector
from lightning_drm.fusion import Recipe
from lightning_drm.tuning import SearchSettings, search_space, setting_title
from lightning_drm.tuning.trial import Trial, table_of

TASKS = ["a", "b"]
TENTHS = [tenth / 10 for tenth in range(1, 11)]
PAPERS = [0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]


@pytest.mark.parametrize(
    ("method", "densities", "scales"),
    [
        (DRM("vertical", rank_tol=0.0), TENTHS, PAPERS),
        (TIES(), TENTHS, PAPERS),
        (TaskArithmetic(), [None], TENTHS),
        (IsoC(), [None], [tenth / 10 for tenth in range(5, 21)]),
        (Largest(), TENTHS, PAPERS),
        (Average(), [None], [None]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "",
)
def test_the_configured_method_has_its_default_grid(method, densities, scales):
    (family,) = search_space(Recipe(method), TASKS)
    found = [family.setting(params).method.hyperparameters() for params in family.points]
    assert [(point.get("density"), point.get("scale")) for point in found] == [
        (d, s) for d in densities for s in scales
    ]
    assert all({**method.hyperparameters(), **point} == point for point in found)


def test_drm_in_both_directions_if_it_is_named():
    families = search_space(Recipe(DRM("vertical", rank_tol=0.0)), TASKS, methods=["DRM", "Average"])
    assert [family.title for family in families] == [
        "DRM, horizontal, rank tol 0",
        "DRM, vertical, rank tol 0",
        "Average",
    ]
    assert [len(family.points) for family in families] == [80, 80, 1]
    everything = search_space(Recipe(), TASKS, methods=["all"])
    assert [family.title.split(",")[0] for family in everything] == [
        "DRM", "DRM", "TIES", "DARETIES", "TaskArithmetic", "Average", "IsoC", "IsoCTS", "TSVM",
        "WUDI", "DCMerge", "STAR", "KnOTS", "RegMean", "Fisher",
    ]  # fmt: skip


def test_a_grid_of_any_hyper_parameters():
    grid = {
        "DRM": {"scale": [1, 2], "elect_sign": [True, False], "density": [0.1], "rank_drop": [0.0, 0.5]},
        "lightning_drm.DARETIES": {"seed": [3, 4]},
        "helpers.own_method.Largest": {"scale": [0.5]},
    }
    drm, without, dare, own = search_space(Recipe(TIES(density=0.7)), TASKS, grid=grid)
    assert (drm.title, without.title) == ("DRM, horizontal", "DRM, horizontal, no elect sign")
    assert [tuple(point.values()) for point in drm.points] == [
        (0.1, 0.0, 1.0),
        (0.1, 0.0, 2.0),
        (0.1, 0.5, 1.0),
        (0.1, 0.5, 2.0),
    ]
    assert list(drm.numbers) == ["density", "rank_drop", "scale"], "λ changes first"
    assert [dare.setting(point).method.seed for point in dare.points] == [3, 4]
    assert own.setting(own.points[0]).method == Largest(0.75, 0.5)
    (ties,) = search_space(Recipe(TIES(density=0.7)), TASKS, grid={"TIES": {"scale": [1.0]}})
    assert ties.setting(ties.points[0]).method == TIES(density=0.7)


def test_around_another_method():
    (family,) = search_space(Recipe(LiNeS(DRM("vertical"))), TASKS)
    assert family.title == "LiNeS of DRM, vertical, density 0.2"
    assert family.numbers == {"beta": tuple(TENTHS)}
    assert family.setting(family.points[2]).method == LiNeS(DRM("vertical"), "auto", 0.3)
    grid = {"LiNeS": {"alpha": [0.25, 0.5], "beta": [0.0, 1]}}
    (family,) = search_space(Recipe(LiNeS(TIES())), TASKS, grid=grid)
    assert family.title == "LiNeS of TIES, density 0.2"
    assert [tuple(point.values()) for point in family.points] == [(0.25, 0.0), (0.25, 1.0), (0.5, 0.0), (0.5, 1.0)]
    found, given = search_space(Recipe(LiNeS(TIES())), TASKS, grid={"LiNeS": {"alpha": ["auto", 0.5]}})
    assert (found.recipe.method, given.recipe.method) == (LiNeS(TIES()), LiNeS(TIES(), 0.5))
    with pytest.raises(ValueError, match=r"LiNeS: alpha must be a number of at least 0, got -0\.5\."):
        search_space(Recipe(LiNeS(TIES())), TASKS, grid={"LiNeS": {"alpha": [-0.5, 0.5]}})


def test_methods_inside_others_are_named_and_searched(vectors: list[TaskVector]):
    grid = {
        "SVC of TSVM": {"alpha": [0.5, 1]},
        "LiNeS of SVC of DRM": {
            "method.method.direction": ["horizontal", "vertical"],
            "method.alpha": [0.5],
            "beta": [0],
        },
        "LiNeS of lightning_drm.TIES": {"method.density": [0.1, 0.4], "method.scale": [1, 2], "alpha": [0.25]},
    }
    svc, across, along, lines = search_space(Recipe(DRM(density=0.3)), TASKS, grid=grid)
    assert [svc.setting(point).method for point in svc.points] == [SVC(TSVM(), 0.5), SVC(TSVM(), 1.0)]
    assert [family.title for family in (svc, across, along, lines)] == [
        "SVC of TSVM",
        "LiNeS of SVC of DRM, horizontal, density 0.2",
        "LiNeS of SVC of DRM, vertical, density 0.2",
        "LiNeS of TIES",
    ]
    assert along.setting(along.points[0]).method == LiNeS(SVC(DRM("vertical"), 0.5), beta=0.0)
    assert [lines.setting(point).method for point in lines.points] == [
        LiNeS(TIES(density, scale=scale), 0.25) for density in (0.1, 0.4) for scale in (1.0, 2.0)
    ]
    grid = {"LiNeS of SVC of TIES": {"alpha": ["auto", 0.5], "method.alpha": [0.1, 0.2]}}
    found, given = search_space(Recipe(), TASKS, grid=grid)
    assert (found.title, given.title) == (
        "LiNeS of SVC of TIES, density 0.2",
        "LiNeS of SVC of TIES, density 0.2, alpha 0.5",
    )
    (family,) = search_space(Recipe(SVC(RegMean(0.5), 0.95)), TASKS, vectors, grid={"SVC": {"method.alpha": [0.5]}})
    assert family.title == "SVC of RegMean, alpha 0.95", "SVC's own, though RegMean has the same by default"
    (family,) = search_space(Recipe(TIES()), TASKS, methods=["SVC of TaskArithmetic"])
    assert [family.setting(point).method.alpha for point in family.points] == [0.1, 0.25, 0.5, 1.0]
    (family,) = search_space(Recipe(SVC(TIES(density=0.3))), TASKS, grid={"SVC": {"method.scale": [0.5]}})
    assert family.setting(family.points[0]).method == SVC(TIES(0.3, scale=0.5)), "what is configured and not searched"


def test_a_trial_shows_what_is_inside_its_method():
    (family,) = search_space(Recipe(SVC(TIES())), ["a"], grid={"SVC": {"alpha": [0.5], "method.density": [0.1]}})
    point = family.points[0]
    found = table_of([Trial(family.setting(point), point, {"a": 0.9}, {"a": 0.9}, 0.9, 0.9, 50)], ["a"])
    assert list(found)[:5] == ["method", "alpha", "method.density", "method.scope", "method.scale"]
    assert list(found.iloc[0])[:5] == ["lightning_drm.SVC of lightning_drm.TIES", 0.5, 0.1, "global", 1.0]


def test_one_coefficient_for_each_task():
    (family,) = search_space(Recipe(TaskArithmetic()), TASKS, coefficients="each")
    assert family.numbers == {"coefficients.a": tuple(TENTHS), "coefficients.b": tuple(TENTHS)}
    setting = family.setting({"coefficients.a": 0.3, "coefficients.b": 1.0})
    assert (setting.method, setting.coefficients) == (TaskArithmetic(1.0), {"a": 0.3, "b": 1.0})
    assert setting_title(setting) == "TaskArithmetic, scale 1, coefficient of a 0.3"
    (family,) = search_space(Recipe(Average()), TASKS, coefficients="each")
    assert family.setting({"coefficients.a": 0.3}).method == Average()
    for name, method in (("LiNeS of  TaskArithmetic", LiNeS(TaskArithmetic(1.0))), ("SVC of TIES", SVC(TIES()))):
        (family,) = search_space(Recipe(), TASKS, methods=[name], coefficients="each")
        lambdas = TENTHS if "Task" in name else [tenths / 10 for tenths in range(8, 16)]
        assert family.numbers["coefficients.a"] == tuple(lambdas), "those of what is inside"
        assert "method.scale" not in family.numbers
        assert type(family.setting({"coefficients.a": 0.3}).method) is type(method)
        assert family.setting({"coefficients.a": 0.3}).method.method == method.method
    (family,) = search_space(
        Recipe(), TASKS, grid={"SVC of TaskArithmetic": {"method.scale": [0.2]}}, coefficients="each"
    )
    assert family.numbers == {"coefficients.a": (0.2,), "coefficients.b": (0.2,)}


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ({"methods": ["DMR"]}, ["There is no method 'DMR'; the methods are DRM, TIES, DARETIES", "'SVC of DRM'"]),
        ({"methods": []}, ["There are no methods to search."]),
        ({"methods": ["all", "DRM"]}, ["'all' stands for every method: leave out the others."]),
        (
            {"grid": {"TIES": {"scale": [1.0]}, "lightning_drm.TIES": {"scale": [2.0]}}},
            ["The grid has TIES twice, the second time as 'lightning_drm.TIES'."],
        ),
        ({"grid": {"all": {}}}, ["There is no method 'all'"]),
        ({"grid": {}}, ["The grid names no method."]),
        ({"grid": {"DRM": {"density": []}}}, ["The grid of DRM gives no values for density."]),
        (
            {"grid": {"DRM": {"desnity": [0.1]}, "Average": {"scale": [1.0]}, "nowhere.Method": {}}},
            [
                "DRM has no hyper-parameter 'desnity'; it has direction, density, rank_tol",
                "Average has no hyper-parameter 'scale'; it has none.",
                "There is no method 'nowhere.Method'",
            ],
        ),
        (
            {"grid": {"DRM": {"density": [0.1, 1.5], "direction": ["diagonal"]}, "TIES": {"density": [0.0]}}},
            ["DRM: density must be in (0, 1], got 1.5", "'diagonal'", "TIES: density must be in (0, 1], got 0.0"],
        ),
        (
            {"grid": {"DRM": {"density": ["x"], "elect_sign": [1], "direction": [True]}, "DARETIES": {"seed": [0.5]}}},
            [
                "DRM: density cannot be 'x'.",
                "DRM: elect_sign cannot be 1.",
                "DRM: direction cannot be True.",
                "DARETIES: seed cannot be 0.5.",
            ],
        ),
        ({"grid": {"SVC of DRM": {"alpha": ["auto"]}}}, ["SVC of DRM: alpha cannot be 'auto'."]),
        ({"grid": {"TIES": {"scale": [1.0]}}, "methods": ["DRM"]}, ["The grid has TIES, which is not among"]),
        (
            {"methods": ["LiNeS", "TIES of DRM", "SVC of DMR", "SVC of LiNeS"]},
            [
                "LiNeS wraps another method: say which, as in 'LiNeS of DRM'.",
                "TIES does not wrap another method, so 'TIES of DRM' does not exist.",
                "There is no method 'DMR'",
            ],
        ),
        (
            {"grid": {"SVC of DRM": {"density": [0.1]}, "SVC of IsoC": {"alpha": [1.0]}}},
            [
                "SVC of DRM has no hyper-parameter 'density'; it has alpha, method.direction, method.density",
                "SVC: method must leave singular values apart, which IsoC makes equal.",
            ],
        ),
    ],
)  # fmt: skip
def test_all_that_cannot_be_searched_is_said_at_once(options, sentences):
    with pytest.raises(ValueError, match=re.escape(sentences[0])) as refused:
        search_space(Recipe(), TASKS, **options)
    assert all(sentence in str(refused.value) for sentence in sentences), refused.value


def test_numbers_out_of_range():
    message = (
        "num_trials must be at least 1, got 0; num_samples must be at least 1, got 0; seed must be at least 0, got -1"
    )
    with pytest.raises(ValueError, match=message):
        SearchSettings(num_trials=0, num_samples=0, seed=-1)
