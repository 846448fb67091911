r"""Gram matrices of what goes into each expert of a layer: sums of :math:`x x^T` over the inputs that it gets.

transformers keeps the experts of a layer in two weights of three dimensions, and a router says which inputs x each one
gets. A hook sees the inputs of ``gate_up_proj`` (or ``up_proj``); those of ``down_proj`` are what the first product and
the gate make of them, which is computed once more here, as no layer is called with them. Sums are divided by the number
of all inputs of the layer, so that RegMean gives an expert that a task seldom uses little weight in that task.

Cost, beside the forward pass: the first product once more, and what a sum costs (see `input_grams.py`) for each expert.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

FIRST, SECOND = ("gate_up_proj", "up_proj"), "down_proj"


def is_weight_of_experts(layer: nn.Module, parameter: str) -> bool:
    """Whether a layer's parameter is a weight of experts that transformers' interface for experts computes.

    Args:
        layer: The layer.
        parameter: The parameter's own name.
    """
    return hasattr(layer, "_apply_gate") and hasattr(layer, "is_transposed") and parameter in (*FIRST, SECOND)


def inputs_of_experts(layer: nn.Module, parameter: str) -> tuple[int, int]:
    """The number of experts, and of the inputs that one has.

    Args:
        layer: The layer.
        parameter: Which of its weights, stored (experts, out, in), or (experts, in, out) where the layer says so.
    """
    weight = getattr(layer, parameter)
    return weight.shape[0], weight.shape[1 if layer.is_transposed else 2]


class ExpertGrams:
    """Collects while it is entered.

    Args:
        layers: Layers of experts, by the names of their weights.
        counted: Given a name and inputs (positions, n), a mask of the positions that count, or ``None`` if all do.
    """

    def __init__(self, layers: Mapping[str, nn.Module], counted: Callable[[str, Tensor], Tensor | None]) -> None:
        self._names: dict[nn.Module, dict[str, str]] = {}
        for name, layer in layers.items():
            self._names.setdefault(layer, {})[name.rpartition(".")[2]] = name
        self._counted = counted
        self._sums: dict[str, Tensor] = {}
        self._num_rows: dict[str, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in self._names]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def sums(self) -> dict[str, tuple[Tensor, int]]:
        """By name, Σ x xᵀ of each expert (experts, n, n) in float64, and the number of inputs of all together."""
        return {name: (total, self._num_rows[name]) for name, total in self._sums.items()}

    @torch.no_grad()
    def _note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden, chosen = (cast(Tensor, value) for value in [*args, *kwargs.values()][:2])
        rows = hidden.reshape(-1, hidden.shape[-1])
        chosen = chosen.reshape(len(rows), -1)
        names = self._names[layer]
        counts = self._counted(next(iter(names.values())), rows)
        for name in names.values():
            self._num_rows[name] = self._num_rows.get(name, 0) + (len(rows) if counts is None else int(counts.sum()))
        for expert in sorted(set(chosen.flatten().tolist())):
            if expert >= len(getattr(layer, SECOND)):  # a router's word for experts of another process
                continue
            taken = (chosen == expert).any(-1) & (counts if counts is not None else True)
            for parameter, name in names.items():
                inputs = _between(layer, expert, rows[taken]) if parameter == SECOND else rows[taken]
                if name not in self._sums:
                    number, size = inputs_of_experts(layer, parameter)
                    self._sums[name] = torch.zeros(number, size, size, dtype=torch.float64, device=rows.device)
                inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
                self._sums[name][expert] += inputs.T @ inputs


def _between(layer: Any, expert: int, rows: Tensor) -> Tensor:
    """What goes into an expert's second product."""
    parameter = FIRST[0] if layer.has_gate else FIRST[1]
    weight = getattr(layer, parameter)[expert]
    bias = getattr(layer, f"{parameter}_bias")[expert] if layer.has_bias else None
    product = functional.linear(rows, weight.T if layer.is_transposed else weight, bias)
    return cast(Tensor, layer._apply_gate(product) if layer.has_gate else layer.act_fn(product))
