"""Classes of another library that have the same names, so that they look right and do not fit."""


def problem_of_class(kind: type) -> str | None:
    """Why a class of a module, callback or Trainer does not fit, if it comes from ``pytorch_lightning``.

    Args:
        kind: The class.

    Returns:
        A sentence; ``None`` if it does not come from there.
    """
    if not any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in kind.__mro__):
        return None
    return (
        f"{kind.__module__}.{kind.__qualname__} comes from pytorch_lightning, whose classes do not fit those of "
        "lightning: take those of lightning.pytorch (`import lightning.pytorch as pl`)."
    )
