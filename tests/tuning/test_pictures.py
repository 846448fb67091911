"""The picture of a search: which number it shows against λ."""

from lightning_drm import WUDI, TaskArithmetic
from lightning_drm.fusion import Recipe
from lightning_drm.tuning.pictures import family_finding
from lightning_drm.tuning.space import Family, search_space
from lightning_drm.tuning.trial import Trial


def trials_of(family: Family) -> list[Trial]:
    """A trial for each setting, whose average tells its place in the grid."""
    return [
        Trial(family.setting(params), params, {"a": 0.5}, {"a": 1.0}, number / 1000, number / 1000, 10)
        for number, params in enumerate(family.points, 1)
    ]


def test_any_number_is_drawn_against_the_scale():
    grid = {"WUDI": {"ridge": [0.3, 0.1], "scale": [1.0, 2.0, 3.0]}}
    (family,) = search_space(Recipe(WUDI()), ["a"], grid=grid)
    (axes,) = family_finding(family, trials_of(family), ["a"]).figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("ridge", "λ (scale)")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.1", "0.3"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    # Columns are scales, rows ridges in rising order; the grid was tried with the ridge 0.3 first.
    assert cells == {(0, 0): "0.4", (1, 0): "0.5", (2, 0): "0.6", (0, 1): "0.1", (1, 1): "0.2", (2, 1): "0.3"}


def test_one_number_alone_is_a_plot_of_points():
    (family,) = search_space(Recipe(), ["a"], grid={"TaskArithmetic": {"scale": [0.2, 0.4]}})
    assert isinstance(family.recipe.method, TaskArithmetic)
    (axes,) = family_finding(family, trials_of(family), ["a"]).figure.axes
    assert axes.get_xlabel() == "λ (scale)"
    assert axes.collections[0].get_offsets().tolist() == [[0.2, 0.001], [0.4, 0.002]]
