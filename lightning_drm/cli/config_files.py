"""The configuration files that a command line names: those that come with the package, and what they hold."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

_OPTIONS = ("--config", "-c")
_PACKAGE = Path(__file__).parents[1]


def own_configs() -> Path:
    """The folder of the configurations that come with the package: in it, or beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def with_own_configs(args: Sequence[str]) -> list[str]:
    """Writes out where the package's own configurations lie: ``--config quickstart.yaml`` needs no path.

    A file of that name counts first. ``configs/quickstart.yaml`` is the same outside a checkout, too.

    Args:
        args: Arguments after ``lightning-drm``.

    Raises:
        ValueError: If there is no such file, naming the package's own.

    Example:
        >>> _, path = with_own_configs(["--config", "method/ties.yaml"])
        >>> Path(path).is_file()
        True
    """
    words, folder = list(args), own_configs()
    for index, option, value in _named(args):
        if value.lstrip().startswith("{") or Path(value).exists():
            continue
        own = folder / value.removeprefix("configs/")
        if not own.is_file():
            names = ", ".join(str(path.relative_to(folder)) for path in sorted(folder.rglob("*.yaml")))
            raise ValueError(f"There is no configuration {value}, here or among the package's own, which are {names}.")
        words[index] = f"{option}{own}"
    return words


def config_contents(args: Sequence[str]) -> list[dict[str, Any]]:
    """What the configuration files on a command line hold, as far as they can be read.

    Args:
        args: Arguments after ``lightning-drm``.
    """
    contents = []
    for _, _, value in _named(args):
        try:
            content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):  # the parser reports it
            continue
        if isinstance(content, dict):
            contents.append(content)
    return contents


def _named(args: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Where each configuration file stands among the words, what stands before it in its word, and its name."""
    for index, word in enumerate(args):
        name, has_value, value = word.partition("=")
        if name in _OPTIONS and has_value:
            yield index, f"{name}=", value
        elif index and args[index - 1] in _OPTIONS:
            yield index, "", word
