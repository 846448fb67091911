"""Taking a task vector from a live module.

`Base.remember` notes, before training, a hash of every backbone parameter and a copy in host memory of those that will
train. `Base.task_vector`, after training, subtracts on the module's device, in float32 or better: a bfloat16
subtraction would round most small deltas to zero. LoRA layers give their factors and need no copy of the base.

Cost: one pass over the backbone to hash it and one copy of its trainable part, once for all tasks; one pass per task
to verify what was frozen and one to subtract.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_drm.deltas.fingerprint import describe_difference, hash_tensor
from lightning_drm.deltas.lora import adapted_weight_delta, refuse_unsupported_adapters
from lightning_drm.deltas.parameters import Parameter, backbone_parameters, head_state
from lightning_drm.deltas.task_vector import TaskVector
from lightning_drm.merging import Delta, LowRank


class Base:
    """The weights every task starts from, as far as deltas need them.

    One object serves all tasks of a run: the first one sets it, every later one is checked against it.
    """

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        self._set_by: str | None = None

    def remember(self, module: nn.Module, head: Sequence[str], task: str) -> None:
        """Notes the base before a task's first training step, or checks that it is the one already noted.

        Args:
            module: The task's module, untrained, with its adapters in place.
            head: Names of its head.
            task: The task's name, for messages.

        Raises:
            ValueError: If the base differs from the one of an earlier task, naming parameters, or the module could not
                be collected after training: its head is not there or has adapters, or an adapter is not supported.
        """
        refuse_unsupported_adapters(module)
        head_state(module, head)
        parameters = backbone_parameters(module, head)
        self.require({name: hash_tensor(p.tensor) for name, p in parameters.items()}, task)
        for name, parameter in parameters.items():
            if name not in self._tensors and _may_train(parameter):
                self._tensors[name] = parameter.tensor.detach().to("cpu", copy=True)

    def require(self, hashes: Mapping[str, str], task: str) -> None:
        """Checks that a task started from this base; the first one asked defines it.

        Args:
            hashes: Hash by name of the task's backbone before training.
            task: The task's name.

        Raises:
            ValueError: If they differ, naming both tasks and the parameters.
        """
        if self._set_by is None:
            self.hashes, self._set_by = dict(hashes), task
        elif difference := describe_difference(self.hashes, hashes):
            raise ValueError(
                f"Task {task!r} starts from another base than task {self._set_by!r}: {difference}. "
                "Every task must load the same pretrained weights, in the same dtype."
            )

    def task_vector(
        self, module: nn.Module, head: Sequence[str], task: str, settings: Mapping[str, object] | None = None
    ) -> TaskVector:
        """Takes what training added to the base.

        Args:
            module: The task's module, trained, on its device.
            head: Names of its head.
            task: The task's name.
            settings: Hyper-parameters of the finetune to keep with it.

        Returns:
            The task vector, its tensors on the module's device and independent of the module.

        Raises:
            ValueError: If a delta is not finite, or a parameter that was frozen at the start has changed.
        """
        deltas: dict[str, Delta] = {}
        parameters = backbone_parameters(module, head)
        problems = []
        for name, parameter in parameters.items():
            base = self._tensors.get(name)
            if parameter.adapter is not None:
                deltas[name] = adapted_weight_delta(parameter.adapter, name)
            elif base is not None and not _is_unchanged_buffer(parameter.tensor, base):
                deltas[name] = _subtract(parameter.tensor.detach(), base)
            was_frozen = parameter.adapter is not None or base is None
            if was_frozen and hash_tensor(parameter.tensor) != self.hashes[name]:
                problems.append(f"{name} was frozen when fit started, but its values have changed")
        problems += [
            f"the delta of {name} has NaN or infinite values" for name, d in deltas.items() if not _is_finite(d)
        ]
        if problems:
            raise ValueError(f"Task {task!r} cannot be collected: {'; '.join(problems)}.")
        return TaskVector(
            task=task,
            deltas=deltas,
            kinds={name: parameters[name].kind for name in deltas},
            head={name: tensor.detach().clone() for name, tensor in head_state(module, head).items()},
            base_hashes=dict(self.hashes),
            settings=dict(settings or {}),
        )

    def tensors(self, module: nn.Module, head: Sequence[str]) -> dict[str, Tensor]:
        """The whole base by parameter name: what was copied, and what a trained module still holds unchanged.

        Args:
            module: A module of any task of this base, trained or not.
            head: Names of its head.
        """
        return {
            name: self._tensors.get(name, parameter.tensor.detach())
            for name, parameter in backbone_parameters(module, head).items()
        }


def _may_train(parameter: Parameter) -> bool:
    """Buffers change without gradients; a weight under an adapter is frozen by peft."""
    is_buffer = not isinstance(parameter.tensor, nn.Parameter)
    return parameter.adapter is None and (is_buffer or parameter.tensor.requires_grad)


def _is_unchanged_buffer(tensor: Tensor, base: Tensor) -> bool:
    """Whether it is a constant, such as an attention mask; those may hold infinity, which has no difference."""
    return not isinstance(tensor, nn.Parameter) and torch.equal(tensor, base.to(tensor.device))


def _subtract(finetuned: Tensor, base: Tensor) -> Tensor:
    precision = torch.promote_types(finetuned.dtype, torch.float32)
    return finetuned.to(precision) - base.to(finetuned.device, precision)


def _is_finite(delta: Delta) -> bool:
    tensors = (delta.up, delta.down) if isinstance(delta, LowRank) else (delta,)
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
