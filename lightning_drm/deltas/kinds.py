"""What a parameter is to its layer, which decides the rule that merges it.

Everything that needs to know asks here: for live modules, and for files through a model that is built without values.
Only where no layer is known at all, `guess_kind` goes by name and shape.

**Experts.** transformers keeps the experts of a layer in one 3-D weight, such as ``gate_up_proj`` (E, 2 i, h) and
``down_proj`` (E, h, i). Each expert is a matrix of its own, and a method on matrices takes them one by one. The kernel
of a convolution may be 3-D, too, but is one matrix (out, in·k). A 3-D weight that is neither, such as a class token,
has no matrices in it.

**Output embeddings.** The ``lm_head`` of a language model has one row for each token, as its input embedding has, and
follows the same rule. What a row means is the same in all tasks, and DRM on 128,256 rows and eight tasks would be an
eigenproblem of size 32,768. transformers says which layer it is. A classification head is none.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_drm.deltas.wrappers import plain

if TYPE_CHECKING:
    from lightning_drm.deltas.parameters import Parameter

Kind = Literal["matrix", "experts", "convolution", "embedding", "output_embedding", "other"]
"""The role of a parameter in its layer, which decides the rule that merges it."""


def kind_of(module: nn.Module, name: str, tensor: Tensor) -> Kind:
    """What a parameter is to the layer that holds it, output embeddings aside.

    Args:
        module: The layer, without wrappers.
        name: The parameter's name in it.
        tensor: The parameter.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd) and name == "weight":
        return "convolution"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "other"  # also where it normalizes over two dimensions
    if tensor.ndim == 2 and (name.endswith("weight") or isinstance(module, nn.Linear | Conv1D)):
        return "matrix"
    return "experts" if tensor.ndim == 3 and _holds_experts(module, len(tensor)) else "other"


def guess_kind(name: str, shape: tuple[int, ...]) -> Kind:
    """What a parameter probably is, where no layer is known.

    Example:
        >>> guess_kind("layers.0.fc.weight", (4, 4)), guess_kind("token_embedding.weight", (9, 4))
        ('matrix', 'embedding')
        >>> guess_kind("layers.0.mlp.experts.down_proj", (2, 4, 3)), guess_kind("lm_head.weight", (9, 4))
        ('experts', 'output_embedding')
    """
    parts = name.lower().split(".")
    if len(shape) == 2 and parts[-2:] == ["lm_head", "weight"]:
        return "output_embedding"
    if len(shape) == 2 and any("embed" in part or part in ("wte", "wpe", "shared") for part in parts):
        return "embedding"
    if len(shape) == 2 and parts[-1].endswith("weight"):
        return "matrix"
    if len(shape) == 3 and any(part.endswith("experts") for part in parts[:-1]):
        return "experts"
    return "convolution" if len(shape) > 2 and parts[-1] == "weight" else "other"


def transposed_names(module: nn.Module, parameters: Mapping[str, "Parameter"]) -> set[str]:
    """The names of the matrices that their layers store (in, out), as a Conv1D does, and some experts.

    Args:
        module: A task's module.
        parameters: Its parameters.
    """
    stored = {id(layer.weight) for layer in module.modules() if isinstance(layer, Conv1D)}
    of_experts = [layer for layer in module.modules() if getattr(layer, "is_transposed", False)]
    stored |= {id(weight) for layer in of_experts for weight in layer.parameters(recurse=False) if weight.ndim == 3}
    return {name for name, parameter in parameters.items() if id(parameter.tensor) in stored}


def output_embeddings(module: nn.Module) -> set[int]:
    """The identities of the weights that are output embeddings in a module, or in the models that it holds.

    Args:
        module: Any module; wrappers and adapters in it are looked through.
    """
    return {id(weight) for model in _models(module) for weight in _output_weights(model)}


def embedding_layer(get: Callable[[], nn.Module | None]) -> nn.Module | None:
    """What a model's ``get_input_embeddings`` or ``get_output_embeddings`` gives.

    Args:
        get: That method. In speech and vision models, it raises an error where there are none.
    """
    try:
        return get()
    except NotImplementedError:
        return None


def _holds_experts(module: nn.Module, length: int) -> bool:
    """Whether each entry of a 3-D weight is an expert: the layer counts them, or its class says so."""
    return getattr(module, "num_experts", None) == length or type(module).__name__.endswith("Experts")


def _models(module: nn.Module) -> Iterator[PreTrainedModel]:
    return (child for child in module.modules() if isinstance(child, PreTrainedModel))


def _output_weights(model: PreTrainedModel) -> Iterator[Tensor]:
    layer = embedding_layer(model.get_output_embeddings)
    if isinstance(layer, nn.Module):
        weight = getattr(plain(layer), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            yield weight
