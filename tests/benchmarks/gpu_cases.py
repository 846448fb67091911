"""What `gpu.py` merges: the matrices of real models by their shapes, every method of the package, and plain code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.card import Rates
from lightning_drm.merging import (
    DARETIES,
    DRM,
    METHODS,
    SVC,
    TIES,
    TSVM,
    WUDI,
    Average,
    Delta,
    IsoC,
    LowRank,
    Method,
    Statistics,
    TaskArithmetic,
)

Shape = tuple[int, int]


@dataclass(frozen=True)
class Model:
    """The linear layers of a model, finetuned for some tasks.

    Attributes:
        title: Its name.
        shapes: By shape, how many there are.
        num_tasks: Number of tasks.
        rank: Rank of the adapters; ``None`` where all of it was finetuned.
    """

    title: str
    shapes: dict[Shape, int]
    num_tasks: int
    rank: int | None = None

    def tiny(self) -> Model:
        """The same with sides of a 64th."""
        small = {(rows // 64, columns // 64): count for (rows, columns), count in self.shapes.items()}
        return replace(self, shapes=small, rank=self.rank and max(1, self.rank // 8))

    def deltas(self, shape: Shape, device: torch.device) -> list[Delta]:
        """Random deltas with a part in common, drawn on the device."""
        rows, columns = shape
        generator = torch.Generator(device).manual_seed(rows * columns)

        def drawn(*sides: int) -> Tensor:
            return torch.randn(sides, generator=generator, device=device)

        if self.rank is not None:
            return [LowRank(drawn(rows, self.rank), drawn(self.rank, columns)) for _ in range(self.num_tasks)]
        common = 0.5 * drawn(rows, columns)
        return [common + drawn(rows, columns) for _ in range(self.num_tasks)]

    def statistics(self, shape: Shape, method: Method, device: torch.device) -> list[Statistics] | None:
        """What a method needs of the tasks' data, drawn on the device."""
        rows, columns = shape
        generator = torch.Generator(device).manual_seed(columns)
        if method.needs == "gram":
            inputs = [
                torch.randn(2 * columns, columns, generator=generator, device=device) for _ in range(self.num_tasks)
            ]
            return [Statistics(gram=one.T @ one / len(one)) for one in inputs]
        if method.needs == "fisher":
            return [
                Statistics(fisher=torch.rand(rows, columns, generator=generator, device=device))
                for _ in range(self.num_tasks)
            ]
        return None


_LLAMA = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
MODELS = {
    "vitb": Model("ViT-B/32 × 8", {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}, 8),
    "vitl": Model("ViT-L/14 × 8", {(1024, 1024): 96, (4096, 1024): 24, (1024, 4096): 24}, 8),
    "lora": Model("Llama-3.1-8B × 5, LoRA r = 16", _LLAMA, 5, rank=16),
    "llama": Model("Llama-3.1-8B × 4", _LLAMA, 4),
}

_FIRST: dict[str, Method] = {  # those with a bound, or with plain code, before the time is up
    "TIES": TIES(),
    "IsoC": IsoC(),
    "DRM": DRM(),
    "TSVM": TSVM(),
}
_MORE: dict[str, Method] = {
    "DRM vertical": DRM("vertical"),
    "SVC(TaskArithmetic)": SVC(TaskArithmetic()),
    "WUDI with inputs": WUDI(input_weight=1.0),
}
_OF_FACTORS: dict[str, Method] = {
    "TIES in core space": TIES(space="core"),
    "DARETIES in core space": DARETIES(space="core"),
}


def methods_for(model: Model) -> dict[str, Method]:
    """Every method of the package that applies, by name."""
    defaults = {kind.__name__: kind() for kind in METHODS}
    return {**_FIRST, **defaults, **_MORE, **(_OF_FACTORS if model.rank is not None else {})}


PLAIN: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "DRM": published.drm,
    "IsoC": published.iso_c,
    "TSVM": published.tsv_m,
    "TaskArithmetic": published.task_arithmetic,
}
LARGEST_PLAIN = 1024  # where the shorter side is longer, an SVD of the stack takes minutes


def merge(method: Method, deltas: Sequence[Delta], statistics: Sequence[Statistics] | None) -> Tensor:
    """One parameter, with the pass over it that a method takes before, if it takes any over the model."""
    return method.calibrate(lambda: [deltas], num_tasks=len(deltas)).merge(deltas, statistics=statistics)


def calibrated(method: Method, model: Model, of_shapes: Mapping[Shape, Sequence[Delta]]) -> Method:
    """A method that has seen the whole model, of which matrices of one shape are the same here."""

    def stream() -> Iterator[Sequence[Delta]]:
        return (of_shapes[shape] for shape, count in model.shapes.items() for _ in range(count))

    return method.calibrate(stream, num_tasks=model.num_tasks)


def floor(method: Method, model: Model, shape: Shape, rates: Rates) -> float | None:
    """Seconds that a matrix takes at least at these rates, where that can be said: DRM, Iso-C, and sums of entries.

    Deltas are read and the result is written once (TIES reads them twice). An eigenproblem of side k is reduced in one
    stage, which reads 4/3 k³ bytes, and its vectors are transformed back; before that is a Gram matrix of doubles, and
    after it two products in float32.
    """
    (rows, columns), num_tasks = shape, model.num_tasks
    if model.rank is not None:
        return None
    move = 4.0 * rows * columns * (num_tasks + 1) / rates.copied
    if isinstance(method, TIES):
        return 2 * move
    if isinstance(method, Average | TaskArithmetic):
        return move
    if not isinstance(method, DRM | IsoC):
        return None
    side = method.square_side(shape, num_tasks)
    long = prod(shape) * (num_tasks if isinstance(method, DRM) else 1) / side
    eigen = 4 / 3 * side**3 / rates.copied + 14 / 3 * side**3 / rates.double
    return move + side**2 * long / rates.double + eigen + 2 * side**2 * long / rates.single
