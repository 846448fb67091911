"""The model card of a merged model: what it was made from and how, with the metadata that model hubs read."""

from collections.abc import Sequence
from importlib.metadata import version

import yaml

from lightning_drm.deltas import TaskVector, fingerprint
from lightning_drm.engine.recipe import Recipe


def model_card(recipe: Recipe, vectors: Sequence[TaskVector], base: str | None) -> str:
    """Writes the card.

    Args:
        recipe: How the tasks were merged.
        vectors: What was merged.
        base: The base's name, where it has one.
    """
    tasks = [vector.task for vector in vectors]
    metadata: dict[str, object] = {"library_name": "transformers", "tags": ["merge", "lightning_drm"]}
    if base is not None:
        metadata["base_model"] = base
    rows = "\n".join(
        f"| {vector.task} | {coefficient:g} | {len(vector.deltas)} |"
        for vector, coefficient in zip(vectors, recipe.coefficients_of(tasks), strict=True)
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("lightning_drm", "torch", "transformers"))
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {len(tasks)} tasks merged with {type(recipe.method).__name__}

One backbone for the tasks {", ".join(tasks)}; `heads/<task>.safetensors` holds each task's head.

- method: `{recipe.method!r}`
- convolutions: {recipe.convolutions}
- base: {base or "not named"}, fingerprint `{fingerprint(vectors[0].base_hashes)}`
- made with: {packages}

| task | coefficient | parameters with a delta |
|---|---|---|
{rows}
"""
