"""The public form, as in a notebook: every kind of input, held against a plain loop in float64."""

import copy
import dataclasses
import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetModel

import lightning_drm
from helpers import models
from lightning_drm import DRM, TIES, LiNeS, RegMean, TaskArithmetic, merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy
from lightning_drm.checkpoints.reading import TensorHeader, Tensors, readers
from lightning_drm.checkpoints.reading.weights import WeightsInput
from lightning_drm.checkpoints.writing.shards import ShardWriter
from lightning_drm.deltas import Collected, TaskStatistics, TaskVector, hash_tensor, save_task_vector
from lightning_drm.fusion import Override, Recipe

COEFFICIENTS = {"a": 0.7, "b": 1.5}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A base and two finetunes of it, as folders, adapters and run folders."""
    folder = tmp_path_factory.mktemp("bench")
    base = models.base_model("bert")
    base.save_pretrained(folder / "base")
    for seed, task in enumerate("ab", 1):
        models.finetune("bert", base, seed).save_pretrained(folder / f"full_{task}")
        models.adapter("bert", base, seed).save_pretrained(folder / f"lora_{task}")
        save_task_vector(stored(base, seed, task), folder / "run" / "tasks" / task)
    return folder


def stored(base, seed, task):
    """What a run folder keeps: deltas of some parameters, under the names of a LightningModule."""
    torch.manual_seed(seed)
    deltas = {f"model.{name}": torch.randn_like(value) for name, value in base.state_dict().items() if "query" in name}
    kinds = {name: "matrix" if name.endswith("weight") else "other" for name in deltas}
    hashes = {f"model.{name}": hash_tensor(value) for name, value in base.state_dict().items()}
    return TaskVector(task, deltas, kinds, {"head.weight": torch.ones(2, 2)}, hashes)


def finetuned(kind, task, base):
    """A finetune's values by the base's names, in float64."""
    seed = 1 + "ab".index(task)
    if kind == "full":
        state = models.finetune("bert", base, seed).bert.state_dict()
    elif kind == "lora":
        state = models.adapter("bert", copy.deepcopy(base), seed).double().merge_and_unload().state_dict()
    else:
        state = dict(base.state_dict())
        for name, delta in stored(base, seed, task).deltas.items():
            state[name.removeprefix("model.")] = state[name.removeprefix("model.")].double() + delta.double()
    return {name: value.double() for name, value in state.items()}


def plain_loop(kinds, scale=0.5):
    """Task arithmetic: base + scale · Σ λ δ, one parameter after the other."""
    base = models.base_model("bert")
    start = {name: value.double() for name, value in base.state_dict().items()}
    ends = {task: finetuned(kind, task, base) for task, kind in kinds.items()}
    return {
        name: value + scale * sum(COEFFICIENTS[task] * (end[name] - value) for task, end in ends.items())
        for name, value in start.items()
    }


def path_of(bench, kind, task):
    return bench / "run" if kind == "run" else bench / f"{kind}_{task}"


@pytest.mark.parametrize("kinds", [("full", "full"), ("run", "run"), ("full", "lora"), ("lora", "run")], ids="-".join)
def test_folders_adapters_and_run_folders(kinds, bench, tmp_path):
    kinds = dict(zip("ab", kinds, strict=True))
    paths = {task: path_of(bench, kind, task) for task, kind in kinds.items()}
    result = merge_checkpoints(bench / "base", paths, tmp_path / "out", TaskArithmetic(scale=0.5), COEFFICIENTS)
    merged, expected = load_file(result.folder / "model.safetensors"), plain_loop(kinds)
    assert result.folder == tmp_path / "out"
    assert result.output_format == "full"
    assert set(result.survived) == {"a", "b"}
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert {file.stem for file in (tmp_path / "out" / "heads").glob("*")} == {t for t in kinds if kinds[t] != "lora"}


def test_adapters_give_an_adapter(bench, tmp_path):
    paths = {task: str(bench / f"lora_{task}") for task in "ab"}
    result = merge_checkpoints(str(bench / "base"), paths, str(tmp_path / "out"), TaskArithmetic(0.5), COEFFICIENTS)
    assert result.output_format == "adapter"
    adapted = PeftModel.from_pretrained(models.base_model("bert").double(), tmp_path / "out", torch_dtype=torch.float64)
    merged = adapted.merge_and_unload().state_dict()
    for name, value in plain_loop({"a": "lora", "b": "lora"}).items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-6)


def scaled_loop(kinds, beta):
    """LiNeS around the sum: alpha from all parameters, and BERT's two layers are the first and the last block."""
    sums = plain_loop(kinds, scale=1.0)
    start = {name: value.double() for name, value in models.base_model("bert").state_dict().items()}
    merged = summed = sum(float((sums[name] - value).abs().sum()) for name, value in start.items())
    alpha = summed / merged / len(kinds)
    last = {name for name in start if name.startswith("encoder.layer.1.")}
    return {name: value + (alpha + beta * (name in last)) * (sums[name] - value) for name, value in start.items()}


