"""Everything that cannot be merged, with its message; all problems of one merge come together."""

import json
import shutil

import pytest
import torch
from helpers import models
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from lightning_drm import DARETIES, DRM, Average, TaskArithmetic
from lightning_drm.checkpoints.merge import merge_files
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan, refuse
from lightning_drm.fusion import Override, Recipe


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A base, a finetune and an adapter that merge without complaint."""
    folder = tmp_path_factory.mktemp("bench")
    base = models.base_model("bert")
    base.save_pretrained(folder / "base")
    models.finetune("bert", base, 1).save_pretrained(folder / "good")
    models.adapter("bert", base, 2).save_pretrained(folder / "lora")
    return folder


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
WORDS = "bert.embeddings.word_embeddings.weight"
WEIGHTS = {  # what is done to a finetune's tensors, the policy, and the message
    "missing": (
        lambda t: t.pop(QUERY),
        MismatchPolicy(),
        "lacks 1 of the base's parameters: encoder.layer.0.attention.self.q",
    ),
    "extra": (
        lambda t: t.update({QUERY.replace("0", "7"): torch.ones(2)}),
        MismatchPolicy(),
        "has 1 parameters that the base has not: bert.encoder.layer.7",
    ),
    "shape": (
        lambda t: t.update({QUERY: torch.ones(4, 16)}),
        MismatchPolicy(),
        r"query.weight has shape \(4, 16\), the base's has \(16, 16\)",
    ),
    "float8": (
        lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}),
        MismatchPolicy(),
        "query.weight is in torch.float8_e4m3fn, which is a quantized type",
    ),
    "vocabulary": (
        lambda t: t.update({WORDS: torch.ones(43, 16)}),
        MismatchPolicy(),
        "word_embeddings.weight has 43 rows, the base's vocabulary has 40; choose --vocabulary base or intersection",
    ),
    "quantized": (
        lambda t: t.update({QUERY + ".absmax": torch.ones(2)}),
        MismatchPolicy(),
        "is quantized .*merge the unquantized weights",
    ),
    "unrelated": (
        lambda t: [t.pop(name) for name in list(t)] and t.update(other=torch.ones(2)),
        MismatchPolicy(),
        "none of its 1 parameters is in the base",
    ),
    "not_finite": (
        lambda t: t[QUERY].view(-1)[3].fill_(float("nan")),
        MismatchPolicy(),
        r"query\.weight: Average: delta of task 0 holds NaN or infinite values \(task 0 is x\)",
    ),
    "adapter_of_folders": (
        lambda t: None,
        MismatchPolicy(output_format="adapter"),
        "The output cannot be an adapter: x is weights",
    ),
    "rank_of_a_model": (
        lambda t: None,
        MismatchPolicy(rank=2),
        "rank limits a merged adapter, but the output is a whole model",
    ),
    "overflow": (
        lambda t: t[QUERY].mul_(1e7),
        MismatchPolicy(dtype="float16"),
        "query.weight does not fit into torch.float16",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case, bench, tmp_path):
    change, mismatch, message = WEIGHTS[case]
    shutil.copytree(bench / "good", tmp_path / "x")
    edit_weights(tmp_path / "x", change)
    with pytest.raises(ValueError, match=message):
        merge_files(str(bench / "base"), {"x": str(tmp_path / "x")}, tmp_path / "out", Recipe(Average()), mismatch)
    assert not (tmp_path / "out").exists()


ADAPTERS = {  # what is changed in adapter_config.json, and the message
    "dora": ({"use_dora": True}, r"DoRA \(use_dora=True\) is not W \+ s·B·A"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "bdlora": ({"use_bdlora": {"x": 1}}, "BD-LoRA"),
    "lora_bias": ({"lora_bias": True}, r"lora_bias \(lora_bias=True\)"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weights"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["experts"]}, "target_parameters"),
    "future": ({"use_something_new": True}, "use_something_new"),
    "ia3": ({"peft_type": "IA3"}, "IA3 adapters are not supported, only LoRA is"),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING adapters are not supported"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, bench, tmp_path):
    changes, message = ADAPTERS[case]
    shutil.copytree(bench / "lora", tmp_path / "x")
    edit_json(tmp_path / "x" / "adapter_config.json", **changes)
    plan = make_plan(str(bench / "base"), {"x": str(tmp_path / "x")}, Recipe(), MismatchPolicy())
    with pytest.raises(ValueError, match=message):
        refuse(plan.problems)


RECIPES = {  # recipe, policy, message
    "pattern": (
        Recipe(overrides=[Override("*nothing*")]),
        MismatchPolicy(),
        "override '\\*nothing\\*' matches no parameter",
    ),
    "task": (Recipe(coefficients={"z": 1.0}), MismatchPolicy(), "unknown tasks z; tasks: x, lora"),
    "override_task": (Recipe(overrides=[Override("*", coefficients={"y": 1.0})]), MismatchPolicy(), "unknown tasks y"),
    "density": (Recipe(Average(), overrides=[Override("*", density=0.5)]), MismatchPolicy(), "Average has no density"),
    "density_range": (Recipe(overrides=[Override("*", density=2.0)]), MismatchPolicy(), r"density must be in \(0, 1\]"),
    "density_of_base": (Recipe(overrides=[Override("*", "base", 0.5)]), MismatchPolicy(), "which rule base has not"),
    "vector": (
        Recipe(overrides=[Override("*bias", "method")]),
        MismatchPolicy(),
        "DRM merges matrices: give it rule average",
    ),
    "split": (
        Recipe(overrides=[Override("*query.weight", split=3)]),
        MismatchPolicy(),
        "neither side is a multiple of 3",
    ),
    "split_sum": (
        Recipe(overrides=[Override("*query.weight", split=[4, 4])]),
        MismatchPolicy(),
        "the parts add up to 8",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(case, bench):
    recipe, mismatch, message = RECIPES[case]
    paths = {"x": str(bench / "good"), "lora": str(bench / "lora")}
    plan = make_plan(str(bench / "base"), paths, recipe, mismatch)
    with pytest.raises(ValueError, match=message):
        refuse(plan.problems)


def test_adapter_output_names_the_method_that_has_no_factors(bench):
    plan = make_plan(
        str(bench / "base"), {"x": str(bench / "lora")}, Recipe(DARETIES()), MismatchPolicy(output_format="adapter")
    )
    assert plan.problems == [
        "The output cannot be an adapter: with DARETIES, dropping single entries leaves a matrix of full rank."
    ]


def make(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return str(folder)


PLACES = {  # what is given as a model, and the message
    "nothing": (lambda path: str(path / "gone"), "There is no file or folder"),
    "hub": (
        lambda path: "nobody/nothing",
        "nobody/nothing is no file or folder here, and the hub (cannot be asked: there is no|has no such model)",
    ),
    "empty": (lambda path: make(path / "e"), "holds nothing to merge; expected a transformers folder"),
    "ending": (lambda path: make(path / "e", x__gguf="x") + "/x.gguf", "has an unknown ending; expected"),
    "torn": (lambda path: make(path / "e", model__safetensors="xxxxxxxxxxxxx"), "is not a whole safetensors file"),
    "torn_bin": (lambda path: make(path / "e", x__ckpt="xx") + "/x.ckpt", "cannot be read as a file that torch.save"),
    "no_adapter": (lambda path: make(path / "e", adapter_config__json='{"peft_type": "LORA"}'), "has an adapter_confi"),
    "shards": (
        lambda path: make(path / "e", **{"model.safetensors.index.json": '{"weight_map": {"a": "m-1.safetensors"}}'}),
        "names files that are not there: m-1.safetensors",
    ),
    "gptq": (
        lambda path: copy_with(path, quantization_config={"quant_method": "gptq"}),
        r"is quantized \(gptq\)",
    ),
    "lora_checkpoint": (
        lambda path: lora_checkpoint(path, None),
        "holds LoRA layers, but no LoraConfig among its hyper-parameters that tells their scaling; save it with",
    ),
    "lora_checkpoints_two": (
        lambda path: lora_checkpoint(path, {"a": LoraConfig(r=2), "b": LoraConfig(r=4)}),
        "holds 2 different LoraConfigs; expected one",
    ),
    "lora_checkpoint_dora": (
        lambda path: lora_checkpoint(path, {"lora": LoraConfig(use_dora=True)}),
        r"DoRA \(use_dora=True\) is not W",
    ),
    "lora_checkpoint_anchored": (
        lambda path: lora_checkpoint(path, {"lora": LoraConfig(alpha_pattern={"^encoder.q": 4})}),
        "alpha_pattern '.encoder.q' starts at the module that got the adapter",
    ),
    "lora_checkpoint_adapters": (
        lambda path: lora_checkpoint(path, {"lora": LoraConfig()}, "m.lora_A.other.weight"),
        "holds the adapters default, other; expected one LoRA adapter",
    ),
    "not_tensors": (
        lambda path: torch.save({"a": 1}, path / "x.pt") or str(path / "x.pt"),
        "holds no tensors by name",
    ),
}


def lora_checkpoint(path, hyperparameters, *more):
    state = {name: torch.ones(1, 1) for name in ("m.lora_A.default.weight", "m.lora_B.default.weight", *more)}
    torch.save({"state_dict": state, "hyper_parameters": hyperparameters}, path / "x.ckpt")
    return str(path / "x.ckpt")


def copy_with(path, **changes):
    base = models.base_model("bert")
    base.save_pretrained(path / "e")
    edit_json(path / "e" / "config.json", **changes)
    return str(path / "e")


@pytest.mark.parametrize("case", PLACES)
def test_places(case, bench, tmp_path):
    place, message = PLACES[case]
    plan = make_plan(str(bench / "base"), {"x": place(tmp_path)}, Recipe(), MismatchPolicy())
    with pytest.raises(ValueError, match=message):
        refuse(plan.problems)


def test_a_base_that_is_an_adapter(bench):
    with pytest.raises(ValueError, match="is an adapter; expected the model that it adapts"):
        make_plan(str(bench / "lora"), {"x": str(bench / "good")}, Recipe(), MismatchPolicy())


def test_an_adapter_of_another_base(bench, tmp_path):
    torch.manual_seed(9)
    BertModel(BertConfig(**models.TEXT)).save_pretrained(tmp_path / "other")
    shutil.copytree(bench / "lora", tmp_path / "x")
    edit_json(tmp_path / "x" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
    plan = make_plan(str(bench / "base"), {"x": str(tmp_path / "x")}, Recipe(), MismatchPolicy())
    assert plan.problems == [f"x: was trained on {tmp_path / 'other'}, which is not {bench / 'base'}."]
    edit_json(tmp_path / "x" / "adapter_config.json", base_model_name_or_path=str(bench / "base"))
    assert not make_plan(str(bench / "base"), {"x": str(tmp_path / "x")}, Recipe(), MismatchPolicy()).problems


def test_all_problems_come_at_once(bench, tmp_path):
    for name, change in (("a", WEIGHTS["missing"][0]), ("b", WEIGHTS["shape"][0])):
        shutil.copytree(bench / "good", tmp_path / name)
        edit_weights(tmp_path / name, change)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    paths = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b"), "c": str(tmp_path / "c"), "d/e": str(bench / "good")}
    with pytest.raises(ValueError, match="6 problems") as error:
        merge_files(str(bench / "base"), paths, tmp_path / "out", Recipe(coefficients={"z": 1.0}))
    for message in ("a: lacks", "b: encoder", "c: There is no", "got 'd/e'", "unknown tasks z", "out exists"):
        assert message in str(error.value)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_adapter_in_which_nothing_is_left_of_a_task(bench, tmp_path):
    """Two directions at right angles, and room for one."""
    for task, axis in (("a", 0), ("b", 1)):
        shutil.copytree(bench / "lora", tmp_path / task)
        file = tmp_path / task / "adapter_model.safetensors"
        tensors = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
        for name, value in tensors.items():
            (value[0] if "lora_A" in name else value[:, 0])[axis] = 2.0 - axis
        save_file(tensors, file)
    paths = {task: str(tmp_path / task) for task in "ab"}
    with pytest.raises(ValueError, match=r"Nothing of task b is left in the merged weights.*higher density or rank"):
        merge_files(str(bench / "base"), paths, tmp_path / "out", Recipe(TaskArithmetic(1.0)), MismatchPolicy(rank=1))
    assert not (tmp_path / "out").exists()


def test_a_task_of_which_nothing_is_left(bench, tmp_path):
    """Deltas below the output's rounding."""
    shutil.copytree(bench / "good", tmp_path / "x")
    half = BertModel.from_pretrained(bench / "base", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    start = {name: value.float() for name, value in load_file(tmp_path / "base" / "model.safetensors").items()}
    save_file(
        {f"bert.{name}": torch.nextafter(value, value + 1) for name, value in start.items()},
        tmp_path / "x" / "model.safetensors",
    )
    with pytest.raises(ValueError, match="Nothing of task x is left in the merged weights"):
        merge_files(str(tmp_path / "base"), {"x": str(tmp_path / "x")}, tmp_path / "out", Recipe(DRM()))
