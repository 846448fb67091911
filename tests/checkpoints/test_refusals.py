"""Everything that cannot be merged, with its message; all problems of one merge come together."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from helpers import models
from helpers.limits import time_limit
from lightning_drm import DARETIES, DRM, Average, TaskArithmetic, merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan, refuse
from lightning_drm.checkpoints.reading import module_patterns
from lightning_drm.checkpoints.reading.module_patterns import matched_keys
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
BASE_QUERY = QUERY.removeprefix("bert.")
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
        "has a parameter that the base lacks: bert.encoder.layer.7",
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
        "word_embeddings.weight has 43 rows, but the base's vocabulary has 40; set vocabulary to base or intersection",
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
    "words": (
        lambda t: None,
        MismatchPolicy(policy="lax", output_format="zip"),
        r"policy must be one of strict, intersection, base_fill, got 'lax'\.\n  - "
        r"output_format must be one of auto, full, adapter, got 'zip'\.",
    ),
    "heads": (
        lambda t: None,
        MismatchPolicy(heads=["classifier*", "clasifier*"]),
        r"heads: the pattern 'clasifier\*' matches nothing in the base or in a task\.$",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case, bench, tmp_path):
    change, mismatch, message = WEIGHTS[case]
    shutil.copytree(bench / "good", tmp_path / "x")
    edit_weights(tmp_path / "x", change)
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(bench / "base", {"x": str(tmp_path / "x")}, tmp_path / "out", Average(), **vars(mismatch))
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
    "ia3": ({"peft_type": "IA3"}, "IA3 adapters are not supported; only LoRA is"),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING adapters are not supported"),
    "kind": ({"peft_type": ["LORA"]}, r"\['LORA'\] adapters are not supported; only LoRA is"),
    "rank_of_factors": (
        {"r": 64},
        r"x: adapter_config.json does not agree with its factors: encoder\S*dense has rank 3, but r says 64; .*3 more",
    ),
    "rank_zero": ({"r": 0}, "x/adapter_config.json: r must be a whole number of at least 1, got 0"),
    "rank_text": ({"r": "x"}, "r must be a whole number of at least 1, got 'x'"),
    "rank_true": ({"r": True}, "r must be a whole number of at least 1, got True"),
    "rank_of_a_name": (
        {"rank_pattern": {"query": 4}},
        "0.attention.self.query has rank 3, but rank_pattern 'query' says 4; .*1.attention.self.query has rank 3, but",
    ),
    "rank_pattern": ({"rank_pattern": ["query"]}, r"rank_pattern must give a number for each name, got \['query'\]"),
    "rank_pattern_value": ({"rank_pattern": {"query": 2.5}}, "rank_pattern must give a whole number of at least 1 for"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha must be a finite number, got '16'"),
    "alpha_infinite": ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number, got inf"),
    "alpha_huge": ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, got 10000"),
    "alpha_null": ({"lora_alpha": None}, "lora_alpha must be a finite number, got None"),
    "alpha_pattern": (
        {"alpha_pattern": {"query": None}},
        "alpha_pattern must give a finite number for 'query', got None",
    ),
    "rslora": ({"use_rslora": "no"}, "use_rslora must be true or false, got 'no'"),
    "init_list": ({"init_lora_weights": ["pissa"]}, r"init_lora_weights=\['pissa'\] changes the base weights"),
    "base_name": ({"base_model_name_or_path": 7}, "base_model_name_or_path must be a name, got 7"),
    "task_type": ({"task_type": "SINGING"}, "task_type must be one of SEQ_CLS, .*, got 'SINGING'"),
    "several": ({"r": 0, "use_rslora": 1}, "r must be a whole number of at least 1, got 0; use_rslora must be true or"),
}
SLOW = ["(.|[a-z.]|[0-9a-z]|..)*[!?]", "(.|.|..)+[!?]"]  # on names of this length, longer than anybody lives
SLOW_IN_RE = ["(([a-z]+)+[.0-9]*)+!", "(.?){60}.{60}!", r"(.*)+(.*)+(.*)+\1!", "(.|.|..)+!"]  # match no name


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, bench, tmp_path):
    changes, message = ADAPTERS[case]
    shutil.copytree(bench / "lora", tmp_path / "x")
    edit_json(tmp_path / "x" / "adapter_config.json", **changes)
    plan = make_plan(str(bench / "base"), {"x": str(tmp_path / "x")}, Recipe(), MismatchPolicy())
    with pytest.raises(ValueError, match=message):
        refuse(plan.problems)


BASES = {  # how the base's weights are changed, what is trained of them, how to merge, and the message
    "overflow of what is kept": (
        lambda t: t[BASE_QUERY].mul_(1e7),
        lambda t: t.pop(QUERY),
        MismatchPolicy("base_fill", dtype="float16"),
        r"query.weight does not fit into torch.float16: it has a value of \d\.\d+e\+0\d",
    ),
    "float8": (
        lambda t: t.update({BASE_QUERY: t[BASE_QUERY].to(torch.float8_e4m3fn)}),
        lambda t: None,
        MismatchPolicy(),
        rf"stores 1 of the merged weights in 8-bit floats, to which .* rounded \({BASE_QUERY}\): set dtype to",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_bases(case, bench, tmp_path):
    change, of_task, mismatch, message = BASES[case]
    for name, folder, own in (("base", "base", change), ("good", "x", of_task)):
        shutil.copytree(bench / name, tmp_path / folder)
        edit_weights(tmp_path / folder, own)
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "out", Average(), **vars(mismatch))
    assert not (tmp_path / "out").exists()


def test_8_bit_floats_of_the_base_stay_where_nothing_is_merged(bench, tmp_path):
    for name, folder in (("base", "base"), ("good", "x")):
        shutil.copytree(bench / name, tmp_path / folder)
    edit_weights(tmp_path / "base", lambda t: t.update({BASE_QUERY: t[BASE_QUERY].to(torch.float8_e4m3fn)}))
    edit_weights(tmp_path / "x", lambda t: t.pop(QUERY))
    merge_checkpoints(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "out", Average(), policy="base_fill")
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert merged[BASE_QUERY].dtype == torch.float8_e4m3fn
    assert torch.equal(merged[BASE_QUERY].view(torch.uint8), base[BASE_QUERY].view(torch.uint8))


def test_a_merged_adapter_does_not_care_for_8_bit_floats_of_the_base(bench, tmp_path):
    shutil.copytree(bench / "base", tmp_path / "base")
    edit_weights(tmp_path / "base", lambda t: t.update({BASE_QUERY: t[BASE_QUERY].to(torch.float8_e4m3fn)}))
    for base, output in ((bench / "base", "of_floats"), (tmp_path / "base", "of_bytes")):
        merge_checkpoints(base, {"x": bench / "lora"}, tmp_path / output, Average())
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("of_bytes", "of_floats"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [*SLOW, *SLOW_IN_RE])
def test_a_pattern_that_takes_forever(pattern, field, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(module_patterns, "_SECONDS", 0.5)
    shutil.copytree(bench / "lora", tmp_path / "x")
    edit_json(tmp_path / "x" / "adapter_config.json", **{field: {pattern: 4}})
    with time_limit(10):
        plan = make_plan(str(bench / "base"), {"x": str(tmp_path / "x")}, Recipe(), MismatchPolicy())
    told = [f"the pattern {pattern!r} in {field} takes too long to match encoder.layer.0.attention." in problem
            for problem in plan.problems]  # fmt: skip
    assert told == ([True] if pattern in SLOW else [])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"'\(' in rank_pattern is not a regular expression"),
        ("(" * 900, r"is not a regular expression"),
        ("a|" * 900, r"the pattern 'a\|.*…' in rank_pattern is longer than 1,000 characters"),
    ],
)
def test_a_pattern_that_is_none(pattern, message, bench, tmp_path):
    shutil.copytree(bench / "lora", tmp_path / "x")
    edit_json(tmp_path / "x" / "adapter_config.json", rank_pattern={pattern: 3})
    plan = make_plan(str(bench / "base"), {"x": str(tmp_path / "x")}, Recipe(), MismatchPolicy())
    with pytest.raises(ValueError, match=message):
        refuse(plan.problems)


NAMES = ["q", "layers.0.q", "layers.10.q", "layers.0.q.extra", "xq", "layersX0Xq", "a-b.layers.0.k_proj"]
KEYS = [
    "q",
    "^q",
    "layers.0.q",
    r"layers\.0\.q",
    r"^layers\.0\.q",
    "0.q",
    "a-b",
    r"a\-b\.layers",
    "k_proj",
    ".*q",
    "Q",
    "",
]
KEYS += [
    r"layers\.[0-9]+\.q",
    "q|k_proj",
    r".*layers.*0.*_proj",
    r"(?i:Q)",
    r"\w+",
    "^.*[^q]",
    "layers.0.q$",
    "q.",
    ".q",
]


def test_patterns_match_as_in_peft():
    for key in KEYS:
        found = matched_keys({key: 1, "layers.0.k_proj": 2}, NAMES, "rank_pattern")
        for name in NAMES:
            assert found.get(name, name) == get_pattern_key([key, "layers.0.k_proj"], name), (key, name)


FACTOR = "base_model.model.encoder.layer.1.attention.self.query.lora_{}.weight"
FACTORS = {  # what is done to an adapter's tensors, and the message
    "no_a": (
        lambda t: t.pop(FACTOR.format("A")),
        r"x/adapter_model.safetensors: encoder.layer.1.attention.self.query has a lora_B but no lora_A\.$",
    ),
    "no_b": (lambda t: t.pop(FACTOR.format("B")), "layer.1.attention.self.query has a lora_A but no lora_B"),
    "neither": (
        lambda t: [t.pop(FACTOR.format("A")), t.pop(FACTOR.format("B").replace("layer.1", "layer.0"))],
        "layer.0.attention.self.query has a lora_A but no lora_B; .*layer.1.attention.self.query has a lora_B but no",
    ),
    "ranks": (
        lambda t: t.update({FACTOR.format("B"): torch.ones(16, 2)}),
        r"query has factors of shapes \(3, 16\) and \(16, 2\), which have no product",
    ),
    "vector": (lambda t: t.update({FACTOR.format("A"): torch.ones(3)}), r"query has factors of shapes \(3,\) and"),
    "other_rank": (
        lambda t: t.update({FACTOR.format("A"): torch.ones(2, 16), FACTOR.format("B"): torch.ones(16, 2)}),
        "layer.1.attention.self.query has rank 2, but r says 3",
    ),
    "numbers": (
        lambda t: t.update({FACTOR.format("A"): torch.ones(3, 16, dtype=torch.int32)}),
        "query has factors in torch.int32 and torch.float32, which are not floats",
    ),
    "unknown": (
        lambda t: t.update({FACTOR.format("C"): torch.ones(2)}),
        "holds encoder.layer.1.attention.self.query.lora_C.weight, which is not plain LoRA",
    ),
    "magnitudes": (
        lambda t: t.update({FACTOR.format("magnitude_vector"): torch.ones(2)}),
        "holds DoRA magnitudes, which are not plain LoRA",
    ),
}


@pytest.mark.parametrize("case", FACTORS)
def test_factors(case, bench, tmp_path):
    change, message = FACTORS[case]
    shutil.copytree(bench / "lora", tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "x" / "adapter_model.safetensors")
    plan = make_plan(str(bench / "base"), {"x": str(tmp_path / "x")}, Recipe(), MismatchPolicy())
    with pytest.raises(ValueError, match=message):
        refuse(plan.problems)


def test_factors_of_a_checkpoint(bench, tmp_path):
    """A checkpoint's factors must agree with its LoraConfig, too."""
    path = lora_checkpoint(tmp_path, {"lora": LoraConfig(r=2)})
    plan = make_plan(str(bench / "base"), {"x": path}, Recipe(), MismatchPolicy())
    assert "x.ckpt: its LoraConfig does not agree with its factors: m has rank 1, but r says 2" in plan.problems[0]
    path = lora_checkpoint(tmp_path, {"lora": LoraConfig(r=1)}, "n.lora_B.default.weight")
    plan = make_plan(str(bench / "base"), {"x": path}, Recipe(), MismatchPolicy())
    assert "x.ckpt: n has a lora_B but no lora_A" in plan.problems[0]


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
    "density_of_base": (
        Recipe(overrides=[Override("*", "base", 0.5)]),
        MismatchPolicy(),
        "which the rule base does not take",
    ),
    "vector": (
        Recipe(overrides=[Override("*bias", "method")]),
        MismatchPolicy(),
        "DRM merges matrices: give it rule average",
    ),
    "split": (
        Recipe(overrides=[Override("*query.weight", split=3)]),
        MismatchPolicy(),
        "its 16 rows do not divide into 3 equal parts",
    ),
    "split_sum": (
        Recipe(overrides=[Override("*query.weight", split=[4, 4])]),
        MismatchPolicy(),
        "it has 16 rows, but the parts add up to 8",
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
        "The output cannot be an adapter: with DARETIES, dropping single entries leaves a matrix of full rank, which "
        "space='core' avoids."
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
        "nobody/nothing is no file or folder here, and the hub (cannot be asked: there is no|has no model of this)",
    ),
    "empty": (
        lambda path: make(path / "e"),
        r"/e is in no format that can be merged; expected a PEFT adapter folder \(",
    ),
    "ending": (lambda path: make(path / "e", x__gguf="x") + "/x.gguf", "/x.gguf is in no format that can be merged"),
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
        "holds LoRA layers, but its hyper-parameters hold no LoraConfig that gives their scaling; save it with",
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
    with pytest.raises(ValueError, match="is an adapter; expected the model that all tasks started from"):
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
        merge_checkpoints(bench / "base", paths, tmp_path / "out", coefficients={"z": 1.0})
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
        merge_checkpoints(bench / "base", paths, tmp_path / "out", TaskArithmetic(1.0), rank=1)
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
        merge_checkpoints(tmp_path / "base", {"x": str(tmp_path / "x")}, tmp_path / "out", DRM())
