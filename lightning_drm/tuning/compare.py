"""Several methods side by side on stored deltas: which to compare, and the scores of each.

All of them share the rest of the recipe: coefficients, what is done to parameters that are no matrices, and overrides.
Base and individual models are measured once. Then each parameter's deltas are read once for as many methods as fit into
memory, and the merged models are measured one after another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_drm.evaluation import Candidates, Comparison
from lightning_drm.fusion import Fusion, Recipe, method_title
from lightning_drm.fusion.recipe import class_path
from lightning_drm.merging import DRM, METHODS, Method


def all_methods() -> list[Method]:
    """All methods of this package with their defaults, DRM in both directions.

    Example:
        >>> [method_title(method) for method in all_methods()][:3]
        ['DRM, horizontal, density 0.2', 'DRM, vertical, density 0.2', 'TIES, density 0.2']
    """
    return [DRM(), DRM("vertical"), *(kind() for kind in METHODS if kind is not DRM)]


def chosen_recipes(candidates: Candidates, methods: Sequence[Method] | None) -> tuple[dict[str, Recipe], list[str]]:
    """The recipes to compare: the configured one first, and the others with their methods in its place.

    Args:
        candidates: What they are of.
        methods: The methods to compare with the configured one; `all_methods` if left out.

    Returns:
        By title, the recipe; and a sentence for each method that was left out, as the overrides do not fit it.

    Raises:
        ValueError: If the recipe does not fit the configured method or one that was given, or methods are the same; or
            if there is none to compare with the configured one.
    """
    configured = candidates.recipe
    vectors = candidates.vectors_for(configured)
    Fusion(configured, list(vectors.values()))  # refuses what does not fit, before anything is measured
    given = all_methods() if methods is None else list(methods)
    twice = [method_title(method) for place, method in enumerate(given) if method in given[:place]]
    problems = [f"{title} is given twice" for title in dict.fromkeys(twice)]
    recipes, left_out = [configured], []
    for method in given:
        recipe = replace(configured, method=method)
        if method == configured.method:
            continue
        try:
            Fusion(recipe, list(candidates.vectors_for(recipe).values()))
        except ValueError as error:
            left_out.append(f"{method_title(method)} is left out: {error}")
            problems.append(f"{method_title(method)} cannot be compared: {str(error).rstrip('.')}")
            continue
        recipes.append(recipe)
    if problems and methods is not None:
        raise ValueError(f"methods: {'; '.join(problems)}.")
    if len(recipes) == 1:
        title = method_title(configured.method)
        raise ValueError(f"methods: expected at least one to compare with the configured one, which is {title}.")
    return _by_title(recipes), left_out


def compare(candidates: Candidates, recipes: dict[str, Recipe]) -> Iterator[tuple[str, Comparison]]:
    """Measures what recipes make of the task vectors.

    Args:
        candidates: The models that can be made of them.
        recipes: By title, how to merge.

    Yields:
        Each recipe's title and its scores, as soon as they are known.
    """
    base, individual = candidates.base, candidates.individual
    models = candidates.merged_side_by_side(list(recipes.values()))
    for (title, recipe), deltas in zip(recipes.items(), models, strict=True):
        merged = candidates.scores(deltas, label=title)
        yield title, Comparison(candidates.tasks, base, individual, merged, recipe.description(candidates.tasks), title)


def _by_title(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """Recipes by their methods' titles, longer ones where a user's own method has the name of another."""
    titles = [method_title(recipe.method) for recipe in recipes]
    found: dict[str, Recipe] = {}
    for title, recipe in zip(titles, recipes, strict=True):
        label = title if titles.count(title) == 1 else f"{title} ({class_path(recipe.method)})"
        if label in found:
            raise ValueError(f"methods: {found[label].method} and {recipe.method} are too alike to compare.")
        found[label] = recipe
    return found
