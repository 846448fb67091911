"""LoRA adapters merged in a low-rank space, from files: what comes out is an adapter again, which peft loads."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers import models, reference
from lightning_drm import DARETIES, TIES, KnOTS, merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan
from lightning_drm.fusion import Recipe

pytestmark = pytest.mark.usefixtures("small_pieces")
DENSITY = 0.4
COEFFICIENTS = {"a": 0.7, "c": 1.2}
IN_ORDER = [0.7, 1.0, 1.2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama, and three adapters of different ranks on two of its layers."""
    path = tmp_path_factory.mktemp("adapters")
    base = models.base_model("llama")
    base.save_pretrained(path / "base")
    for seed, task in enumerate("abc", 1):
        models.adapter("llama", base, seed, r=seed + 1).save_pretrained(path / task)
    return path


def paths(folder):
    return {task: str(folder / task) for task in "abc"}


def dense_deltas(folder):
    """By parameter, the three deltas that peft itself makes of the adapters, in float64."""
    base = models.base_model("llama")
    start = {name: value.double() for name, value in base.state_dict().items()}
    states = [
        PeftModel.from_pretrained(copy.deepcopy(base).double(), path).merge_and_unload().state_dict()
        for path in paths(folder).values()
    ]
    adapted = [name for name in start if not torch.equal(states[0][name], start[name])]
    assert len(adapted) == 4
    return {name: [state[name] - start[name] for state in states] for name in adapted}


@pytest.mark.parametrize(
    ("method", "space"),
    [(TIES(DENSITY, space="core"), reference.cores), (KnOTS(DENSITY), reference.knots_space)],
    ids=["core_ties", "knots"],
)
def test_adapters_in_an_adapter_out(method, space, folder, tmp_path):
    settings = {"coefficients": COEFFICIENTS}
    result = merge_checkpoints(folder / "base", paths(folder), tmp_path / "adapter", method, **settings)
    assert result.output_format == "adapter"
    merge_checkpoints(folder / "base", paths(folder), tmp_path / "full", method, output_format="full", **settings)

    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(min(factor.shape) <= 2 + 3 + 4 for factor in written.values())
    base = models.base_model("llama")
    adapter = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    full = type(base).from_pretrained(tmp_path / "full")
    deltas = dense_deltas(folder)
    expected = dict(
        zip(
            deltas,
            reference.ties_between_bases([space(parts) for parts in deltas.values()], IN_ORDER, DENSITY),
            strict=True,
        )
    )
    for merged in (adapter.state_dict(), full.state_dict()):
        for name, value in base.state_dict().items():
            target = value.double() + expected[name] if name in expected else value.double()
            torch.testing.assert_close(merged[name].double(), target, rtol=1e-6, atol=1e-6)

    card = (tmp_path / "adapter" / "README.md").read_text()
    assert type(method).__name__ in card
    assert ("core" in card) == isinstance(method, TIES)


def test_draws_are_those_of_a_whole_model(folder, tmp_path):
    method = DARETIES(0.5, seed=3, space="core")
    for form in ("adapter", "full"):
        merge_checkpoints(folder / "base", paths(folder), tmp_path / form, method, output_format=form)
    merge_checkpoints(folder / "base", paths(folder), tmp_path / "again", method)
    base = models.base_model("llama")
    adapter = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload().state_dict()
    full = type(base).from_pretrained(tmp_path / "full").state_dict()
    for name, value in full.items():
        torch.testing.assert_close(adapter[name], value, rtol=1e-6, atol=1e-6)
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_merged_adapter_is_merged_again(folder, tmp_path):
    """With everything kept, one task is itself."""
    method = TIES(1.0, space="core")
    merge_checkpoints(folder / "base", paths(folder), tmp_path / "first", method)
    merge_checkpoints(folder / "base", {"all": str(tmp_path / "first")}, tmp_path / "second", method)
    base = models.base_model("llama")
    first, second = (
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).merge_and_unload().state_dict()
        for name in ("first", "second")
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-6)


def test_a_rank_limit_reports_its_error(folder, tmp_path):
    result = merge_checkpoints(folder / "base", paths(folder), tmp_path / "out", TIES(0.4, space="core"), rank=2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert len(result.rank_errors) == 4
    assert all(0 < error < 1 for error in result.rank_errors.values())


def test_a_full_finetune_is_named_before_anything_is_read(folder, tmp_path):
    """In the plan, and so by a dry run, too."""
    models.finetune("llama", models.base_model("llama"), 7).save_pretrained(tmp_path / "whole")
    inputs = {**paths(folder), "d": str(tmp_path / "whole")}
    plan = make_plan(str(folder / "base"), inputs, Recipe(TIES(space="core")), MismatchPolicy())
    (problem,) = [problem for problem in plan.problems if "core space" in problem]
    assert problem == (
        "TIES: core space needs low-rank deltas, such as LoRA's, but d changes model.layers.0.mlp.down_proj.weight and "
        "13 other parameters in full."
    )
    with pytest.raises(ValueError, match="TIES: core space needs low-rank deltas"):
        merge_checkpoints(folder / "base", inputs, tmp_path / "out", TIES(space="core"))
    assert not make_plan(str(folder / "base"), inputs, Recipe(KnOTS()), MismatchPolicy()).problems
