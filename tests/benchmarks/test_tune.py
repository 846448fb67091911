"""The merging part of `tune`: an 80-point grid with and without what its settings share."""

from benchmarks.timing import interleaved, make_deltas
from lightning_drm.deltas import TaskVector
from lightning_drm.fusion import Decompositions, Recipe
from lightning_drm.fusion.fuse import Fusion
from lightning_drm.merging import DRM
from lightning_drm.tuning import search_space

SHAPES = {"query": (384, 384), "value": (384, 384), "up": (1536, 384), "down": (384, 1536)}  # a part of a MiniLM block
TASKS = ["first", "second", "third", "fourth"]


def vectors() -> list[TaskVector]:
    deltas = {name: make_deltas(shape, len(TASKS)) for name, shape in SHAPES.items()}
    return [
        TaskVector(
            task=task,
            deltas={f"{name}.weight": deltas[name][place] for name in SHAPES},
            kinds=dict.fromkeys([f"{name}.weight" for name in SHAPES], "matrix"),
            head={},
            base_hashes=dict.fromkeys([f"{name}.weight" for name in SHAPES], "same"),
        )
        for place, task in enumerate(TASKS)
    ]


def test_grid(benchmark, capsys):
    """80 settings: all merged from the start, and as `tune` merges them."""
    finetuned = vectors()
    (family,) = search_space(Recipe(DRM()), TASKS)
    settings = [family.setting(point) for point in family.points]

    def from_the_start() -> None:
        for setting in settings:
            dict(Fusion(setting, finetuned))

    def as_tune_does() -> None:
        unit, merged = None, {}
        with Decompositions() as kept:
            for setting in settings:
                base, scale = setting.at_unit_scale()
                if base != unit:
                    unit, merged = base, dict(Fusion(base, finetuned, decompositions=kept))
                for delta in merged.values():
                    delta * scale
            assert kept.num_decomposed == len(SHAPES)

    times = interleaved({"from the start": from_the_start, "reuse": as_tune_does}, rounds=1)
    benchmark.pedantic(as_tune_does, rounds=1)
    ratio = times["from the start"] / times["reuse"]
    benchmark.extra_info.update(times, ratio=ratio)
    with capsys.disabled():
        print(f"\n  80 settings of DRM: {times['reuse']:.2f} s with reuse, {ratio:.1f} × from the start")
