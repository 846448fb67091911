"""The merged model: one backbone, one head per task."""

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_drm.deltas import backbone_parameters, head_state, remove_adapters
from lightning_drm.modules.duplicate import duplicate
from lightning_drm.modules.protocol import IGNORE_INDEX, classify


class MultiTaskModule(LightningModule):
    """Several tasks' modules around one backbone; a batch goes to the one of its ``dataloader_idx``.

    Args:
        modules: Module by task, in the order of the test dataloaders. Usually made by `assemble`.
    """

    def __init__(self, modules: Mapping[str, LightningModule]) -> None:
        super().__init__()
        self.task_names = list(modules)
        # Lists, not dicts: a ModuleDict refuses names with dots and those of its own methods.
        self.task_modules = nn.ModuleList(modules.values())
        self.accuracies = nn.ModuleList(
            MulticlassAccuracy(average="micro", ignore_index=IGNORE_INDEX) for _ in self.task_names
        )
        self.eval()

    @classmethod
    def assemble(
        cls,
        module: LightningModule,
        head: Sequence[str],
        backbone: Mapping[str, Tensor],
        heads: Mapping[str, Mapping[str, Tensor]],
    ) -> Self:
        """Builds the module from one task's module, whose own weights stay as they are.

        Args:
            module: Any task's module; gives the structure, and the backbone tensors that ``backbone`` leaves out.
            head: Names of its head.
            backbone: Backbone tensors by name. They are used, not copied, and shared by all tasks.
            heads: By task, its head's tensors by name; their shapes may differ from those of ``module``.

        Returns:
            A module with one backbone in memory, without adapters.
        """
        shared = {name: parameter.tensor for name, parameter in backbone_parameters(module, head).items()}
        replaced = {name: _as_parameter(backbone.get(name, tensor), tensor) for name, tensor in shared.items()}
        return cls({task: _copy_with(module, head, replaced, tensors) for task, tensors in heads.items()})

    def task_module(self, task: str) -> LightningModule:
        """The module of one task: the shared backbone with that task's head.

        Args:
            task: The task's name.

        Raises:
            KeyError: If there is no such task.
        """
        if task not in self.task_names:
            raise KeyError(f"No task {task!r}; tasks: {', '.join(self.task_names)}.")
        return cast(LightningModule, self.task_modules[self.task_names.index(task)])

    @override
    def forward(self, batch: Any, task: str) -> Tensor:
        """Logits ``(batch, classes)`` of a batch of one task."""
        return classify(self.task_module(task), batch)[0]

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure(batch, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure(batch, dataloader_idx)

    def _measure(self, batch: Any, dataloader_idx: int) -> None:
        logits, target = classify(self.task_modules[dataloader_idx], batch)
        metric = cast(MulticlassAccuracy, self.accuracies[dataloader_idx])
        metric(logits, target)
        self.log(f"accuracy/{self.task_names[dataloader_idx]}", metric, on_epoch=True, add_dataloader_idx=False)


def _as_parameter(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, nn.Parameter) and not isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=False)
    return tensor


def _copy_with(
    module: LightningModule, head: Sequence[str], backbone: Mapping[str, Tensor], head_tensors: Mapping[str, Tensor]
) -> LightningModule:
    """A copy of a module in which tensors are replaced by others, also of other shapes, as they are copied."""
    backbone_live = {name: parameter.tensor for name, parameter in backbone_parameters(module, head).items()}
    head_live = head_state(module, head)
    if head_live.keys() != head_tensors.keys():
        raise ValueError(f"A head has the tensors {sorted(head_tensors)}, the module's head {sorted(head_live)}.")
    # Replaced while copying, so that the backbone is never in memory twice.
    memo: dict[int, Any] = {id(live): backbone[name] for name, live in backbone_live.items()}
    memo |= {id(live): _as_parameter(head_tensors[name].clone(), live) for name, live in head_live.items()}
    copied = duplicate(module, memo)
    remove_adapters(copied)
    for child in copied.modules():
        if isinstance(child, nn.Linear):  # a head of another task may have another number of classes
            child.out_features = child.weight.shape[0]
    return copied
