"""A pytest plugin that writes docs/errors.md: the messages that the tests provoke, each with what to look at.

    PYTHONPATH=tests pytest -p helpers.error_table --error-table docs/errors.md

Of messages that differ in names and numbers only, one stands for all.
"""

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_drm

PACKAGE = Path(lightning_drm.__file__).parent
LONGEST = 400

MOST = 30  # of one place, such as the one that lists all problems of a plan

_found: dict[tuple[str, int], dict[str, str]] = {}  # by file and line: by what is left without names, the message


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--error-table", help="Write the errors that the tests provoke into this file.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Looks at every exception that a test expects, and at what those that end a process were made from."""
    expected, leave = pytest.RaisesExc, pytest.RaisesExc.__exit__

    def note(self: pytest.RaisesExc, kind: object, error: BaseException | None, trace: object) -> bool:
        seen = error
        while seen is not None:
            _note(seen)
            seen = seen.__cause__ or seen.__context__
        return leave(self, kind, error, trace)

    expected.__exit__ = note
    try:
        yield
    finally:
        expected.__exit__ = leave


def _note(error: BaseException) -> None:
    if not isinstance(error, ValueError | FileNotFoundError | RuntimeError | ImportError | ArithmeticError):
        return
    frames = traceback.extract_tb(error.__traceback__)
    if frames and Path(frames[-1].filename).is_relative_to(PACKAGE) and frames[-1].lineno:
        place = str(Path(frames[-1].filename).relative_to(PACKAGE)), frames[-1].lineno
        messages, message = _found.setdefault(place, {}), _plain(str(error))
        if len(messages) < MOST:
            messages.setdefault(re.sub(r"'[^']*'|\d[\d.e+-]*|\S*…\S*", "", message), message)


def _plain(message: str) -> str:
    """The message in one line, without temporary folders, and with what Markdown would take for its own escaped."""
    message = re.sub(r"/tmp/pytest-of-[^\s'\"]*?/test_[^/\s'\"]*/?", "…/", message)
    message = re.sub(r"/tmp/[^\s'\",;:]*/", "…/", message)
    line = " ".join(message.split()).replace("|", r"\|").replace("<", r"\<").replace("*", r"\*")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--error-table")
    if path is None:
        return
    rooms: dict[str, list[tuple[str, str]]] = {}
    for (file, _), messages in sorted(_found.items()):
        room, _, name = file.rpartition("/")
        rooms.setdefault(room or name, []).extend((message, name) for message in messages.values())
    lines = [
        "# Errors",
        "",
        "What a user can be told, by the part of the package that says it. The tests provoke each of these, and write",
        "this page: `PYTHONPATH=tests pytest -p helpers.error_table --error-table docs/errors.md`. Names and numbers",
        "are those of the tests. On the command line, bad input ends with exit code 2, and a full disk or a missing",
        "permission with 1.",
    ]
    for room, rows in rooms.items():
        lines += ["", f"## {room}", "", "| message | said by |", "|---|---|"]
        lines += [f"| {message} | `{file}` |" for message, file in dict.fromkeys(rows)]
    Path(path).write_text("\n".join([*lines, ""]), encoding="utf-8")
