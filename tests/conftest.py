"""What tests of several folders share. Processes that a test starts find this package and the tests' helpers."""

import functools
import gc
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import registry
from torch import Tensor

from helpers.devices import DEVICES
from lightning_drm.deltas import Collected, TaskStatistics, TaskVector
from lightning_drm.deltas.parameters import Kind
from lightning_drm.fusion import pieces
from lightning_drm.merging import Delta, LowRank, Need

TESTS = Path(__file__).parent
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

if WORKERS > 1:  # they share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))

# Each Trainer looks through all installed packages for callbacks, which takes it longer than a small fit's step.
registry.entry_points = functools.cache(registry.entry_points)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file share fixtures, so one worker runs them all. As an option, it would keep benchmarks from
    running at all."""
    from xdist.scheduler import LoadFileScheduling  # it is not there where tests run in one process

    config.option.loadscopereorder = False  # files come in the order below, not by their number of tests
    return LoadFileScheduling(config, log)


# Fixtures that are a whole run after its fit, or more.
FINISHED_RUNS = {"analyzed", "finished", "quickstart", "three_tasks"}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes, attacks, or needs a finished run is slow, so that one word leaves out all that is."""
    for item in items:
        needs_run = not FINISHED_RUNS.isdisjoint(getattr(item, "fixturenames", ()))
        if needs_run or item.get_closest_marker("processes") or item.get_closest_marker("attacks"):
            item.add_marker("slow")
    if WORKERS > 1:  # what takes longest comes first, or one worker would wait for the other at the end
        long = {item.path for item in items if item.get_closest_marker("processes")}
        items.sort(key=lambda item: item.path not in long)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` needs nothing that the package itself does not: a file that imports more has no such test."""
    if config.getoption("markexpr") != "gpu" or collection_path.suffix != ".py":
        return None
    imported = re.findall(r"^(?:from|import) (\w+)", collection_path.read_text(encoding="utf-8"), re.MULTILINE)
    return True if any(find_spec(name) is None for name in imported) else None


os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module", params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where it is computed: tests that ask for it run on the CPU, and on a GPU where there is one."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections() -> None:
    """Modules that were imported stay to the end. A run collects garbage several times, and looking through all of them
    took it a third of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def few_resampled_sets() -> Iterator[None]:
    """Where intervals, which are tested elsewhere, would cost most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["lightning_drm.evaluation.measure"], "NUM_RESAMPLES", 50)
        yield


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that parameters of tiny models have several."""
    monkeypatch.setattr(pieces, "PIECE", 256)


SHAPES: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "dense.weight": ("matrix", (9, 7)),
    "adapted.weight": ("matrix", (6, 8)),
    "embed.weight": ("embedding", (11, 5)),
    "conv.weight": ("convolution", (4, 3, 2, 2)),
    "dense.bias": ("other", (9,)),
    "token": ("other", (1, 1, 5)),
    "scale": ("other", ()),
}
BASE = dict.fromkeys([*SHAPES, "frozen"], "same")


@pytest.fixture
def vectors() -> list[TaskVector]:
    """Three tasks; one weight is adapted in each, and not all train the same parameters."""
    absent = {"zeta": ["dense.bias"], "alpha": ["dense.weight", "adapted.weight"], "mid": ["conv.weight", "scale"]}
    generator = torch.Generator().manual_seed(0)

    def delta(name: str, size: float) -> Delta:
        shape = SHAPES[name][1]
        if name == "adapted.weight":
            up, down = (torch.randn(*part, generator=generator, dtype=torch.float64) for part in ((6, 3), (3, 8)))
            return LowRank(size * up, down)
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    def head() -> dict[str, Tensor]:
        return {"head.weight": torch.randn(2, 3, generator=generator)}

    def statistics() -> TaskStatistics:
        own = torch.Generator().manual_seed(int(torch.randint(1000, (), generator=generator)))
        tensors: dict[str, Tensor] = {}
        for name in ("dense.weight", "adapted.weight"):
            inputs = torch.randn(30, SHAPES[name][1][1], generator=own, dtype=torch.float64)
            tensors[f"gram::{name}"] = inputs.T @ inputs / 30
        for name, (_, shape) in SHAPES.items():
            tensors[f"fisher::{name}"] = torch.rand(shape, generator=own, dtype=torch.float64)
        keys: dict[Need, dict[str, str]] = {
            need: {key.partition("::")[2]: key for key in tensors if key.startswith(need)}
            for need in ("gram", "fisher")
        }
        return TaskStatistics(tensors, keys, dict.fromkeys(keys, Collected()), fisher_norm=2.0)

    return [
        TaskVector(
            task=task,
            deltas={name: delta(name, size) for name in SHAPES if name not in absent[task]},
            kinds={name: kind for name, (kind, _) in SHAPES.items() if name not in absent[task]},
            head=head(),
            base_hashes=BASE,
            statistics=statistics(),
        )
        for task, size in (("zeta", 1.0), ("alpha", 0.3), ("mid", 2.0))
    ]


@pytest.fixture
def dense(vectors: list[TaskVector]) -> dict[str, list[Tensor]]:
    """By parameter, all tasks' deltas in the order of the tasks' names; zeros where a task has none."""
    return {
        name: [_dense(vector.deltas.get(name), shape) for vector in sorted(vectors, key=lambda vector: vector.task)]
        for name, (_, shape) in SHAPES.items()
    }


def _dense(delta: Delta | None, shape: tuple[int, ...]) -> Tensor:
    if delta is None:
        return torch.zeros(shape, dtype=torch.float64)
    return delta.up @ delta.down if isinstance(delta, LowRank) else delta
