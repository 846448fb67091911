"""Imports run one way: from the command line down to files and plain mathematics, never back up."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_drm

PACKAGE = Path(lightning_drm.__file__).parent

ROOMS = [  # a room imports from the rooms before its own line, and from itself
    {"names", "pretrained", "storage", "distributed", "merging", "kinds"},
    {"deltas", "data"},
    {"modules", "fusion"},
    {"checkpoints", "evaluation"},
    {"tuning", "analysis"},
    {"training"},
    {"cli"},
    {"__main__"},
]
CHECKPOINTS = [{"architecture"}, {"reading"}, {"planning"}, {"deltas"}, {"writing"}, {"merge"}]


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file imports, inside functions and ``TYPE_CHECKING`` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".") if is_package else module.split(".")[:-1]
            start = parents[: len(parents) - node.level + 1] if node.level else []
            target = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{target}.{alias.name}") for alias in node.names)


def violations(package: Path, name: str, order: list[set[str]]) -> list[str]:
    """Every import within a package that goes against an order of the modules and packages directly inside it."""
    height = {room: level for level, rooms in enumerate(order) for room in rooms}
    found = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        is_package = parts[-1] == "__init__"
        module = ".".join([name, *(parts[:-1] if is_package else parts)])
        for line, target in imported(file.read_text(encoding="utf-8"), module, is_package):
            room, other = parts[0], target.removeprefix(f"{name}.").partition(".")[0]
            if not target.startswith(f"{name}.") or other == room:
                continue
            # What is in no room comes by way of the package itself, which hides the room that it is from.
            if other not in height or room not in height or height[other] >= height[room]:
                found.append(f"{file.relative_to(package.parent)}:{line}: {room} must not import {target}")
    return found


def unplaced(package: Path, order: list[set[str]]) -> set[str]:
    """Modules and packages directly inside a package that an order leaves out."""
    inside = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    return inside - {"__init__"} - set().union(*order)


@pytest.mark.parametrize(
    ("package", "name", "order"),
    [
        (PACKAGE, "lightning_drm", ROOMS),
        (PACKAGE / "checkpoints", "lightning_drm.checkpoints", CHECKPOINTS),
    ],
    ids=["rooms", "checkpoints"],
)
def test_imports_run_one_way(package, name, order):
    assert not unplaced(package, order), "every room has its place in the order"
    assert not (found := violations(package, name, order)), "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source", "message"),
    [
        ("low", "from pkg.high.part import name", "pkg/low/file.py:1: low must not import pkg.high.part.name"),
        ("low", "import pkg.high", "pkg/low/file.py:1: low must not import pkg.high"),
        ("low", "from pkg import high", "pkg/low/file.py:1: low must not import pkg.high"),
        ("low", "from ..high import name", "pkg/low/file.py:1: low must not import pkg.high.name"),
        ("low", "def f():\n    from pkg.high import name", "pkg/low/file.py:2: low must not import pkg.high.name"),
        ("low", "if TYPE_CHECKING:\n    import pkg.high", "pkg/low/file.py:2: low must not import pkg.high"),
        ("high", "from pkg import Name", "pkg/high/file.py:1: high must not import pkg.Name"),
        ("low", "from pkg.beside import name", "pkg/low/file.py:1: low must not import pkg.beside.name"),
        ("high", "from pkg.low import name\nfrom pkg.high.part import other\nimport torch", None),
    ],
)
def test_a_violation_is_named(room, source, message, tmp_path):
    file = tmp_path / "pkg" / room / "file.py"
    file.parent.mkdir(parents=True)
    file.write_text(source)
    found = violations(tmp_path / "pkg", "pkg", [{"low", "beside"}, {"high"}])
    assert found == ([message] if message else [])
