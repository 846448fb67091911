"""The model card of a merged model: what it was made from and how, with the metadata that model hubs read."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import yaml

from lightning_drm.fusion.recipe import Recipe, class_path
from lightning_drm.pretrained import hub_name, public_name


def model_card(
    recipe: Recipe,
    columns: Mapping[str, Mapping[str, object]],
    *,
    base: str | None,
    base_fingerprint: str,
    library: str = "transformers",
    license: str | None = None,
    facts: Sequence[str] = (),
    loading: str | None = None,
) -> str:
    """Writes the card.

    Args:
        recipe: How the tasks were merged.
        columns: By task, the entries of its row in the table beside its coefficient, under their titles.
        base: The base's name, where it has one; of a local folder, only the last part gets into the card, and not into
            its metadata, where the hub would look for a model of that name.
        base_fingerprint: Tells versions of the base apart.
        library: The library that loads the model.
        license: The base's license, where it is known.
        facts: Further lines for the list of facts.
        loading: Python code that loads it.
    """
    tasks = list(columns)
    metadata: dict[str, object] = {"library_name": library}
    if base is not None and (on_hub := hub_name(base)) is not None:
        metadata["base_model"] = on_hub
        metadata["base_model_relation"] = "adapter" if library == "peft" else "merge"
    if license is not None:
        metadata["license"] = license
    metadata["tags"] = ["merge", "lightning_drm"]
    titles = list(next(iter(columns.values())))
    rows = [
        [task, f"{coefficient:g}", *(str(columns[task][title]) for title in titles)]
        for task, coefficient in zip(tasks, recipe.coefficients_of(tasks), strict=True)
    ]
    table = [["task", "coefficient", *titles], ["---"] * (2 + len(titles)), *rows]
    packages = ", ".join(f"{name} {version(name)}" for name in ("lightning_drm", "torch", "transformers", "peft"))
    overrides = [f"- override: `{override!r}`" for override in recipe.overrides]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).strip(),
            "---",
            "",
            f"# {len(tasks)} tasks merged with {type(recipe.method).__name__}",
            "",
            f"One backbone for the tasks {', '.join(tasks)}; `heads/<task>.safetensors` holds the head of a task.",
            "",
            f"- method: `{recipe.method!r}`, whose class is `{class_path(recipe.method)}`",
            f"- convolutions: {recipe.convolutions}",
            f"- embeddings, biases, norms: {recipe.non_matrix}",
            *overrides,
            f"- base: {public_name(base) if base is not None else 'not named'}, fingerprint `{base_fingerprint}`",
            f"- made with: {packages}",
            *(f"- {fact}" for fact in facts),
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
            *(["```python", *loading.splitlines(), "```", ""] if loading is not None else []),
        ]
    )
