"""A recipe: the method, the parameters it applies to, and one coefficient per task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_drm.deltas import Kind
from lightning_drm.merging import Method

Rule = Literal["method", "average"]


@dataclass(frozen=True)
class Recipe:
    """What is done to each parameter of the backbone. Heads are never merged.

    A method on matrices (DRM, Iso-C, Iso-CTS, TSV-M) merges the weights of linear layers; embeddings, biases, norms and
    buffers get the average weighted by the coefficients, times the method's ``scale`` (arXiv 2505.23117 gives them the
    average; its published code elects signs there). An elementwise method (averaging, task arithmetic, TIES, DARE-TIES)
    is defined on whole task vectors and merges every parameter.

    Attributes:
        method: The merging method.
        coefficients: Coefficient by task; 1.0 for a task that is not named.
        convolutions: ``"matrix"`` lets a matrix method merge convolution weights as ``(out, in·k·k)`` matrices;
            ``"average"`` treats them like embeddings.
    """

    method: Method
    coefficients: Mapping[str, float] = field(default_factory=dict)
    convolutions: Literal["average", "matrix"] = "average"

    def rule(self, kind: Kind) -> Rule:
        """The rule for a parameter of some kind."""
        if self.method.elementwise or kind == "matrix" or (kind == "convolution" and self.convolutions == "matrix"):
            return "method"
        return "average"

    def coefficients_of(self, tasks: Sequence[str]) -> list[float]:
        """The coefficients of some tasks, in their order."""
        return [self.coefficients.get(task, 1.0) for task in tasks]

    def check(self, tasks: Sequence[str]) -> None:
        """Refuses coefficients of tasks that do not exist.

        Args:
            tasks: The names of all tasks.

        Raises:
            ValueError: Naming the unknown tasks and the known ones.
        """
        unknown = sorted(set(self.coefficients) - set(tasks))
        if unknown:
            raise ValueError(
                f"Coefficients are given for unknown tasks {', '.join(unknown)}; tasks: {', '.join(tasks)}."
            )
