r"""Gram matrices of what goes into linear layers: sums of :math:`x x^T` over all inputs x, while batches go through.

Hooks see the inputs of each layer as the model computes them. Products are in the inputs' precision, float32 at least,
and are summed in float64. Layers that are called with the same tensor one after the other (query, key and value of an
attention, gate and up of an MLP) share one sum, and the product is made once.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
"""Layers that map each input x to x Wᵀ, or to x W where the weight is stored (in, out)."""


class CalledApartError(Exception):
    """Layers that shared their inputs in some calls did not in others."""


class _Sum:
    """Σ x xᵀ over the inputs of one layer, or of several that share them."""

    def __init__(self, leader: str, inputs: Tensor) -> None:
        size = inputs.shape[-1]
        self.leader = leader
        self.matrix = torch.zeros(size, size, dtype=torch.float64, device=inputs.device)
        self.num_rows = 0
        self.num_calls = 0

    def add(self, rows: Tensor) -> None:
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self.matrix += rows.T @ rows
        self.num_rows += len(rows)
        self.num_calls += 1


class InputGrams:
    """Collects while it is entered.

    Args:
        layers: Linear layers, by the name of their weight.
        sharing: Whether layers with the same inputs share a sum.

    Attributes:
        padding: Of the batch that comes next, by stack (``encoder`` and, if there is one, ``decoder``), a mask
            (batch, positions) that is true where positions count. All count where none fits.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, sharing: bool = True) -> None:
        self._layers = layers
        self._sharing = sharing
        self._sums: dict[str, _Sum] = {}
        self._num_calls = dict.fromkeys(layers, 0)
        self._last: tuple[Tensor, int, _Sum] | None = None
        self._hooks: list[Any] = []
        self.padding: Mapping[str, Tensor] = {}

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._last = [], None

    def leaders(self) -> dict[str, str]:
        """By layer, the first one of those that share its sum; only layers that were called.

        Raises:
            CalledApartError: If a layer was not called as often as the one that it shares a sum with.
        """
        for name, own in self._sums.items():
            if self._num_calls[name] != own.num_calls:
                raise CalledApartError(name)
        return {name: own.leader for name, own in self._sums.items()}

    def sums(self) -> dict[str, tuple[Tensor, int]]:
        """By leader, Σ x xᵀ (n, n) in float64, and the number of inputs."""
        return {own.leader: (own.matrix, own.num_rows) for own in self._sums.values()}

    def _hook(self, name: str) -> Any:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._note(name, args[0] if args else next(iter(kwargs.values())))

        return note

    @torch.no_grad()
    def _note(self, name: str, inputs: Tensor) -> None:
        self._num_calls[name] += 1
        own = self._sums.get(name)
        if self._sharing and self._last is not None:
            last, version, shared = self._last
            if last is inputs and version == inputs._version:
                if own is None and shared.num_calls == 1:
                    self._sums[name] = own = shared
                if own is shared:
                    return
        if own is None:
            own = self._sums[name] = _Sum(name, inputs)
        elif own.leader != name:
            raise CalledApartError(name)
        rows, counts = inputs.reshape(-1, inputs.shape[-1]), self.counted(name, inputs)
        own.add(rows if counts is None else rows[counts])
        self._last = inputs, inputs._version, own

    def counted(self, name: str, inputs: Tensor) -> Tensor | None:
        """Which of a layer's inputs count, those of padding do not: a mask (positions,), or ``None`` for all.

        Args:
            name: The name of the layer's weight.
            inputs: Its inputs (…, n).
        """
        fitting = {
            stack: mask
            for stack, mask in self.padding.items()
            if mask.numel() == inputs.shape[:-1].numel() and (inputs.ndim == 2 or mask.shape[-1] == inputs.shape[-2])
        }
        if not fitting:
            return None
        stack = "decoder" if _reads_decoder(name) else "encoder"
        return fitting.get(stack, next(iter(fitting.values()))).reshape(-1)


def _reads_decoder(name: str) -> bool:
    """Whether a layer's inputs are the decoder's positions; a cross-attention's keys and values are the encoder's."""
    *parents, layer = name.removesuffix(".weight").split(".")
    across = any("encdec" in parent.lower() or "encoder_attn" in parent or "cross" in parent for parent in parents)
    return "decoder" in parents and not (across and layer in ("k", "v", "k_proj", "v_proj", "key", "value"))
