"""Folders, adapters and checkpoints of six architectures: what is written gives an independent merge's outputs."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

from helpers import models, reference, ties
from lightning_drm import DARETIES, DRM, TIES, Average, IsoC, TaskArithmetic, merge_checkpoints
from lightning_drm.fusion import Override, Recipe

pytestmark = pytest.mark.usefixtures("small_pieces")
DENSITY = 0.4


def independent_merge(base, finetunes, found, noise=0.0):
    """DRM on linear weights except the output embeddings, and the average elsewhere, in float64, on live modules.

    The few weights that rounding decides are those of `found`, which was merged from deltas with errors of `noise`.
    """
    method, weights = DRM(density=DENSITY), dict(found.named_parameters())
    merged = copy.deepcopy(base).double()
    linear = {f"{key}.weight" for key, child in base.named_modules() if isinstance(child, nn.Linear)}
    linear -= {"lm_head.weight"}
    tied = dict(base.named_parameters())
    states = [dict(model.named_parameters()) for model in finetunes]
    with torch.no_grad():
        for key, parameter in merged.named_parameters():
            deltas = [(state[key] - tied[key]).double() for state in states if key in state]
            deltas += [torch.zeros_like(parameter)] * (len(states) - len(deltas))
            if key in linear:
                change = weights[key] - tied[key]
                expected = reference.drm(deltas, density=DENSITY)
                parameter += ties.settled(change, expected, method, deltas, noise=noise)
            else:
                parameter += reference.average(deltas)
    return merged


def close(model, expected, name, tolerance=2e-5):
    torch.testing.assert_close(
        models.outputs(model, name), models.outputs(expected, name), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kind", ["folder", "bin", "checkpoint"])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_full_finetunes(name, kind, tmp_path):
    base = models.base_model(name)
    base.save_pretrained(tmp_path / "base")
    finetunes = {task: models.finetune(name, base, seed) for seed, task in enumerate(["b", "a"], 1)}
    paths = {}
    for task, model in finetunes.items():
        path = tmp_path / task
        if kind == "checkpoint":
            models.save_checkpoint(model, path.with_suffix(".ckpt"))
            path = path.with_suffix(".ckpt")
        else:
            model.save_pretrained(path, max_shard_size="10KB")
        if kind == "bin":
            torch.save(model.state_dict(), path / "pytorch_model.bin")
            for file in path.glob("*.safetensors*"):
                file.unlink()
        paths[task] = str(path)
    # A checkpoint does not say that its class has no pooler, where the base has one.
    policy = "base_fill" if (name, kind) == ("vit", "checkpoint") else "strict"
    method = DRM(density=DENSITY)
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", method, policy=policy, max_shard_size="10KB")

    loaded, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = independent_merge(base, [models.backbone(model, base) for model in finetunes.values()], loaded)
    close(loaded.eval(), expected, name)
    assert all(share > 0.3 for share in result.survived.values())
    for task, model in finetunes.items():
        if type(model) is type(base):
            assert not (tmp_path / "out" / "heads").exists()
            continue
        own = {key: value for key, value in model.state_dict().items() if not key.startswith(model.base_model_prefix)}
        head = load_file(tmp_path / "out" / "heads" / f"{task}.safetensors")
        prefix = "model." if kind == "checkpoint" else ""
        assert head.keys() == {prefix + key for key in own}
        assert all(torch.equal(head[prefix + key], value) for key, value in own.items())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_adapters(name, rslora, tmp_path):
    base = models.base_model(name)
    base.save_pretrained(tmp_path / "base")
    target = models.ARCHITECTURES[name][3][0]
    patterns = {"rank_pattern": {target: 2}, "alpha_pattern": {target: 7}, "use_rslora": rslora}
    adapters = {task: models.adapter(name, base, seed, **patterns) for seed, task in enumerate(["a", "b"], 1)}
    for task, model in adapters.items():
        model.save_pretrained(tmp_path / task)
    paths = {task: str(tmp_path / task) for task in adapters}
    method = DRM(density=DENSITY)
    merge_checkpoints(tmp_path / "base", paths, tmp_path / "full", method, output_format="full")
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "adapter", method)

    assert result.output_format == "adapter"
    finetunes = [copy.deepcopy(model).double().merge_and_unload() for model in adapters.values()]
    full = type(base).from_pretrained(tmp_path / "full").eval()
    adapter = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload().eval()
    for merged in (full, adapter):
        close(merged, independent_merge(base, finetunes, merged), name)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_adapters_of_embeddings_which_peft_saves_with_their_base(targets, tmp_path):
    """Beside the factors, the file has the frozen weight, which is not what the task learned."""
    base = models.base_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = models.adapter("llama", base, 1, target_modules=targets)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any(".base_layer." in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    for form in ("full", "adapter"):
        out = tmp_path / form
        paths = {"a": str(tmp_path / "a")}
        merge_checkpoints(tmp_path / "base", paths, out, TaskArithmetic(scale=1.0), output_format=form)
        if form == "full":
            merged = load_file(out / "model.safetensors")
        else:
            merged = PeftModel.from_pretrained(copy.deepcopy(base), out).merge_and_unload().state_dict()
        for key, value in expected.items():
            torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=1e-6)
    other = models.base_model("llama")
    with torch.no_grad():
        (other.lm_head if "lm_head" in targets else other.model.embed_tokens).weight[3, 2] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"a: its deltas were taken from another base: (lm_head|model.embed_tokens)"):
        merge_checkpoints(tmp_path / "other", {"a": str(tmp_path / "a")}, tmp_path / "out", TaskArithmetic(scale=1.0))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_one_adapter_at_coefficient_one_is_itself(bias, tmp_path):
    base = models.base_model("bert")
    base.save_pretrained(tmp_path / "base")
    model = models.adapter("bert", base, 1, bias=bias, modules_to_save=["pooler"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in key:
                parameter += 0.1
    model.save_pretrained(tmp_path / "a")
    method = TaskArithmetic(scale=1.0)
    merge_checkpoints(tmp_path / "base", {"a": str(tmp_path / "a")}, tmp_path / "out", method)
    expected = model.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=1e-6)


def test_rank_limit_reports_its_error(tmp_path):
    base = models.base_model("llama")
    base.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        models.adapter("llama", base, seed).save_pretrained(tmp_path / str(seed))
    paths = {task: str(tmp_path / task) for task in "12"}
    method = TaskArithmetic(scale=1.0)
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", method, rank=2)
    exact = independent_adapter(paths)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(result.rank_errors) == len(exact)
    for name, delta in exact.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        up, down = written[f"{module}.lora_B.weight"], written[f"{module}.lora_A.weight"]
        assert up.shape[1] == 2
        error = float((up.double() @ down.double() - delta).norm() / delta.norm())
        assert error == pytest.approx(result.rank_errors[name], rel=1e-4)


def independent_adapter(paths):
    total = {}
    for path in paths.values():
        tensors = load_file(Path(path) / "adapter_model.safetensors")
        for key, down in tensors.items():
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                delta = 5 / 3 * tensors[key.replace("lora_A", "lora_B")].double() @ down.double()
                total[name] = total.get(name, 0) + delta
    return total


def test_formats_mix(tmp_path):
    base = models.base_model("bert")
    base.save_pretrained(tmp_path / "base")
    tuned = [models.finetune("bert", base, seed) for seed in (1, 2)]
    tuned[0].save_pretrained(tmp_path / "folder")
    models.save_checkpoint(tuned[1], tmp_path / "task.ckpt")
    lora = models.adapter("bert", base, 3)
    lora.save_pretrained(tmp_path / "lora")
    paths = {"x": str(tmp_path / "folder"), "y": str(tmp_path / "task.ckpt"), "z": str(tmp_path / "lora")}
    merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", DRM(density=DENSITY))
    finetunes = [*(model.bert for model in tuned), copy.deepcopy(lora).double().merge_and_unload()]
    loaded = type(base).from_pretrained(tmp_path / "out").eval()
    # Beside dense deltas, an adapter's is a product in single precision.
    close(loaded, independent_merge(base, finetunes, loaded, noise=torch.finfo(torch.float32).eps), "bert")


@pytest.mark.parametrize("method", [TIES(0.3), TIES(0.3, "tensor"), DARETIES(0.5), Average(), IsoC()])
def test_other_methods_are_the_callbacks(method, tmp_path):
    """What files give is what `Method.merge` gives on the same deltas."""
    base = models.base_model("clip")
    base.save_pretrained(tmp_path / "base")
    tuned = {task: models.finetune("clip", base, seed) for seed, task in enumerate("ab", 1)}
    for task, model in tuned.items():
        model.save_pretrained(tmp_path / task)
    paths = {task: str(tmp_path / task) for task in tuned}
    merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", method)
    start = base.state_dict()
    deltas = {key: [model.state_dict()[key] - value for model in tuned.values()] for key, value in start.items()}
    linear = {f"{key}.weight" for key, child in base.named_modules() if isinstance(child, nn.Linear)}
    ready = method.calibrate(lambda: deltas.values())
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for key, parts in deltas.items():
        used = ready if method.elementwise or key in linear else TaskArithmetic(method.scale / 2)
        expected = start[key] + used.keyed([f"{task}/{key}" for task in tuned]).merge(parts)
        torch.testing.assert_close(merged[key], expected, rtol=1e-6, atol=1e-7)


def test_overrides(tmp_path):
    base = models.base_model("llama")
    base.save_pretrained(tmp_path / "base")
    tuned = [models.finetune("llama", base, seed) for seed in (1, 2)]
    for model, task in zip(tuned, "ab", strict=True):
        model.save_pretrained(tmp_path / task)
    recipe = Recipe(
        DRM(density=DENSITY),
        {"a": 0.5},
        overrides=[
            Override("*.layers.0.*q_proj*", rule="base"),
            Override("*.layers.0.*k_proj*", coefficients={"b": 2.0}),
            Override("*.layers.0.*", density=0.9),
            Override("*.layers.1.mlp.up_proj.weight", split=[8, 16]),
            Override("*norm*", rule="elect"),
        ],
    )
    merge_checkpoints(tmp_path / "base", {t: str(tmp_path / t) for t in "ab"}, tmp_path / "out", **vars(recipe))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    start, ends = base.state_dict(), [model.state_dict() for model in tuned]

    def change(name, merge, coefficients=(0.5, 1.0), rows=slice(None), **settings):
        deltas = [(end[name] - start[name]).double()[rows] for end in ends]
        method = {reference.drm: DRM, reference.ties: TIES, reference.average: Average}[merge](**settings)
        found = (merged[name] - start[name])[rows]
        expected = ties.settled(found, merge(deltas, coefficients, **settings), method, deltas)
        torch.testing.assert_close(merged[name][rows].double(), start[name][rows] + expected, rtol=1e-5, atol=1e-6)

    first, second = "model.layers.0.self_attn", "model.layers.1"
    assert torch.equal(merged[f"{first}.q_proj.weight"], start[f"{first}.q_proj.weight"])
    change(f"{first}.k_proj.weight", reference.drm, (0.5, 2.0), density=DENSITY)
    change(f"{first}.v_proj.weight", reference.drm, density=0.9)
    change(f"{second}.self_attn.v_proj.weight", reference.drm, density=DENSITY)
    change(f"{second}.mlp.up_proj.weight", reference.drm, rows=slice(8), density=DENSITY)
    change(f"{second}.mlp.up_proj.weight", reference.drm, rows=slice(8, 24), density=DENSITY)
    change(f"{second}.input_layernorm.weight", reference.ties, density=1.0)
    change("model.embed_tokens.weight", reference.average)


def test_tied_weights_are_written_once(tmp_path):
    base = models.base_model("t5")
    base.save_pretrained(tmp_path / "base")
    models.finetune("t5", base, 1).save_pretrained(tmp_path / "a")
    merge_checkpoints(tmp_path / "base", {"a": str(tmp_path / "a")}, tmp_path / "out", Average())
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tmp_path / "base" / "model.safetensors").keys()
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype, tmp_path):
    base = models.base_model("clip")
    base.save_pretrained(tmp_path / "base")
    tuned = models.finetune("clip", base, 1, size=0.2)
    tuned.save_pretrained(tmp_path / "a")
    method = TaskArithmetic(0.7)
    paths = {"a": str(tmp_path / "a")}
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", method, dtype=dtype)
    start, end = base.state_dict(), tuned.state_dict()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in merged.items():
        assert torch.equal(value, (start[key] + 0.7 * (end[key] - start[key])).to(getattr(torch, dtype)))
    assert 0 < result.rounding < 0.05
    assert type(base).from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


def test_adapters_of_layers_that_are_larger_than_the_sample(tmp_path):
    """What is left of each task is measured on as many entries of a factored delta as of the written weight."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(hidden_size=272, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    base.save_pretrained(tmp_path / "base")
    models.adapter("bert", base, 1).save_pretrained(tmp_path / "a")
    paths = {"a": tmp_path / "a"}
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", TaskArithmetic(1.0), output_format="full")
    assert result.survived["a"] == pytest.approx(1.0, abs=1e-5)


def test_an_adapter_keeps_something_of_every_task(tmp_path):
    """What is kept is measured on the file that was written."""
    base = models.base_model("llama")
    base.save_pretrained(tmp_path / "base")
    for seed, task in enumerate("ab", 1):
        targets = ["q_proj"] if task == "a" else ["v_proj", "k_proj"]
        models.adapter("llama", base, seed, target_modules=targets).save_pretrained(tmp_path / task)
    paths = {task: str(tmp_path / task) for task in "ab"}
    method, coefficients = TaskArithmetic(0.5), {"b": 0.2}
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", method, coefficients)
    assert result.output_format == "adapter"
    assert result.survived == {"a": pytest.approx(0.5), "b": pytest.approx(0.1)}
    assert "| a | 1 |" in (card := (tmp_path / "out" / "README.md").read_text())
    assert "| 50 % |" in card
    file = tmp_path / "b" / "adapter_model.safetensors"
    save_file({name: 0 * value for name, value in load_file(file).items()}, file)
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "zero", method, coefficients)
    assert "b: all its deltas are zero." in result.notes
