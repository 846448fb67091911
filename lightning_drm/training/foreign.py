"""Modules of another library that has the same class names, so that they look right and do not fit."""


def problem_of_class(kind: type) -> str | None:
    """Why a module's class does not fit, if it comes from ``pytorch_lightning``.

    Args:
        kind: The class.

    Returns:
        A sentence; ``None`` if it does not come from there.
    """
    if not any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in kind.__mro__):
        return None
    return (
        f"{kind.__module__}.{kind.__qualname__} is a module of pytorch_lightning, whose classes do not fit those of "
        "lightning: write `import lightning.pytorch as pl` in its file, in place of `import pytorch_lightning as pl`."
    )
