"""Tiny models of several architectures, and finetunes of them that no training made, in every format."""

import copy
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PIXELS = {"image_size": 8, "patch_size": 4}

# By name: the base's class, the finetune's class, the configuration, and the linear layers that LoRA adapts.
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, None, LlamaConfig(**TEXT, num_key_value_heads=1), ["q_proj", "down_proj"]),
    "llama_tied": (LlamaForCausalLM, None, LlamaConfig(**TEXT, tie_word_embeddings=True), ["v_proj"]),
    "t5": (
        T5ForConditionalGeneration,
        None,
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0),
        ["q", "wo"],
    ),
    "bert": (BertModel, BertForSequenceClassification, BertConfig(**TEXT), ["query", "output.dense"]),
    "deberta": (DebertaV2Model, DebertaV2ForSequenceClassification, DebertaV2Config(**TEXT), ["query_proj"]),
    "clip": (CLIPVisionModel, None, CLIPVisionConfig(**VISION, **PIXELS), ["q_proj", "fc1"]),
    # Its layers were renamed in transformers 5.
    "vit": (ViTModel, ViTForImageClassification, ViTConfig(**VISION, **PIXELS), ["q_proj", "query"]),
}


def base_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    base_class, _, config, _ = ARCHITECTURES[name]
    return base_class(copy.deepcopy(config)).eval()


def backbone(model: nn.Module, base: nn.Module) -> nn.Module:
    """The part of a finetune that the base is."""
    return model if type(model) is type(base) else getattr(model, model.base_model_prefix)


def finetune(name: str, base: PreTrainedModel, seed: int, size: float = 0.02) -> PreTrainedModel:
    """A model of the finetune's class: the base, changed everywhere, with a head of its own."""
    torch.manual_seed(seed)
    base_class, tuned_class, config, _ = ARCHITECTURES[name]
    model = (tuned_class or base_class)(copy.deepcopy(config)).eval()
    state = base.state_dict()
    with torch.no_grad():
        for key, parameter in backbone(model, base).named_parameters():
            parameter.copy_(state[key] + size * torch.randn_like(parameter))
    return model


def save_llamas(folder: Path, **sizes: int) -> LlamaForCausalLM:
    """Writes a base and finetunes ``a`` and ``b`` of a Llama of some size; returns the base."""
    config = LlamaConfig(**{**TEXT, **sizes})
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    for seed, task in enumerate("ab", 1):
        torch.manual_seed(seed)
        tuned = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter, start in zip(tuned.parameters(), base.parameters(), strict=True):
                parameter.copy_(start + 0.01 * torch.randn_like(start))
        tuned.save_pretrained(folder / task)
    return base


def adapter(name: str, base: PreTrainedModel, seed: int, **settings: object) -> nn.Module:
    """The base under a LoRA adapter whose factors are all random."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ARCHITECTURES[name][3], **settings})
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


class Wrapper(LightningModule):
    """Any module in a LightningModule, with hyper-parameters that ``weights_only`` refuses to read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters({"path": Path("somewhere"), "config": LoraConfig()})
        self.model = model


def save_checkpoint(model: nn.Module, path: Path) -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(Wrapper(model))
    trainer.save_checkpoint(path)


def outputs(model: nn.Module, name: str) -> Tensor:
    """The model's logits, or what comes before the head."""
    torch.manual_seed(7)
    dtype = next(model.parameters()).dtype
    if name in ("clip", "vit"):
        out = model(pixel_values=torch.randn(2, 3, 8, 8).to(dtype))
    elif name == "t5":
        tokens = torch.randint(40, (2, 5))
        out = model(input_ids=tokens, decoder_input_ids=tokens)
    else:
        out = model(input_ids=torch.randint(40, (2, 6)))
    return (out.logits if "logits" in out else out.last_hidden_state).detach().double()
