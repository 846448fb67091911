"""Writes the folders beside this file, by the code of litgpt 0.5.13: `python make.py`, where litgpt is installed.

For a Llama whose heads share keys and values, and for a GPT-NeoX: ``transformers`` is a model as transformers saves it,
``base`` is what litgpt converted it to, ``full`` what litgpt saves after a full finetune, and ``lora`` what it saves
after finetuning by LoRA and merging. ``expected.safetensors`` has what litgpt converts the last two back to.
"""

from pathlib import Path
from shutil import copy, rmtree

import lightning as L
import torch
import yaml
from litgpt import config as litgpt_config
from litgpt import lora as litgpt_lora
from litgpt.config import Config
from litgpt.finetune.lora import save_lora_checkpoint
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.scripts.merge_lora import merge_lora
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 12, "vocab_size": 16}
MODELS = {
    "llama": LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "pythia": GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
}
COMMON = {
    "n_layer": 1, "n_embd": 8, "n_head": 4, "intermediate_size": 12, "vocab_size": 16, "padded_vocab_size": 16,
    "block_size": 32,
}  # fmt: skip
CONFIGS = {
    "llama": COMMON | {
        "n_query_groups": 2, "rotary_percentage": 1.0, "parallel_residual": False, "bias": False,
        "norm_class_name": "RMSNorm", "norm_eps": 1e-6, "mlp_class_name": "LLaMAMLP",
    },
    "pythia": COMMON,
}  # fmt: skip
LORA = {"lora_r": 2, "lora_alpha": 3, "lora_query": True, "lora_value": True, "lora_mlp": True}
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]  # merge_lora looks whether they are there

torch.manual_seed(0)
fabric = L.Fabric(accelerator="cpu", devices=1)
for name, model in MODELS.items():
    folder = HERE / name
    rmtree(folder, ignore_errors=True)
    base, full, lora = (folder / part for part in ("base", "full", "lora"))
    model.save_pretrained(folder / "transformers")
    for made in (base, full, lora):
        made.mkdir()
        copy(folder / "transformers" / "config.json", made)

    litgpt_config.name_to_config[name] = {"name": name, "hf_config": {}, **CONFIGS[name]}
    copy(folder / "transformers" / "model.safetensors", base)
    convert_hf_checkpoint(base, model_name=name)
    (base / "model.safetensors").unlink()
    for made in (base, full, lora):
        if made != base:
            copy(base / "model_config.yaml", made)
        for tokenizer in TOKENIZER:
            (made / tokenizer).touch()

    finetuned = GPT(Config.from_file(base / "model_config.yaml"))
    finetuned.load_state_dict(torch.load(base / "lit_model.pth"))
    with torch.no_grad():
        for parameter in finetuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    fabric.save(full / "lit_model.pth", {"model": finetuned})

    adapted = litgpt_lora.GPT(litgpt_lora.Config.from_file(base / "model_config.yaml", **LORA))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    save_lora_checkpoint(fabric, adapted, lora / "lit_model.pth.lora")
    (lora / "hyperparameters.yaml").write_text(yaml.safe_dump({**LORA, "checkpoint_dir": str(base)}))
    merge_lora(lora, pretrained_checkpoint_dir=base, precision="32-true")

    for made in (full, lora):
        convert_lit_checkpoint(made, folder / "back")
        tensors = torch.load(folder / "back" / "model.pth")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, made / "expected.safetensors")
        rmtree(folder / "back")
    for file in [*TOKENIZER, "hyperparameters.yaml"]:
        for made in folder.rglob(file):
            made.unlink()