@pytest.mark.parametrize("kinds", [("full", "full"), ("run", "run"), ("full", "lora")], ids="-".join)
def test_lines_scales_files_by_depth(kinds, bench, tmp_path):
    kinds = dict(zip("ab", kinds, strict=True))
    paths = {task: path_of(bench, kind, task) for task, kind in kinds.items()}
    method = LiNeS(TaskArithmetic(scale=1.0), beta=0.3)
    result = merge_checkpoints(bench / "base", paths, tmp_path / "out", method, COEFFICIENTS)
    merged = load_file(result.folder / "model.safetensors")
    for name, value in scaled_loop(kinds, 0.3).items():
        torch.testing.assert_close(merged[name].double(), value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")
    notes = [note for note in result.notes if note.startswith("LiNeS")]
    rest = "" if kinds["a"] == "run" else "; 7 parameters are in no block"  # embeddings, their norm, and the pooler
    assert notes == [
        f"LiNeS: the depth goes from encoder.layer.0 to encoder.layer.1 (2 blocks){rest}.",
        "LiNeS: alpha is 0.5, beta is 0.3.",
    ]
    card = (result.folder / "README.md").read_text()
    assert all(f"- {note}" in card for note in notes)
    assert repr(method) in card


def test_lines_scales_an_adapter(bench, tmp_path):
    paths = {task: bench / f"lora_{task}" for task in "ab"}
    method = LiNeS(TaskArithmetic(scale=1.0), beta=0.3)
    result = merge_checkpoints(bench / "base", paths, tmp_path / "out", method, COEFFICIENTS)
    assert result.output_format == "adapter"
    adapted = PeftModel.from_pretrained(models.base_model("bert").double(), tmp_path / "out", torch_dtype=torch.float64)
    merged = adapted.merge_and_unload().state_dict()
    for name, value in scaled_loop({"a": "lora", "b": "lora"}, 0.3).items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-6)


def test_keywords_of_the_recipe_and_of_the_output(bench, tmp_path):
    calls = []
    merge_checkpoints(
        bench / "base",
        {"a": bench / "full_a"},
        tmp_path / "out",
        TaskArithmetic(0.5),
        overrides=[Override("*query*", rule="base"), Override("*.bias", coefficients={"a": 3.0})],
        dtype="float16",
        max_shard_size="10KB",
        progress=lambda done, total: calls.append((done, total)),
    )
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    merged = {name: value for shard in shards for name, value in load_file(shard).items()}
    base = models.base_model("bert")
    start, end = base.state_dict(), models.finetune("bert", base, 1).bert.state_dict()
    for name, value in merged.items():
        coefficient = 0.0 if "query" in name else 3.0 if name.endswith(".bias") else 1.0
        expected = start[name].double() + 0.5 * coefficient * (end[name].double() - start[name].double())
        assert value.dtype == torch.float16
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-6)
    assert calls == [(done, len(merged)) for done in range(1, len(merged) + 1)]


