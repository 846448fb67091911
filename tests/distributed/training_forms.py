"""Run by test_training_forms on two processes under DDP: a quantized base with adapters, and a compiled backbone.

torchrun --nproc_per_node 2 training_forms.py FOLDER
"""

import sys
from pathlib import Path

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import DRM, DRMMergeCallback
from lightning_drm.deltas.quantized import keep_as_stored

TASKS = {"by_one": 1, "by_three": 3}


class Counting(L.LightningModule):
    """A quantized Llama with adapters."""

    head_names = ()

    def __init__(self, base: Path) -> None:
        super().__init__()
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = LlamaForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
        keep_as_stored(model)
        torch.manual_seed(0)
        self.model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def save_base(folder: Path) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **size)).save_pretrained(folder / "base")
    return folder / "base"


def quantized(folder: Path) -> None:
    merge = DRMMergeCallback(list(TASKS), DRM(density=0.5), folder / "quantized")
    for task, step in TASKS.items():
        rows = (torch.arange(32)[:, None] + step * torch.arange(8)) % 20
        trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=[merge.for_task(task)])
        trainer.fit(Counting(folder / "base"), DataLoader(rows, batch_size=8))


def compiled(folder: Path) -> None:
    for name in ("plain", "compiled"):
        merge = DRMMergeCallback(["a"], DRM(density=0.5), folder / name)
        L.seed_everything(0, verbose=False)
        module = VectorTask()
        if name == "compiled":
            module.backbone = torch.compile(module.backbone, backend="eager")
        quiet_trainer(strategy="ddp", devices=2, callbacks=[merge]).fit(module, Vectors(0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    quantized(Path(sys.argv[1]))
    compiled(Path(sys.argv[1]))
