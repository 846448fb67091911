"""Tiny pretrained models of several architectures, on disk as `from_pretrained` wants them."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT = {**_SIZES, "vocab_size": 23}
_IMAGE = {**_SIZES, "image_size": 8, "patch_size": 4}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**_TEXT)),
    "deberta": lambda: DebertaV2Model(
        DebertaV2Config(**_TEXT, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"])
    ),
    "t5": lambda: T5Model(
        T5Config(
            vocab_size=23, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            eos_token_id=1, pad_token_id=0, decoder_start_token_id=0,
        )
    ),
    "llama": lambda: LlamaModel(LlamaConfig(**_TEXT, pad_token_id=0)),
    "vit": lambda: ViTModel(ViTConfig(**_IMAGE)),
    "clip": lambda: CLIPModel(
        CLIPConfig(vision_config=_IMAGE, text_config={**_TEXT, "max_position_embeddings": 8}, projection_dim=8)
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a pretrained model by architecture."""
    folders: dict[str, str] = {}

    def folder(architecture: str) -> str:
        if architecture not in folders:
            path = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(0)
            MODELS[architecture]().save_pretrained(path)
            folders[architecture] = str(path)
        return folders[architecture]

    return folder