def test_by_default_nothing_is_overwritten(bench, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match=r"out exists; choose another output, or set overwrite\."):
        merge_checkpoints(bench / "base", {"a": bench / "full_a"}, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_a_run_folder_without_the_task(bench, tmp_path):
    message = r"c: The run folder .*run has no task 'c', only a, b; name the task as the run does, or give the path"
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(bench / "base", {"c": bench / "run"}, tmp_path / "out", TIES())


@pytest.mark.parametrize(("name", "what"), [("run", "stored deltas"), ("lora_a", "an adapter")])
def test_a_base_must_be_a_whole_model(name, what, bench, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} is {what}; expected the model that all tasks started from"):
        merge_checkpoints(bench / name, {"a": bench / "full_a"}, tmp_path / "out")


def test_a_base_in_no_known_format(bench, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "weights.npz")
    message = r"weights.npz is in no known format; expected a transformers folder .*, or a checkpoint file \(.ckpt"
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(tmp_path / "weights.npz", {"a": bench / "full_a"}, tmp_path / "out")


@pytest.mark.parametrize("inside", ["", "tasks/a", "tasks/a/deltas.safetensors"])
def test_a_run_folder_may_be_named_by_what_is_in_it(inside, bench, tmp_path):
    """The file of deltas too, which is a file of tensors but not of weights."""
    merge_checkpoints(bench / "base", {"a": bench / "run" / inside}, tmp_path / "out", TaskArithmetic(0.5), {"a": 0.7})
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in plain_loop({"a": "run"}).items():
        torch.testing.assert_close(merged[name].double(), value, rtol=1e-6, atol=1e-6)


class NumpyTensors(Tensors):
    def __init__(self, path):
        super().__init__([path])
        self._arrays = np.load(path)
        for name, array in self._arrays.items():
            self.headers[name] = TensorHeader(array.shape, torch.from_numpy(array).dtype)

    def read(self, name):
        return torch.from_numpy(self._arrays[name])


class NumpyFile(WeightsInput):
    expected = "a numpy archive (.npz)"

    @classmethod
    def opens(cls, path):
        return path.suffix == ".npz"

    @classmethod
    def open(cls, path, task, dequantize):
        return cls(path, NumpyTensors(path))


def test_a_new_format_is_a_class_and_a_line(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READERS", [*readers.READERS, NumpyFile])
    for name in ("base", "full_a"):
        arrays = {key: value.numpy() for key, value in load_file(bench / name / "model.safetensors").items()}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    paths = {"a": tmp_path / "full_a.npz"}
    options = {"heads": ["classifier.*"], "policy": "base_fill"}
    merge_checkpoints(tmp_path / "base.npz", paths, tmp_path / "out", TaskArithmetic(0.5), {"a": 0.7}, **options)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in plain_loop({"a": "full"}).items():
        torch.testing.assert_close(merged[name].double(), value, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"or a numpy archive \(\.npz\)\.$"):
        merge_checkpoints(bench / "base", {"a": bench}, tmp_path / "none")


def test_keywords_and_defaults_are_those_of_the_recipe_and_the_policy():
    """They are written out for readers of the signature, so they must not drift apart."""
    parameters = inspect.signature(merge_checkpoints).parameters
    written = {name: parameter.default for name, parameter in parameters.items()}
    for fields in (vars(Recipe()), vars(MismatchPolicy())):
        for name, default in fields.items():
            assert written[name] == default or (name, written[name]) == ("coefficients", None)
    assert lightning_drm.merge_checkpoints is merge_checkpoints


def test_statistics_of_run_folders_are_taken_and_missing_ones_refused(bench, tmp_path):
    """RegMean by its formula on the layers whose inputs were collected; models of others have none."""
    base = models.base_model("bert")
    grams: dict[str, list[torch.Tensor]] = {}
    vectors = [stored(base, seed, task) for seed, task in enumerate("ab", 1)]
    for vector in vectors:
        tensors = {}
        for name in (name for name, kind in vector.kinds.items() if kind == "matrix"):
            inputs = torch.randn(30, vector.deltas[name].shape[1])
            tensors[f"gram::{name}"] = inputs.T @ inputs
            grams.setdefault(name.removeprefix("model."), []).append(tensors[f"gram::{name}"].double())
        keys = {"gram": {key.removeprefix("gram::"): key for key in tensors}}
        statistics = TaskStatistics(tensors, keys, {"gram": Collected()})
        save_task_vector(dataclasses.replace(vector, statistics=statistics), tmp_path / "run" / "tasks" / vector.task)
    merge_checkpoints(bench / "base", dict.fromkeys("ab", tmp_path / "run"), tmp_path / "merged", method=RegMean())
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, of_tasks in grams.items():
        deltas = [vector.deltas[f"model.{name}"].double() for vector in vectors]
        shrunk = [0.95 * gram + 0.05 * torch.diag(gram.diagonal()) for gram in of_tasks]
        met = sum(delta @ gram for delta, gram in zip(deltas, shrunk, strict=True))
        expected = base.state_dict()[name].double() + met @ torch.linalg.inv(sum(shrunk))
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-4, atol=1e-5)
    models_of_others = {"a": tmp_path / "run", "b": bench / "full_b"}
    with pytest.raises(
        ValueError, match=r"RegMean needs statistics .* there are none of b: .* models that others made"
    ):
        merge_checkpoints(bench / "base", models_of_others, tmp_path / "refused", method=RegMean())


@pytest.mark.parametrize("output", ["run", "base", "."])
def test_a_folder_with_an_input_is_never_replaced(output, bench, tmp_path):
    for name in ("base", "run"):
        shutil.copytree(bench / name, tmp_path / name)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    base = tmp_path / "base" / "model.safetensors"
    with pytest.raises(ValueError, match=r"holds an input, .*/(base/model.safetensors|run/tasks/a)"):
        merge_checkpoints(base, {"a": tmp_path / "run"}, tmp_path / output, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_adapter_that_no_task_changes_somewhere_loads(tmp_path):
    base = models.base_model("bert")
    base.save_pretrained(tmp_path / "base")
    for seed, task in enumerate("ab", 1):
        adapter = models.adapter("bert", base, seed)
        untrained = [p for n, p in adapter.named_parameters() if "layer.0.attention.self.query.lora_B" in n]
        assert untrained, "the case shows nothing"
        torch.nn.init.zeros_(untrained[0])
        adapter.save_pretrained(tmp_path / task)
    merge_checkpoints(tmp_path / "base", {task: tmp_path / task for task in "ab"}, tmp_path / "out", DRM())
    loaded = PeftModel.from_pretrained(models.base_model("bert"), tmp_path / "out")
    (layer,) = [m for n, m in loaded.named_modules() if n.endswith("layer.0.attention.self.query")]
    assert not layer.get_delta_weight("default").any()


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("changed", ["nothing", "settings", "tensors"])
def test_a_resumed_merge_begins_anew_where_an_adapter_changed(changed, bench, tmp_path, monkeypatch):
    for name in ("base", "lora_a"):
        shutil.copytree(bench / name, tmp_path / name)
    settings = tmp_path / "lora_a" / "adapter_config.json"
    arguments = (tmp_path / "base", {"a": tmp_path / "lora_a"}, tmp_path / "out", TaskArithmetic(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(*arguments, output_format="full")
    if changed == "settings":
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora_alpha": 64}))
    if changed == "tensors":  # somewhere in the middle, perhaps, which no quick hash sees
        (tmp_path / "lora_a" / "adapter_model.safetensors").touch()
    assert (merge_checkpoints(*arguments, output_format="full").num_resumed > 0) is (changed == "nothing")


def test_lora_on_a_head_is_refused_before_anything_is_merged(bench, tmp_path):
    with pytest.raises(ValueError, match=r"a: its head has a change and no value at .*query"):
        merge_checkpoints(bench / "base", {"a": bench / "lora_a"}, tmp_path / "out", heads=["*layer.0*query*"])


def test_models_without_tokens_are_merged(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    for seed, name in enumerate(("base", "a")):
        torch.manual_seed(seed)
        ResNetModel(config).save_pretrained(tmp_path / name)
    merge_checkpoints(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", TaskArithmetic(1.0))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "a"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_an_adapter_that_unties_the_head_is_refused(tmp_path):
    base = models.save_llamas(tmp_path, tie_word_embeddings=True)
    adapter = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "modules_to_save" in name:
                parameter += torch.randn_like(parameter)
    adapter.save_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight differ, but the base ties"):
        merge_checkpoints(tmp_path / "base", {"a": tmp_path / "untied"}, tmp_path / "out")


def test_a_base_that_is_tied_by_its_configuration_alone_is_refused(tmp_path):
    models.save_llamas(tmp_path)
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"The base's configuration ties lm_head.weight to model.embed_tokens.weight"):
        merge_checkpoints(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out")


def save_gpt2(folder, *targets):
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    base.save_pretrained(folder / "base")
    adapter = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=[*targets], fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapter.save_pretrained(folder / "a")
    return base, adapter


def test_turned_weights_of_a_base_of_unknown_class_make_an_adapter_that_loads(tmp_path):
    base, adapter = save_gpt2(tmp_path, "c_attn")
    file = tmp_path / "base" / "model.safetensors"
    result = merge_checkpoints(file, {"a": tmp_path / "a"}, tmp_path / "out", TaskArithmetic(1.0))
    assert result.output_format == "adapter"
    loaded, name = PeftModel.from_pretrained(base, tmp_path / "out"), "transformer.h.0.attn.c_attn"
    ours, theirs = (m.get_base_model().get_submodule(name).get_delta_weight("default") for m in (loaded, adapter))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_flagged", [True, False])
def test_square_weights_of_a_base_of_unknown_class_are_refused_where_some_are_turned(is_flagged, tmp_path):
    save_gpt2(tmp_path, "c_attn", "c_proj")
    settings = tmp_path / "a" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "fan_in_fan_out": is_flagged}))
    with pytest.raises(ValueError, match=r"a: .*attn.c_proj.weight is square, and whether it is stored turned"):
        merge_checkpoints(tmp_path / "base" / "model.safetensors", {"a": tmp_path / "a"}, tmp_path / "out")
