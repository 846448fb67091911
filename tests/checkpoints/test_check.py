"""What the check after writing finds: weights that no merge gives, lost tasks and layers, and the wrong base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_drm import DRM, TSVM, Average, IsoC, TaskArithmetic, merge_checkpoints
from lightning_drm.checkpoints.writing.result import MergeResult
from lightning_drm.merging import Method

Weights = dict[str, Tensor]
METHOD = DRM()


def random(seed: int, scale: float = 1.0) -> Weights:
    """A model with a matrix that is larger than the sample of the check."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wide.weight": (160, 1024), "dense.weight": (24, 16), "dense.bias": (24,)}
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plus(base: Weights, change: Weights) -> Weights:
    return {name: tensor + change[name] for name, tensor in base.items()}


def merge(
    folder: Path, base: Weights, finetunes: dict[str, Weights], method: Method = METHOD, **options: object
) -> MergeResult:
    save_file(base, folder / "base.safetensors")
    for task, weights in finetunes.items():
        save_file(weights, folder / f"{task}.safetensors")
    paths = {task: folder / f"{task}.safetensors" for task in finetunes}
    return merge_checkpoints(folder / "base.safetensors", paths, folder / "out", method, **options)


@pytest.fixture
def base() -> Weights:
    return random(0)


@pytest.fixture
def finetunes(base: Weights) -> dict[str, Weights]:
    return {task: plus(base, random(seed, 0.01)) for seed, task in enumerate(("cola", "rte", "sst2"), 1)}


@pytest.mark.parametrize("row", [0, 77, 159])
@pytest.mark.parametrize("method", [DRM(), IsoC(), TSVM(), Average()], ids=lambda method: type(method).__name__)
def test_one_damaged_entry_is_named_wherever_it_is(
    tmp_path: Path, base: Weights, finetunes: dict[str, Weights], method: Method, row: int
):
    finetunes["rte"]["wide.weight"][row, 1000] = 1e20
    with pytest.raises(ValueError, match=r"wide\.weight would reach \d(\.\d)?e\+\d\d.*: rte changes it by 1e\+20\.$"):
        merge(tmp_path, base, finetunes, method)
    assert not (tmp_path / "out").exists()


def test_what_the_base_has_itself_is_no_damage(tmp_path: Path, base: Weights, finetunes: dict[str, Weights]):
    for weights in (base, *finetunes.values()):
        weights["wide.weight"][3, 3] = 1e9
    merge(tmp_path, base, finetunes)
    assert load_file(tmp_path / "out/model.safetensors")["wide.weight"][3, 3] == pytest.approx(1e9)


def test_a_coefficient_that_blows_up_is_named(tmp_path: Path, base: Weights, finetunes: dict[str, Weights]):
    with pytest.raises(ValueError, match="the method or a coefficient blows it up"):
        merge(tmp_path, base, finetunes, Average(), coefficients={"rte": 1e12})


def test_rows_from_the_whole_of_a_matrix_are_compared(tmp_path: Path, base: Weights, finetunes: dict[str, Weights]):
    for row in range(80):  # more than a sample from the start would see
        finetunes["rte"]["wide.weight"][row] = base["wide.weight"][row]
    alone = {"rte": finetunes["rte"]}
    assert merge(tmp_path, base, alone, Average()).survived["rte"] == pytest.approx(1, abs=1e-5)


def test_what_cancels_is_refused(tmp_path: Path, base: Weights, finetunes: dict[str, Weights]):
    twins = {"one": finetunes["rte"], "two": finetunes["rte"]}
    with pytest.raises(ValueError, match=r"nothing is left of what task 0, 1 changed: the changes cancel each other"):
        merge(tmp_path, base, twins, DRM(), coefficients={"two": -1.0})
    assert not (tmp_path / "out").exists()


def test_a_layer_without_room_for_all_tasks_is_refused(tmp_path: Path, base: Weights):
    tasks = {f"task{seed}": plus(base, random(seed, 0.01)) for seed in range(1, 18)}
    with pytest.raises(ValueError, match=r"^dense\.weight: .*TSVM\(scale=1\.0\) has no room for 17 tasks .*\(24, 16\)"):
        merge(tmp_path, base, tasks, TSVM())


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_a_wrong_base_is_mentioned(tmp_path: Path, finetunes: dict[str, Weights], num_tasks: int):
    chosen = dict(list(finetunes.items())[:num_tasks])
    result = merge(tmp_path, random(99), chosen)
    assert any("base.safetensors may be the wrong base" in note for note in result.notes)


@pytest.mark.parametrize("scale", [0.01, 0.3, 2.0])
def test_the_right_base_is_not(tmp_path: Path, base: Weights, scale: float):
    """Not even where each task moves it far, in its own direction."""
    tasks = {task: plus(base, random(seed, scale)) for seed, task in enumerate(("cola", "rte", "sst2"), 1)}
    assert not [note for note in merge(tmp_path, base, tasks, TaskArithmetic()).notes if "wrong base" in note]
