"""What a parser finds wrong, said in one sentence: jsonargparse tells of every type that it has tried, in ten lines."""

import re
import sys
from typing import NoReturn

from jsonargparse import ArgumentParser
from jsonargparse._util import import_object

from lightning_drm.merging import METHODS, Method
from lightning_drm.training.foreign import problem_of_class

_KEY = re.compile(r'Parser key "([\w.]+)"')
_NO_IMPORT_PATH = re.compile(r"Expected a dot import path string: (\S+)|Unexpected import path format: (\S+)")
_WRONG_CLASS = re.compile(r"Import path (\S+) does not correspond to a subclass of (\w+)")
_PROBLEM = re.compile(r"Problem with given class_path '([\w.]+)'")
_WRONG_VALUE = re.compile(r"Expected a <class '(\w+)'>\. Got value: (.*)")
_NO_CHOICE = re.compile(r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)")
_OPTION = re.compile(r"^ *- (?:Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*)\])$)?", re.MULTILINE)
_GIVEN = re.compile(r"Given value: (.*)")
_NO_ARGUMENT = re.compile(r"Option '(\w+)' is not accepted")
_LACKING = re.compile(r"the following arguments are required: (.*)")
_NO_CLASS = re.compile(r"No [\w.]+ attribute|No module named|Unexpected import")
_OF_METHODS = ("drm.method", "methods")
UNION = "Does not validate against any of the Union subtypes"
_NOISE = (
    UNION,
    "Subtypes:",
    "Errors:",
    "Given value",
    "- Expected a <class 'NoneType'>",
    "- Expected a path",
)
_PLAIN = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text"}


class OneSentence(ArgumentParser):
    """A parser that says what is wrong in one sentence, without its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with a sentence and exit code 2, or raises where the caller says it."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"lightning-drm: {sentence(message)}", file=sys.stderr)
        sys.exit(2)


def sentence(message: str) -> str:
    r"""Makes one sentence of a parser's message.

    Args:
        message: What jsonargparse says.

    Example:
        >>> print(sentence("Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: many"))
        trainer.max_steps: expected a whole number, got 'many'.
    """
    keys = _KEY.findall(message)
    key = ".".join(keys)
    problem = _PROBLEM.search(message)
    if wrong := _WRONG_CLASS.search(message):
        return f"{key}: {_not_a(wrong[1], wrong[2])}"
    if key in _OF_METHODS and (name := _NO_IMPORT_PATH.search(message)):
        return f"{key}: There is no method {name[1] or name[2]!r}; {_methods()}"
    if key in _OF_METHODS and problem and _NO_CLASS.search(message):
        return f"{key}: There is no method {problem[1]!r}; {_methods()}"
    if wrong := _WRONG_VALUE.search(message):
        return f"{key}: expected {_PLAIN.get(wrong[1], wrong[1])}, got {wrong[2]!r}."
    if wrong := _NO_CHOICE.search(message):
        return f"{key}: expected one of {wrong[1].replace(chr(39), '')}, got {wrong[2]!r}."
    if (given := _GIVEN.search(message)) and (options := _options(message)):
        return f"{key}: expected {' or '.join(options)}, got {given[1]!r}."
    if key == "model" and problem and problem[1] == "lightning.LightningModule":
        return "model: expected class_path with the module's class, and init_args with its arguments."
    if problem and (unknown := _NO_ARGUMENT.search(message)):
        return f"{key}: {problem[1]} has no argument {unknown[1]!r}."
    if problem and (lacking := _LACKING.search(message)):
        return f"{key}: {problem[1]} needs init_args with {lacking[1]}."
    lines = [line.strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ").rstrip(":") for line in lines if line and not line.startswith(_NOISE)]
    return f"{': '.join(kept).removesuffix('.')}."


def _options(message: str) -> list[str]:
    """What a value may be of several plain types; nothing if a class or a list is among them."""
    found = _OPTION.findall(message)
    if not all(kind or words for kind, words in found):
        return []
    return [_PLAIN.get(kind, kind) or words.replace("'", "") for kind, words in found if kind != "NoneType"]


def _not_a(path: str, wanted: str) -> str:
    """Why a class cannot stand where another kind of class is wanted."""
    if wanted == Method.__name__:
        return f"{path} is not a method; {_methods()}"
    if problem := problem_of_class(import_object(path)):
        return problem
    return f"{path} is not a {wanted}."


def _methods() -> str:
    found = ", ".join(kind.__name__ for kind in METHODS)
    return f"the methods are {found}, and one of your own goes by its import path, my_package.MyMethod."
