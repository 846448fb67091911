"""What methods and parameters are, in words, for titles, plans and model cards."""

import inspect
from collections.abc import Collection, Mapping

from lightning_drm.deltas import Kind
from lightning_drm.fusion.recipe import Treatment
from lightning_drm.merging import Method

_WORDS: Mapping[Kind, str] = {
    "matrix": "matrices",
    "convolution": "convolutions",
    "embedding": "embeddings",
    "output_embedding": "output embeddings",
    "other": "biases, norms and others",
}


def described(kind: Kind, shape: tuple[int, ...]) -> str:
    """What a parameter is, in words that parameters of its kind share.

    Args:
        kind: What it is to its layer.
        shape: Its shape, which tells the number of experts.

    Example:
        >>> described("experts", (8, 48, 16)), described("output_embedding", (128_256, 4096))
        ('8 experts of (48, 16)', 'output embeddings')
    """
    return f"{shape[0]} experts of {shape[1:]}" if kind == "experts" else _WORDS[kind]


def method_title(method: Method, without: Collection[str] = ()) -> str:
    """A method with its whole setting, for titles and tables.

    Said are its direction and density, if it has them, and whatever else differs from its defaults.

    Args:
        method: The method.
        without: Hyper-parameters that are left out; those of a method inside as in ``method.density``.

    Example:
        >>> from lightning_drm import DRM, SVC, TaskArithmetic
        >>> method_title(DRM()), method_title(TaskArithmetic())
        ('DRM, horizontal, density 0.2', 'TaskArithmetic')
        >>> method_title(DRM(density=0.5, scale=1.2, elect_sign=False))
        'DRM, horizontal, density 0.5, no elect sign, scale 1.2'
        >>> method_title(SVC(TaskArithmetic(0.3)))
        'SVC of TaskArithmetic, scale 0.3'
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(method)).parameters.items()}
    words = [type(method).__name__]
    for name, value in method.hyperparameters().items():
        plain = name.replace("_", " ")
        if isinstance(value, Method):
            inside = [one.removeprefix(f"{name}.") for one in without if one.startswith(f"{name}.")]
            words[0] += f" of {method_title(value, inside)}"
        elif name in without:
            continue
        elif name == "direction":
            words.append(str(value))
        elif isinstance(value, bool) and value != defaults[name]:
            words.append(plain if value else f"no {plain}")
        elif name == "density" or value != defaults[name]:
            words.append(f"{plain} {value:g}" if isinstance(value, float) else f"{plain} {value}")
    return ", ".join(words)


def facts_on_kinds(
    treatments: Mapping[str, Treatment], kinds: Mapping[str, Kind], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Lines for a model card on what is not plain from the recipe: experts and output embeddings.

    Args:
        treatments: By name, what is done to each parameter.
        kinds: By name, what each is to its layer.
        shapes: By name, its shape.

    Example:
        >>> from lightning_drm.fusion.recipe import Recipe
        >>> treatment = Recipe().treatment("mlp.experts.down_proj", "experts", ["a", "b"])
        >>> facts_on_kinds({"down_proj": treatment}, {"down_proj": "experts"}, {"down_proj": (8, 16, 24)})
        ['8 experts of (16, 24), in 1 parameter: method, one expert after another']
    """
    counts: dict[tuple[str, str], int] = {}
    for name, treatment in treatments.items():
        if kinds[name] in ("experts", "output_embedding"):
            how = f"{treatment.rule}{', one expert after another' if treatment.expert_by_expert else ''}"
            key = described(kinds[name], shapes[name]), how
            counts[key] = counts.get(key, 0) + 1
    return [f"{what}, in {n} parameter{'s' if n > 1 else ''}: {how}" for (what, how), n in counts.items()]
