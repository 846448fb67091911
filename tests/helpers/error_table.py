"""A pytest plugin that writes docs/errors.md: the messages that the tests provoke, each with what to look at.

    python -m pytest -n 2 -p tests.helpers.error_table --error-table docs/errors.md

Of messages that differ in names and numbers only, one stands for all. What other processes say is known from their
standard error, where it has no file.
"""

import re
import subprocess
import traceback
from pathlib import Path
from typing import Any

import pytest

import lightning_drm
from lightning_drm.cli import mistakes

PACKAGE = Path(lightning_drm.__file__).parent
LONGEST = 400

MOST = 30  # of one place, such as the one that lists all problems of a plan

COMMAND_LINE = "command line"

Place = tuple[str, int]

_found: dict[Place, dict[str, str]] = {}  # by file and line: by what is left without names, the message


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--error-table", help="Write the errors that the tests provoke into this file.")


def pytest_configure(config: pytest.Config) -> None:
    """Looks at every exception that a test expects, at what it was made from, and at what command lines say."""
    if config.getoption("--error-table") is None:
        return
    leave, complete, sentence = pytest.RaisesExc.__exit__, subprocess.CompletedProcess.__init__, mistakes.sentence

    def leave_noted(self: pytest.RaisesExc, kind: object, error: BaseException | None, trace: object) -> bool:
        seen = error
        while seen is not None:
            _note(seen)
            seen = seen.__cause__ or seen.__context__
        return leave(self, kind, error, trace)

    def complete_noted(self: subprocess.CompletedProcess, *args: Any, **options: Any) -> None:
        complete(self, *args, **options)
        for stream in (self.stdout, self.stderr):
            text = stream.decode(errors="replace") if isinstance(stream, bytes) else stream or ""
            for said in re.findall(r"^lightning-drm: (.*(?:\n[ -].*)*)", text, re.MULTILINE):
                _keep((COMMAND_LINE, 0), said)

    def sentence_noted(message: str) -> str:
        said = sentence(message)
        _keep((COMMAND_LINE, 0), said)
        return said

    pytest.RaisesExc.__exit__ = leave_noted
    subprocess.CompletedProcess.__init__ = complete_noted
    mistakes.sentence = sentence_noted


def _note(error: BaseException) -> None:
    if not isinstance(error, ValueError | FileNotFoundError | RuntimeError | ImportError | ArithmeticError):
        return
    frames = traceback.extract_tb(error.__traceback__)
    if frames and Path(frames[-1].filename).is_relative_to(PACKAGE) and frames[-1].lineno:
        place = str(Path(frames[-1].filename).relative_to(PACKAGE)), frames[-1].lineno
        _keep(place, str(error))


def _keep(place: Place, message: str) -> None:
    """Keeps a message, unless the place has said it with other names."""
    plain = _plain(message)
    if place[0] == COMMAND_LINE or len(_found.get(place, ())) < MOST:
        _found.setdefault(place, {}).setdefault(re.sub(r"'[^']*'|\d[\d.e+-]*|\S*…\S*", "", plain), plain)


def _plain(message: str) -> str:
    """The message in one line, without temporary folders, and with what Markdown would take for its own escaped."""
    message = re.sub(r"/tmp/pytest-of-[^\s'\"]*?/test_[^/\s'\"]*/?", "…/", message)
    message = re.sub(r"/tmp/[^\s'\",;:]*/", "…/", message)
    line = " ".join(message.split())
    line = line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
    return re.sub(r"[|<*\[]", r"\\\g<0>", line)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes what a worker of pytest-xdist has found."""
    for file, line, messages in getattr(node, "workeroutput", {}).get("errors", []):
        _found.setdefault((file, line), {}).update(messages)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--error-table")
    if path is None:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["errors"] = [(*place, messages) for place, messages in _found.items()]
        return
    said = {key for place, messages in _found.items() if place[0] != COMMAND_LINE for key in messages}
    rooms: dict[str, list[tuple[str, str]]] = {}
    for (file, _), messages in sorted(_found.items()):
        if file == COMMAND_LINE:
            messages = {key: message for key, message in messages.items() if key not in said}
        room, _, name = file.rpartition("/")
        rooms.setdefault(room or name, []).extend((message, name) for message in messages.values())
    lines = [
        "# Errors",
        "",
        "What a user can be told, by the part of the package that says it. The tests provoke each of these, and write",
        "this page: `python -m pytest -n 2 -p tests.helpers.error_table --error-table docs/errors.md`. Names and",
        "numbers are those of the tests. On the command line, bad input ends with exit code 2, and a full disk or a",
        "missing permission with 1.",
    ]
    for room, rows in rooms.items():
        lines += ["", f"## {room}", "", "| message | said by |", "|---|---|"]
        lines += [f"| {message} | `{file}` |" for file, message in sorted({(file, message) for message, file in rows})]
    Path(path).write_text("\n".join([*lines, ""]), encoding="utf-8")
