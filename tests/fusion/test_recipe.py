"""A recipe describes itself so that the description can be used again."""

import inspect
import pydoc
from collections.abc import Mapping
from typing import Any

import pytest

import lightning_drm
from helpers.own_method import Largest
from lightning_drm.fusion import Recipe
from lightning_drm.fusion.model_card import model_card
from lightning_drm.merging import Method, TaskArithmetic

METHODS = [
    exported
    for name in lightning_drm.__all__
    if inspect.isclass(exported := getattr(lightning_drm, name)) and issubclass(exported, Method)
]


def _made(method: type[Method]) -> Method:
    """The method with its defaults; around another one where it needs one."""
    needed = [name for name, p in inspect.signature(method).parameters.items() if p.default is p.empty]
    return method(**dict.fromkeys(needed, TaskArithmetic(0.3)))


def _read(description: Mapping[str, Any]) -> Method:
    """The method that a description tells of, as jsonargparse would make it."""
    arguments = description["init_args"].items()
    return pydoc.locate(description["class_path"])(
        **{name: _read(value) if isinstance(value, dict) else value for name, value in arguments}
    )


@pytest.mark.parametrize("method", [*METHODS, Largest])
def test_its_class_path_imports_the_method(method: type[Method]):
    made = _made(method)
    description = Recipe(made).description(["a", "b"])
    assert pydoc.locate(description["class_path"]) is method
    assert _read(description) == made


def test_this_package_exports_its_methods_under_its_own_name():
    assert len(METHODS) >= 8
    for method in METHODS:
        assert Recipe(_made(method)).description([])["class_path"] == f"lightning_drm.{method.__name__}"


def test_a_users_own_method_is_called_by_its_module():
    assert Recipe(Largest()).description(["a"])["class_path"] == "helpers.own_method.Largest"


def test_a_model_card_names_a_users_own_method_by_its_module():
    card = model_card(Recipe(Largest(0.5)), {"a": {"survived": "100 %"}}, base="x", base_fingerprint="0")
    assert "`Largest(density=0.5, scale=0.25)`, whose class is `helpers.own_method.Largest`" in card
