"""Taking a task vector from a live module.

`Base.remember` notes, before training, a hash of every backbone parameter and a copy in host memory of those that will
train. `Base.task_vector`, after training, subtracts on the module's device, in float32 or better: a bfloat16
subtraction would round most small deltas to zero. LoRA layers give their factors and need no copy of the base.

Cost: one pass over the backbone to hash it and one copy of its trainable part, once for all tasks; one pass per task
to verify what was frozen and one to subtract.

Under several ranks, all of them take part. Weights that are sharded stay so: each rank notes and subtracts what it
holds, and the whole of a delta is put together for one parameter at a time. Where every rank has all weights, buffers
still differ (a batch norm sees each rank's own batches); those of rank 0 count, as in checkpoints.

A quantized base (bitsandbytes in 4 or 8 bits) has deltas where LoRA adapters are all that is trained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_drm.deltas.fingerprint import describe_difference, fingerprint
from lightning_drm.deltas.lora import adapted_weight_delta, refuse_unsupported_adapters
from lightning_drm.deltas.parameters import Parameter, backbone_parameters, head_state
from lightning_drm.deltas.quantized import keep_as_stored
from lightning_drm.deltas.sharded import from_local, local, whole
from lightning_drm.deltas.task_vector import TaskVector
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.merging import Delta, LowRank

Keep = Callable[[str, Delta], Delta]

_PLAIN = {Tensor, nn.Parameter, nn.Buffer, DTensor}


class Base:
    """The weights every task starts from, as far as deltas need them.

    One object serves all tasks of a run: the first one sets it, every later one is checked against it.
    """

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}
        self._held: dict[str, Tensor] = {}  # copies of what may train: all of a tensor, or a rank's part of it
        self._live: dict[str, Parameter] = {}  # of the module seen last: the rest of the base, and how it is sharded
        self._set_by: str | None = None

    def remember(self, module: nn.Module, head: Sequence[str], task: str | None, ranks: Ranks = ALONE) -> None:
        """Notes the base before a task's first training step, or checks that it is the one already noted.

        Args:
            module: The task's module, untrained, with its adapters in place.
            head: Names of its head.
            task: The task's name, for messages, where it is known.
            ranks: The processes that train it together.

        Raises:
            ValueError: If the base differs from the one of an earlier task, naming parameters, or between ranks, or the
                module could not be collected after training: its head is not there or has adapters, an adapter is not
                supported, or weights are quantized and more than adapters would be trained.
        """
        refuse_unsupported_adapters(module)
        head_state(module, head)
        parameters = backbone_parameters(module, head)
        _require_plain({name: p.tensor for name, p in parameters.items() if p.quantized is None})
        if is_quantized_base(parameters):
            _require_adapters_alone(parameters)
            keep_as_stored(module)
        hashes = {name: parameter.hash() for name, parameter in parameters.items()}
        _require_agreement(ranks.gather(fingerprint(hashes)), task)
        self.require(hashes, task)
        for name, parameter in parameters.items():
            if name not in self._held and _may_train(parameter):
                self._held[name] = local(parameter.tensor.detach()).to("cpu", copy=True)
        self._look_at(parameters)

    def require(self, hashes: Mapping[str, str], task: str | None, *, where: str = "") -> None:
        """Checks that a task started from this base; the first one asked defines it.

        Args:
            hashes: Hash by name of the task's backbone before training.
            task: The task's name, where it is known.
            where: Where they come from, if they were stored, for messages.

        Raises:
            ValueError: If they differ, naming both tasks and the parameters.
        """
        named = _named(task) + (f" (stored in {where})" if where else "")
        if self._set_by is None:
            self.hashes, self._set_by = dict(hashes), named
        elif difference := describe_difference(self.hashes, hashes):
            raise ValueError(
                f"{_capitalized(named)} starts from another base than {self._set_by}: {difference}. "
                "Every task must load the same pretrained weights, in the same dtype."
            )

    def trained(self, module: nn.Module, head: Sequence[str]) -> dict[str, Parameter]:
        """The parameters that may get a delta, by name: those that were not frozen when the base was noted.

        Args:
            module: A module whose base was remembered.
            head: Names of its head.
        """
        parameters = backbone_parameters(module, head)
        return {name: p for name, p in parameters.items() if p.adapter is not None or name in self._held}

    def task_vector(
        self,
        module: nn.Module,
        head: Sequence[str],
        task: str,
        settings: Mapping[str, object] | None = None,
        *,
        num_steps: int | None = None,
        ranks: Ranks = ALONE,
        keep: Keep | None = None,
    ) -> TaskVector:
        """Takes what training added to the base.

        Args:
            module: The task's module, trained, on its device.
            head: Names of its head.
            task: The task's name.
            settings: Hyper-parameters of the finetune to keep with it.
            num_steps: How many optimizer steps it took, where that is known.
            ranks: The processes that trained it together.
            keep: What becomes of each delta as it is taken, given its name and itself on the module's device.

        Returns:
            The task vector, its tensors independent of the module, and on its device unless `keep` moves them.

        Raises:
            ValueError: If a delta is not finite, or a parameter that was frozen at the start has changed.
        """
        deltas: dict[str, Delta] = {}
        parameters = backbone_parameters(module, head)
        is_quantized = is_quantized_base(parameters)
        problems = []
        for name, parameter in parameters.items():
            base, tensor = self._held.get(name), _settled(parameter.tensor, ranks)
            delta: Delta | None = None
            if parameter.adapter is not None:
                delta = adapted_weight_delta(parameter.adapter, name)
            elif base is not None and not _is_unchanged_buffer(tensor, base):
                delta = whole(_subtract(tensor.detach(), base))
            was_frozen = parameter.adapter is not None or base is None
            if was_frozen and replace(parameter, tensor=tensor).hash() != self.hashes[name]:
                problems.append(f"{name} was frozen when fit started, but its values have changed")
            if delta is not None:
                if is_quantized and not isinstance(delta, LowRank):
                    problems.append(f"{name} has changed in full, which no adapter on the quantized base could hold")
                if not _is_finite(delta):
                    problems.append(f"the delta of {name} has NaN or infinite values")
                deltas[name] = keep(name, delta) if keep is not None else delta
        if problems:
            raise ValueError(f"Task {task!r} cannot be collected: {'; '.join(problems)}.")
        self._look_at(parameters)
        state = {name: whole(_settled(tensor, ranks)) for name, tensor in head_state(module, head).items()}
        return TaskVector(
            task=task,
            deltas=deltas,
            kinds={name: parameters[name].kind for name in deltas},
            head={name: tensor.detach().clone() for name, tensor in state.items()},
            base_hashes=dict(self.hashes),
            settings=dict(settings or {}),
            num_steps=num_steps,
        )

    def tensors(self, module: nn.Module | None = None, head: Sequence[str] = ()) -> dict[str, Tensor]:
        """The whole base by parameter name: what was copied before training, and what a live module still holds.

        Args:
            module: A module of any task of this base, trained or not; the one that was noted or collected last if left
                out.
            head: Names of the given module's head.

        Returns:
            The base's tensors; where the module's are sharded, sharded like those and on their device. Quantized
            weights are left out: copies of a module share its own.

        Raises:
            ValueError: If the module's weights are not the base's where they should be, naming parameters.
        """
        if module is not None:
            self._look_at(backbone_parameters(module, head))
        quantized = {name: p for name, p in self._live.items() if p.quantized is not None}
        found = {name: self._tensor(name) for name in self.hashes if name not in quantized}
        found |= {name: None for name, p in quantized.items() if p.hash() != self.hashes[name]}
        changed = [name for name, tensor in found.items() if tensor is None]
        if changed:
            listed = f"{', '.join(changed[:3])}{', …' if len(changed) > 3 else ''}"
            raise ValueError(
                f"The base is no longer at hand: {listed} differ from the weights that the tasks started from; "
                "give a module of this base that has not been trained."
            )
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _look_at(self, parameters: Mapping[str, Parameter]) -> None:
        """Remembers live tensors, without keeping alive what was copied before training."""
        self._live = {
            name: parameter
            for name, parameter in parameters.items()
            if isinstance(parameter.tensor, DTensor) or not self._holds_all(name, parameter.tensor)
        }

    def _holds_all(self, name: str, like: Tensor) -> bool:
        return name in self._held and self._held[name].shape == like.shape

    def _tensor(self, name: str) -> Tensor | None:
        """A tensor of the base; ``None`` if the live one is another."""
        held, live = self._held.get(name), self._live.get(name)
        if held is not None and (live is None or held.shape == local(live.tensor).shape):
            return from_local(held, live.tensor) if live is not None else held
        if live is None or live.hash() != self.hashes[name]:
            return None
        return live.tensor.detach()


def is_quantized_base(parameters: Mapping[str, Parameter]) -> bool:
    """Whether some of a backbone's weights are stored in 4 or 8 bits, so that merged deltas can only be an adapter.

    Args:
        parameters: The backbone's parameters, by name.
    """
    return any(parameter.quantized is not None for parameter in parameters.values())


def _require_adapters_alone(parameters: Mapping[str, Parameter]) -> None:
    """Refuses a quantized base whose deltas would not all be low-rank."""
    trained = [name for name, p in parameters.items() if p.adapter is None and p.tensor.requires_grad]
    dense = [name for name, p in parameters.items() if p.adapter is not None and not _has_factors(p)]
    if found := trained + dense:
        listed = f"{', '.join(found[:3])}{', …' if len(found) > 3 else ''}"
        how = "trained in full" if trained else "adapted otherwise"
        raise ValueError(
            "The base has quantized weights, so only LoRA adapters of linear and embedding layers can be trained and "
            f"merged, but {listed} would be {how}: freeze what has no adapter, or load the base in a floating-point "
            "precision."
        )


def _has_factors(parameter: Parameter) -> bool:
    return parameter.adapter_rank is not None and len(parameter.shape) == 2


def _require_plain(tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that stand for others, such as torchao's: their bytes are not their values."""
    found = {
        name: next(kind for kind in (type(tensor), type(local(tensor))) if kind not in _PLAIN)
        for name, tensor in tensors.items()
        if not {type(tensor), type(local(tensor))} <= _PLAIN
    }
    if found:
        listed = ", ".join(f"{name} ({kind.__name__})" for name, kind in list(found.items())[:3])
        raise ValueError(
            f"{len(found)} weights are quantized or otherwise no plain tensors, so they have no deltas: {listed}"
            f"{', …' if len(found) > 3 else ''}. Load the base in a floating-point precision."
        )


