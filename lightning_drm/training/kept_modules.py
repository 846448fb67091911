"""Every task's own module, without its weights: what the merged module needs of it beside the merged backbone."""

import warnings
from collections.abc import Sequence

from torch import nn

from lightning_drm.deltas import quantized_layers
from lightning_drm.deltas.wrappers import is_flat
from lightning_drm.modules import is_sharded, with_buffers_of, without_weights


class KeptModules:
    """Copies of the tasks' modules with their hyper-parameters, metrics and buffers, but no weights.

    Of a quantized base, they share the layers of the module that came first.

    Args:
        tasks: The tasks' names.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks
        self._modules: dict[str, nn.Module] = {}
        self._quantized: dict[str, nn.Module] = {}

    def __contains__(self, task: str) -> bool:
        return task in self._modules

    def keep(self, module: nn.Module, task: str) -> None:
        """Keeps a task's module, which must not be sharded: PyTorch refuses to copy it afterwards."""
        self._quantized = self._quantized or quantized_layers(module)
        self._modules[task] = without_weights(module, self._quantized)

    def keep_trained(self, module: nn.Module, task: str) -> None:
        """Keeps a task's module as it is after training; of a sharded one, the buffers.

        Args:
            module: The module.
            task: The task's name.

        Raises:
            RuntimeError: If the module is sharded, and was not kept before that.
        """
        if not (is_sharded(module) or is_flat(module)):
            self.keep(module, task)
        elif task in self._modules:
            with_buffers_of(module, self._modules[task])
        else:
            raise RuntimeError(f"Call keep_module(module, {task!r}) before the module is sharded.")

    def of_all_tasks(self, stand_in: nn.Module | None, *, warn: bool) -> dict[str, nn.Module]:
        """The module of every task.

        Args:
            stand_in: Stands in for modules that are not known; the one that was kept last if left out.
            warn: Whether to warn where the one that was kept last stands in.

        Raises:
            ValueError: If no module is known at all.
        """
        unknown = [task for task in self._tasks if task not in self._modules]
        if unknown and stand_in is None:
            if not self._modules:
                raise ValueError(
                    "All tasks were restored, so no module is known here: give fuse a module, and call "
                    "keep_module(module, task) where tasks have modules of their own."
                )
            last, stand_in = list(self._modules.items())[-1]
            if warn:
                warnings.warn(
                    f"The modules of {', '.join(unknown)} were not seen here, as these tasks were restored: in the "
                    f"merged module, copies of {last}'s stand in for them, with the heads that were stored. Call "
                    "keep_module(module, task) for modules of their own.",
                    stacklevel=3,
                )
        found = dict(self._modules) if stand_in is None else {**dict.fromkeys(unknown, stand_in), **self._modules}
        return {task: found[task] for task in self._tasks}
