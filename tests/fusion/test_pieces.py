"""Parameters in pieces: where a piece ends shows in no result."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import models
from lightning_drm import DARETIES, DRM, TIES, Average, TaskArithmetic, merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan, memory_bytes
from lightning_drm.fusion import Override, Recipe
from lightning_drm.fusion import pieces as module
from lightning_drm.fusion.pieces import pieces
from lightning_drm.fusion.threads import num_threads
from lightning_drm.merging.method import PIECE_STEP

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (4097,), (100, 3), (9, 1000), (40, 16), (3, 5, 7), (33, 2, 4, 4)])
def test_pieces_cover_all_rows_once(shape):
    parts = pieces(shape, CPU)
    if parts == [None]:
        assert math.prod(shape) <= module.PIECE
        return
    assert [row for part in parts for row in range(shape[0])[part]] == list(range(shape[0]))
    per_row = math.prod(shape[1:])
    assert all(part.start * per_row % PIECE_STEP == 0 for part in parts)
    assert all((part.stop - part.start) * per_row <= max(module.PIECE, PIECE_STEP * per_row) for part in parts)


RECIPES = {
    "average": Recipe(Average(), {"a": 0.5}),
    "task_arithmetic": Recipe(TaskArithmetic(0.3)),
    "ties": Recipe(TIES(0.3)),
    "ties_of_tensors": Recipe(TIES(0.3, "tensor")),
    "dare_ties": Recipe(DARETIES(0.5, seed=3)),
    "elect": Recipe(DRM(density=0.4), non_matrix="elect"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_a_merge_in_pieces_is_one_of_whole_parameters(name, dtype, tmp_path, monkeypatch):
    """Folders and an adapter; the same bytes, so that it does not matter where pieces end."""
    base = models.base_model("llama").to(dtype)
    base.save_pretrained(tmp_path / "base")
    for seed, task in enumerate("ab", 1):
        models.finetune("llama", base, seed).to(dtype).save_pretrained(tmp_path / task)
    models.adapter("llama", models.base_model("llama"), 3).save_pretrained(tmp_path / "c")
    paths = {task: str(tmp_path / task) for task in "abc"}
    found = []
    for size in (128, 1 << 20):
        monkeypatch.setattr(module, "PIECE", size)
        merge_checkpoints(tmp_path / "base", paths, tmp_path / f"out{size}", **vars(RECIPES[name]))
        found.append(load_file(tmp_path / f"out{size}" / "model.safetensors"))
    assert all(torch.equal(found[0][key], value) for key, value in found[1].items())
    start = load_file(tmp_path / "base" / "model.safetensors")
    assert not torch.equal(found[0]["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_memory_is_that_of_pieces_where_all_can_be_mapped(tmp_path):
    base = models.base_model("llama")
    base.save_pretrained(tmp_path / "base")
    models.finetune("llama", base, 1).save_pretrained(tmp_path / "a")
    torch.save(models.finetune("llama", base, 2).state_dict(), tmp_path / "b.ckpt")
    sums = Recipe(TaskArithmetic())
    mapped = make_plan(str(tmp_path / "base"), {"a": str(tmp_path / "a")}, sums, MismatchPolicy())
    assert mapped.in_pieces == mapped.kinds.keys()
    assert (
        make_plan(str(tmp_path / "base"), {"b": str(tmp_path / "b.ckpt")}, sums, MismatchPolicy()).in_pieces
        == frozenset()
    )
    matrices = make_plan(str(tmp_path / "base"), {"a": str(tmp_path / "a")}, Recipe(), MismatchPolicy())
    assert matrices.in_pieces == {name for name, kind in matrices.kinds.items() if kind != "matrix"}
    largest = max(math.prod(shape) for shape in mapped.shapes.values())
    assert memory_bytes(mapped, CPU) == 4 * largest * (1 + 4) * num_threads(CPU)  # smaller than a piece


def test_transposed_adapters_in_pieces(tmp_path, monkeypatch):
    """GPT-2's Conv1D stores (in, out), and peft's factors make (out, in)."""
    monkeypatch.setattr(module, "PIECE", 64)
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=8)).eval()
    base.save_pretrained(tmp_path / "base")
    expected = {name: value.double() for name, value in base.state_dict().items()}
    for seed, task in enumerate("ab", 1):
        torch.manual_seed(seed)
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
        model = get_peft_model(copy.deepcopy(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_()
        model.save_pretrained(tmp_path / task, save_embedding_layers=False)
        for name, value in model.merge_and_unload().state_dict().items():
            expected[name] += 0.5 * (value.double() - base.state_dict()[name].double())
    paths = {task: str(tmp_path / task) for task in "ab"}
    merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", Average(), output_format="full")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"):
        assert not torch.allclose(merged[name], base.state_dict()[name])
        torch.testing.assert_close(merged[name].double(), expected[name], rtol=1e-6, atol=1e-6)


def test_a_calibration_names_the_first_parameter_that_it_refuses(tmp_path):
    base = models.base_model("llama")
    base.save_pretrained(tmp_path / "base")
    wrong = {"a": "layers.0.mlp.up_proj.weight", "b": "layers.1.mlp.up_proj.weight"}
    for seed, task in enumerate("ab", 1):
        model = models.finetune("llama", base, seed)
        dict(model.named_parameters())[f"model.{wrong[task]}"].data[0, 0] = float("nan")
        model.save_pretrained(tmp_path / task)
    paths = {task: str(tmp_path / task) for task in "ab"}
    message = rf"{wrong['a']}: TIES: delta of task 0 holds NaN or infinite values \(task 0 is a, 1 is b\)"
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", TIES())


class Largest(Average):
    """A method of a user's own: scales by the largest entry of the whole model, and knows of no ranks."""

    works_in_pieces = False
    factor = 0.0

    def calibrate(self, stream, *, reduce=None, num_tasks=None):
        calibrated = copy.copy(self)
        calibrated.factor = max(float(delta.abs().max()) for deltas in stream() for delta in deltas)
        return calibrated

    def _merge(self, deltas, coefficients):
        return super()._merge(deltas, coefficients) * self.factor


def test_only_methods_that_work_in_pieces_calibrate_in_shares(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 64)
    base = models.base_model("llama")
    base.save_pretrained(tmp_path / "base")
    tuned = models.finetune("llama", base, 1)
    tuned.save_pretrained(tmp_path / "a")
    recipe = Recipe(Largest(), overrides=[Override("*.q_proj.weight", "average")])
    merge_checkpoints(tmp_path / "base", {"a": str(tmp_path / "a")}, tmp_path / "out", **vars(recipe))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    deltas = {name: value - base.state_dict()[name] for name, value in tuned.state_dict().items()}
    largest = max(float(value.abs().max()) for name, value in deltas.items() if "q_proj" not in name)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        expected = base.state_dict()[name] + largest * deltas[name]
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-7)