def _named(task: str | None) -> str:
    return "this module" if task is None else f"task {task!r}"


def _capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _require_agreement(fingerprints: Sequence[str], task: str | None) -> None:
    others = [str(rank) for rank, found in enumerate(fingerprints) if found != fingerprints[0]]
    if others:
        raise ValueError(
            f"{_capitalized(_named(task))} starts from another base on rank {', '.join(others)} than on rank 0: every "
            "process must load the same pretrained weights; call seed_everything if they are drawn at random."
        )


def _settled(tensor: Tensor, ranks: Ranks) -> Tensor:
    """A tensor on whose values the ranks agree: rank 0's, for buffers, which training does not keep in step."""
    if isinstance(tensor, nn.Parameter) or ranks.size == 1:
        return tensor
    return ranks.copy_from(tensor.detach().clone(), 0)


def _may_train(parameter: Parameter) -> bool:
    """Buffers change without gradients; a weight under an adapter is frozen by peft."""
    is_buffer = not isinstance(parameter.tensor, nn.Parameter)
    return parameter.adapter is None and (is_buffer or parameter.tensor.requires_grad)


def _is_unchanged_buffer(tensor: Tensor, base: Tensor) -> bool:
    """Whether it is a constant, such as an attention mask; those may hold infinity, which has no difference."""
    return not isinstance(tensor, nn.Parameter) and torch.equal(tensor, base.to(tensor.device))


def _subtract(finetuned: Tensor, base: Tensor) -> Tensor:
    precision = torch.promote_types(finetuned.dtype, torch.float32)
    difference = local(finetuned).to(precision) - base.to(finetuned.device, precision)
    return from_local(difference, finetuned)


def _is_finite(delta: Delta) -> bool:
    tensors = (delta.up, delta.down) if isinstance(delta, LowRank) else (delta,)
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
