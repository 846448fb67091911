"""Reading JSON that others wrote, which may be damaged: what is wrong is said of the file, and of the field."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


def read_object(path: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Args:
        path: The file.

    Raises:
        ValueError: If it does not hold one JSON object, or gives a field twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a JSON file: it is not text in UTF-8.") from error
    return parse_object(text, str(path))


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The fields of a JSON object.

    Args:
        text: The object as text.
        where: What the text is, for messages.

    Raises:
        ValueError: If it is not one JSON object, or gives a field twice.

    Example:
        >>> parse_object('{"r": 8, "r": 4}', "config.json")
        Traceback (most recent call last):
            ...
        ValueError: config.json gives the field 'r' twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:  # readers differ in which one counts
                raise _RepeatedFieldError(name)
            fields[name] = value
        return fields

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except _RepeatedFieldError as error:
        raise ValueError(f"{where} gives the field {str(error)!r} twice.") from error
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or nested too deeply
        raise ValueError(f"{where} is not JSON that can be read: {str(error).partition(';')[0]}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} should hold a JSON object, but holds {shown(content)}.")
    return content


def field(content: Mapping[str, Any], name: str, kind: type[_T], where: str, default: _T) -> _T:
    """A field of a JSON object, which must be of one type; ``null`` and an absent field give the default.

    Args:
        content: The object.
        name: The field's name.
        kind: The type.
        where: What holds the object, for the message.
        default: The value where there is none.

    Raises:
        ValueError: If it is of another type.

    Example:
        >>> field({"r": "x"}, "r", int, "adapter_config.json", 8)
        Traceback (most recent call last):
            ...
        ValueError: adapter_config.json: expected a whole number for r, got 'x'.
    """
    value = content.get(name)
    if value is None:
        return default
    # True is an int to Python, but no number to JSON.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {_KINDS.get(kind, kind.__name__)} for {name}, got {shown(value)}.")
    return value


def shown(value: object) -> str:
    """A value as a message shows it, however long it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested too deeply
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class _RepeatedFieldError(Exception):
    pass


_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", str: "text", dict: "an object", list: "a list"}
_LONGEST = 60
