"""Quantized models: refused by name, and merged in floats when asked; their own libraries say what the floats are."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from helpers import models
from lightning_drm import TaskArithmetic, merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan
from lightning_drm.fusion import Recipe

SIZES = {**models.TEXT, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 1}
PROMPT = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base, a finetune and an adapter, none of them quantized."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    base.save_pretrained(folder / "base")
    models.adapter("llama", base, 3).save_pretrained(folder / "lora")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    base.save_pretrained(folder / "tuned")
    return folder


def fp8(source, target, block):
    """As transformers quantizes a weight; its own loader undoes it where there is no accelerator."""
    shutil.copytree(source, target)
    settings = SimpleNamespace(weight_block_size=block, scale_fmt="float")
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        tensors |= quantize.convert({name: value}) if "proj" in name else {name: value}
    if block is None:
        tensors = {name: value.reshape(()) if "scale_inv" in name else value for name, value in tensors.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    quantized = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    edit_config(target, quantization_config=quantized)


def fp8_floats(folder):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


def bitsandbytes(source, target, **settings):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**settings)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(target)


def bitsandbytes_floats(folder):
    return AutoModelForCausalLM.from_pretrained(folder).dequantize()


def compressed(source, target, **arguments):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = AutoModelForCausalLM.from_pretrained(source)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    limit = 448.0 if arguments["type"] == "float" else 2 ** (arguments["num_bits"] - 1) - 1
    for child in model.modules():
        if isinstance(child, nn.Linear) and hasattr(child, "weight_scale"):
            width = arguments.get("group_size") or child.weight.shape[1]
            peaks = child.weight.detach().unflatten(1, (-1, width)).abs().amax(-1)
            child.weight_scale.data.copy_((peaks / limit).view_as(child.weight_scale))
            child.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)


def compressed_floats(folder):
    from transformers import CompressedTensorsConfig

    settings = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)


FORMATS = {  # how a model is quantized, and how its own library gives floats back
    "fp8_blocks": (lambda *folders: fp8(*folders, [32, 16]), fp8_floats),
    "fp8_tensor": (lambda *folders: fp8(*folders, None), fp8_floats),
    "nf4": (
        lambda *folders: bitsandbytes(
            *folders, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        bitsandbytes_floats,
    ),
    "fp4": (lambda *folders: bitsandbytes(*folders, load_in_4bit=True), bitsandbytes_floats),
    "int8": (lambda *folders: bitsandbytes(*folders, load_in_8bit=True), bitsandbytes_floats),
    "int4_groups": (
        lambda *folders: compressed(*folders, num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
        compressed_floats,
    ),
    "fp8_channels": (
        lambda *folders: compressed(*folders, num_bits=8, type="float", strategy="channel", symmetric=True),
        compressed_floats,
    ),
}


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def floats(model):
    return {name: value.detach().double() for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_when_asked(name, plain, tmp_path):
    """Halfway between a quantized base and a finetune, and again between a plain base and a quantized finetune."""
    quantize, undo = FORMATS[name]
    quantize(plain / "base", tmp_path / "q")
    start, end = floats(undo(tmp_path / "q")), floats(AutoModelForCausalLM.from_pretrained(plain / "tuned"))
    assert any(
        not torch.equal(start[key], value) for key, value in load_file(plain / "base" / "model.safetensors").items()
    )
    method, options = TaskArithmetic(0.5), {"dequantize": True, "dtype": "float32"}
    result = merge_checkpoints(tmp_path / "q", {"a": str(plain / "tuned")}, tmp_path / "out", method, **options)
    assert any("dequantized" in note for note in result.notes)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not hasattr(loaded.config, "quantization_config")
    merged = floats(loaded)
    for key, value in start.items():
        torch.testing.assert_close(merged[key], (value + end[key]) / 2, rtol=1e-6, atol=1e-7)
    assert loaded(PROMPT).logits.isfinite().all()

    merge_checkpoints(plain / "tuned", {"a": str(tmp_path / "q")}, tmp_path / "turned", method, **options)
    for key, value in floats(AutoModelForCausalLM.from_pretrained(tmp_path / "turned")).items():
        torch.testing.assert_close(value, (start[key] + end[key]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FORMATS)
def test_refused_unless_asked(name, plain, tmp_path):
    FORMATS[name][0](plain / "base", tmp_path / "q")
    with pytest.raises(ValueError, match=r"The base .* is quantized \(.*\).*or set dequantize to true"):
        make_plan(str(tmp_path / "q"), {"a": str(plain / "tuned")}, Recipe(), MismatchPolicy())
    plan = make_plan(str(plain / "base"), {"a": str(tmp_path / "q")}, Recipe(), MismatchPolicy())
    assert len(plan.problems) == 1
    assert "set dequantize to true" in plan.problems[0]


def test_an_adapter_on_a_quantized_base(plain, tmp_path):
    """What QLoRA leaves: the adapter's own delta on the dequantized weights."""
    fp8(plain / "base", tmp_path / "q", [32, 16])
    start = floats(fp8_floats(tmp_path / "q"))
    options = {"dequantize": True, "output_format": "full", "dtype": "float32"}
    method = TaskArithmetic(1.0)
    adapter = tmp_path / "lora"
    shutil.copytree(plain / "lora", adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "q")}))
    merge_checkpoints(tmp_path / "q", {"a": str(adapter)}, tmp_path / "out", method, **options)
    factors = load_file(adapter / "adapter_model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    changed = 0
    for key, value in merged.items():
        module = f"base_model.model.{key.removesuffix('.weight')}"
        expected = start[key]
        if f"{module}.lora_A.weight" in factors:
            changed += 1
            up, down = factors[f"{module}.lora_B.weight"].double(), factors[f"{module}.lora_A.weight"].double()
            expected = expected + 5 / 3 * up @ down
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert changed == 4


REFUSED = {  # what is done to an fp8 model's folder, and the message
    "gptq": ({"quant_method": "gptq"}, "gptq cannot be dequantized here, only fp8, bitsandbytes, compressed-tensors"),
    "awq": ({"quant_method": "awq"}, "awq cannot be dequantized here"),
    "grid": ({"quant_method": "fp8", "weight_block_size": [64, 16]}, r"in blocks of \[64, 16\], got .*proj.weight"),
    "unknown": (None, "has no quantization_config in its config.json that would say how to dequantize it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_dequantized(case, plain, tmp_path):
    settings, message = REFUSED[case]
    fp8(plain / "base", tmp_path / "q", [32, 16])
    edit_config(tmp_path / "q", quantization_config=settings)
    with pytest.raises(ValueError, match=message):
        make_plan(str(tmp_path / "q"), {"a": str(plain / "tuned")}, Recipe(), MismatchPolicy(dequantize=True))


def test_a_weight_without_its_scale(plain, tmp_path):
    fp8(plain / "base", tmp_path / "q", [32, 16])
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj.weight does not belong to any weight that can be dequantized"):
        make_plan(str(tmp_path / "q"), {"a": str(plain / "tuned")}, Recipe(), MismatchPolicy(dequantize=True))


def test_a_missing_library_is_named(plain, tmp_path, monkeypatch):
    from lightning_drm.checkpoints.reading import quantization

    fp8(plain / "base", tmp_path / "q", [32, 16])
    edit_config(tmp_path / "q", quantization_config={"quant_method": "bitsandbytes"})
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'lightning_drm\[quantized\]'"):
        make_plan(str(tmp_path / "q"), {"a": str(plain / "tuned")}, Recipe(), MismatchPolicy(dequantize=True))
