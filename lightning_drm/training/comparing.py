"""Comparing methods in a run: what is printed and kept, and where."""

from collections.abc import Sequence

from lightning_drm.evaluation import Candidates, Comparison
from lightning_drm.merging import Method
from lightning_drm.training.run import Run, is_writer
from lightning_drm.tuning import (
    ComparedMethods,
    chosen_recipes,
    compare,
    compared_finding,
    compared_table,
    result_line,
)


def compare_methods(run: Run, candidates: Candidates, methods: Sequence[Method] | None) -> None:
    """Compares methods on a run's task vectors.

    Args:
        run: The run.
        candidates: The models that can be made of them.
        methods: The methods; all that there are if left out.

    Raises:
        ValueError: If a method that was given does not fit, or is given twice.
    """
    recipes, left_out = chosen_recipes(candidates, methods)
    for sentence in left_out:
        run.say(sentence)
    found: dict[str, Comparison] = {}
    for title, comparison in compare(candidates, recipes):
        found[title] = comparison
        run.say(f"{len(found)} of {len(recipes)} · {result_line(title, comparison)}")
    compared = ComparedMethods(found, candidates.split)
    if run.published is not None:
        compared = compared.beside(run.published, recipes)
    run.console.print(compared_table(compared))
    if is_writer():
        run.keep("compare", [compared_finding(compared)], compared.section())
        run.say_where("compare")
