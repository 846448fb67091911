"""Folders that litgpt wrote, read as the transformers model that they stand for.

litgpt has names of its own for parameters, and one weight for the queries, keys and values of a layer, one after the
other. Here every tensor has the name, the shape and the order of rows that transformers gives it, as litgpt's own
``convert_from_litgpt`` writes it. So a base and its finetunes meet under the same names, whichever library wrote them,
and queries, keys and values are merged as the three matrices that they are.

litgpt unties: a model whose input and output embeddings are one weight in transformers has two weights here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from torch import Tensor
from typing_extensions import override

from lightning_drm.checkpoints.reading.quantized import as_floats
from lightning_drm.checkpoints.reading.tensors import PickleFiles, TensorHeader, Tensors, plain_name
from lightning_drm.checkpoints.reading.weights import WeightsInput
from lightning_drm.storage.json_files import field, shown

WEIGHTS_FILE, CONFIG_FILE = "lit_model.pth", "model_config.yaml"

_PARAMETER = re.compile(r"(?:transformer\.h\.(?P<block>\d+)\.)?(?P<module>[\w.]+)\.(?P<kind>weight|bias)")
_QKV = "attn.qkv"
# Of the same parts, but under other names in transformers: each Phi has its own, these Gemmas belong to a larger model.
_NAMED_OTHERWISE = ("phi", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b")
_INSTEAD = "Convert it with `litgpt convert_from_litgpt`, and merge the model.pth that it writes."
_LONGEST_REASON = 200


@dataclass(frozen=True)
class _Family:
    """What transformers calls the modules of models that litgpt builds from the same parts.

    Attributes:
        outside: By litgpt's name, the name of a module that is in no block.
        blocks: The name of the list of blocks.
        inside: By litgpt's name in a block, the name in a block of transformers.
        queries_keys_values: The same for what litgpt calls ``attn.qkv``: three names, or one for all of it.
    """

    outside: Mapping[str, str]
    blocks: str
    inside: Mapping[str, str]
    queries_keys_values: tuple[str, ...]


_LLAMA = _Family(
    {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"},
    "model.layers",
    {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
        "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    },
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)  # fmt: skip
_WITH_POST_NORMS = replace(  # Gemma 2 and 3, OLMo 2
    _LLAMA,
    inside={
        **_LLAMA.inside,
        "norm_2": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
)
_GPT_NEOX = _Family(
    {"transformer.wte": "gpt_neox.embed_in", "transformer.ln_f": "gpt_neox.final_layer_norm", "lm_head": "embed_out"},
    "gpt_neox.layers",
    {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "attention.dense",
        "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h",
    },
    ("attention.query_key_value",),
)  # fmt: skip


class LitgptTensors(Tensors):
    """A litgpt model's tensors, as transformers has them.

    Args:
        stored: The tensors as they are in litgpt's file.
        config: The fields of ``model_config.yaml``.
        folder: The folder of both, for messages.

    Raises:
        ValueError: If the model is none of a kind that is known here, or the configuration does not fit its tensors.
    """

    def __init__(self, stored: Tensors, config: Mapping[str, Any], folder: Path) -> None:
        super().__init__(stored.files)
        self.ignored = stored.ignored
        self._stored = stored
        self._sources: dict[str, tuple[str, slice | Tensor]] = {}
        family, where = _family(config, folder), str(folder / CONFIG_FILE)
        for raw, header in stored.headers.items():
            found = _PARAMETER.fullmatch(plain_name(raw))
            modules = _modules(family, found["block"], found["module"]) if found is not None else ()
            if found is None or not modules:
                raise ValueError(f"{_title(config, folder)}, and has {raw}, which is not known here. {_INSTEAD}")
            of_modules: list[slice | Tensor] = [slice(None)]
            if found["module"] == _QKV:
                of_modules = _rows(config, where, header.shape[0], are_apart=len(modules) > 1)
            for module, rows in zip(modules, of_modules, strict=True):
                name = f"{module}.{found['kind']}"
                num_rows = len(range(header.shape[0])[rows]) if isinstance(rows, slice) else len(rows)
                self._add(name, TensorHeader((num_rows, *header.shape[1:]), header.dtype), stored.file_of[raw])
                self._sources[name] = raw, rows

    @override
    def read(self, name: str) -> Tensor:
        raw, rows = self._sources[name]
        return self._stored.read(raw)[rows]


class LitgptFolder(WeightsInput):
    """A folder that litgpt wrote: a whole model, which also holds a LoRA finetune once litgpt has merged it."""

    expected = f"a litgpt folder ({WEIGHTS_FILE} and {CONFIG_FILE})"

    @classmethod
    @override
    def opens(cls, path: Path) -> bool:
        if path.name == WEIGHTS_FILE:
            return (path.parent / CONFIG_FILE).is_file()
        return path.is_dir() and any(path.glob(f"{WEIGHTS_FILE}*"))

    @classmethod
    @override
    def open(cls, path: Path, task: str, dequantize: bool) -> Self:
        folder = path if path.is_dir() else path.parent
        if not (folder / WEIGHTS_FILE).is_file():
            found = ", ".join(sorted(file.name for file in folder.glob(f"{WEIGHTS_FILE}*")))
            raise ValueError(
                f"{folder} has {found}, but no {WEIGHTS_FILE}: a part of a model is merged into its base by litgpt "
                "(`litgpt merge_lora` for LoRA)."
            )
        stored = as_floats(PickleFiles([folder / WEIGHTS_FILE]), folder, {}, dequantize)
        return cls(folder, LitgptTensors(stored, _read_config(folder), folder), folder)


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has a {WEIGHTS_FILE}, but no {CONFIG_FILE}, which says what its tensors are.")
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise ValueError(f"{file} is not YAML that can be read: {reason}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold fields by name, but holds {shown(content)}.")
    return content


def _family(config: Mapping[str, Any], folder: Path) -> _Family:
    where = str(folder / CONFIG_FILE)
    name = field(config, "name", str, where, "").lower()
    parts = field(config, "mlp_class_name", str, where, "GptNeoxMLP")
    if not name.startswith(_NAMED_OTHERWISE):
        if parts in ("LLaMAMLP", "GemmaMLP"):
            return _WITH_POST_NORMS if field(config, "post_attention_norm", bool, where, False) else _LLAMA
        if parts == "GptNeoxMLP" and "falcon" not in name:
            return _GPT_NEOX
    raise ValueError(f"{_title(config, folder)}, which is not known here. {_INSTEAD}")


def _title(config: Mapping[str, Any], folder: Path) -> str:
    kind = f"{shown(config.get('name'))} with {shown(config.get('mlp_class_name'))}"
    return f"{folder} is a litgpt model of the kind {kind}"


def _modules(family: _Family, block: str | None, module: str) -> tuple[str, ...]:
    """What transformers calls a module; three names for one that it has in three, and none for one that is not known.

    Args:
        family: The family.
        block: The number of its block, if it is in one.
        module: litgpt's name of it, in its block.
    """
    if block is None:
        return (family.outside[module],) if module in family.outside else ()
    names = family.queries_keys_values if module == _QKV else (family.inside.get(module, ""),)
    return tuple(f"{family.blocks}.{block}.{name}" for name in names if name)


def _rows(config: Mapping[str, Any], where: str, num_rows: int, *, are_apart: bool) -> list[slice | Tensor]:
    """Which rows of ``attn.qkv`` the tensors of transformers have: queries, keys and values, one after the other.

    Args:
        config: The fields of ``model_config.yaml``.
        where: What holds them, for messages.
        num_rows: How many rows there are.
        are_apart: Whether these are three tensors. If not, they are one, where each group of heads has its own
            queries, keys and values together.
    """
    num_heads = field(config, "n_head", int, where, 32)
    num_groups = field(config, "n_query_groups", int, where, num_heads)
    size = field(config, "head_size", int, where, 0)
    are_groups = min(num_heads, num_groups) > 0 and num_heads % num_groups == 0
    if not are_groups or size < 1 or (num_heads + 2 * num_groups) * size != num_rows:
        raise ValueError(
            f"{where}: n_head {num_heads}, n_query_groups {num_groups} and head_size {size} do not fit attn.qkv, which "
            f"has {num_rows} rows."
        )
    keys, values = num_heads * size, (num_heads + num_groups) * size
    if are_apart:
        return [slice(0, keys), slice(keys, values), slice(values, num_rows)]
    parts = torch.arange(num_rows).tensor_split((keys, values))
    return [torch.cat([part.view(num_groups, -1) for part in parts], 1).flatten()]
