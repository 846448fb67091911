"""Mixtures of experts on disk: each expert is merged alone, in whatever layout the base and the finetunes are."""

import copy

import pytest
import torch
from helpers import experts, models
from safetensors.torch import load_file, save_file

from lightning_drm import DRM, TIES, Average, IsoC, MergeSession, TaskArithmetic, merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan
from lightning_drm.fusion import Recipe

TASKS = ["a", "b"]


def save(model, path, form):
    """Writes a finetune, and returns what to give to the merge."""
    if form in ("own", "fused"):
        model.save_pretrained(path, save_original_format=form == "own")
    elif form == "checkpoint":
        path = path.with_suffix(".ckpt")
        models.save_checkpoint(model, path)
    else:
        model.save_pretrained(path)
    return str(path)


def weights(folder, like):
    """By name, the live model's weights from a merged folder."""
    return dict(type(like).from_pretrained(folder, dtype=torch.float64).named_parameters())


def check(folder, base, tuned, *, apart, tolerance=1e-12, noise=0.0):
    """Every expert in the folder is DRM of the tasks' deltas of that expert.

    Where the base's files hold gate and up apart, these are matrices of their own.
    """
    start, merged = dict(base.named_parameters()), weights(folder, base)
    deltas = [experts.deltas_of(model, base) for model in tuned]
    stacks = [name for name in start if experts.is_experts(name)]
    assert len(stacks) == 4
    for name in stacks:
        for index in range(experts.NUM_EXPERTS):
            found = (merged[name] - start[name])[index].detach()
            matrices = [delta[name][index] for delta in deltas]
            parts = 2 if apart and "gate_up" in name else 1
            for number in range(parts):
                rows = slice(number * len(found) // parts, (number + 1) * len(found) // parts)
                experts.assert_merged(found[rows], [matrix[rows] for matrix in matrices], tolerance, noise)
    return merged


@pytest.mark.parametrize("form", ["own", "fused", "checkpoint"])
@pytest.mark.parametrize("layout", ["own", "fused"])
@pytest.mark.parametrize("name", experts.MODELS)
def test_each_expert_is_merged_alone(name, layout, form, small_pieces, tmp_path):
    base = experts.base_model(name)
    save(base, tmp_path / "base", layout)
    tuned = [experts.train(copy.deepcopy(base), seed) for seed in (1, 2)]
    paths = {task: save(model, tmp_path / task, form) for task, model in zip(TASKS, tuned, strict=True)}
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", experts.METHOD)
    merged = check(tmp_path / "out", base, tuned, apart=layout == "own" and name in experts.BY_EXPERT)
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tmp_path / "base/model.safetensors").keys()
    )
    start, deltas = dict(base.named_parameters()), [experts.deltas_of(model, base) for model in tuned]
    averaged = ["lm_head.weight", "model.embed_tokens.weight"]
    averaged += [key for key in start if key.endswith("_bias")]  # the biases of all experts of a layer
    for key in averaged:
        torch.testing.assert_close(merged[key], start[key] + (deltas[0][key] + deltas[1][key]) / 2, rtol=0, atol=1e-12)
    assert all(share > 0.3 for share in result.survived.values())


@pytest.mark.parametrize("form", ["adapter", "checkpoint"])
@pytest.mark.parametrize("targets", [experts.TARGETS, experts.TARGETS[1:], ["gate_up_proj", "down_proj"]])
@pytest.mark.parametrize("layout", ["own", "fused"])
@pytest.mark.parametrize("name", experts.MODELS)
def test_lora_on_experts(name, layout, targets, form, tmp_path):
    base = experts.base_model(name)
    save(base, tmp_path / "base", layout)
    settings = {
        "target_parameters": targets, "use_rslora": True,
        "rank_pattern": {".*experts.down_proj": 3}, "alpha_pattern": {"down_proj": 5},
    }  # fmt: skip
    tuned = [experts.train(experts.with_lora(base, **settings), seed) for seed in (1, 2)]
    paths = {}
    for task, model in zip(TASKS, tuned, strict=True):
        paths[task] = str(tmp_path / task)
        if form == "adapter":
            model.save_pretrained(tmp_path / task)
        else:
            paths[task] += ".ckpt"
            wrapper = models.Wrapper(model.base_model.model)
            torch.save(
                {"state_dict": wrapper.state_dict(), "hyper_parameters": {"lora": model.peft_config["default"]}},
                paths[task],
            )
    result = merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", TaskArithmetic(1.0), {"b": 0.5})
    assert result.output_format == "full"
    start, merged = dict(base.named_parameters()), weights(tmp_path / "out", base)
    deltas = [experts.deltas_of(model, base) for model in tuned]
    assert sum(bool(deltas[0][key].any()) for key in start if experts.is_experts(key)) == 2 * len(targets)
    for key, value in start.items():
        expected = value + deltas[0][key] + 0.5 * deltas[1][key]
        torch.testing.assert_close(merged[key], expected, rtol=1e-6, atol=1e-6)  # factors are read in float32


@pytest.mark.parametrize("method", [experts.METHOD, IsoC(), TIES(0.4, scope="tensor"), Average()])
def test_lora_gives_what_dense_deltas_give(method, tmp_path):
    base = experts.base_model("qwen3_moe")
    save(base, tmp_path / "base", "fused")
    lora, dense = {}, {}
    for seed, task in enumerate(TASKS, 1):
        model = experts.train(experts.with_lora(base), seed)
        lora[task] = save(model, tmp_path / task, "adapter")
        dense[task] = save(model.merge_and_unload(), tmp_path / f"{task}-dense", "fused")
    found, expected = (
        load_file(merge_checkpoints(tmp_path / "base", paths, tmp_path / out, method).folder / "model.safetensors")
        for out, paths in (("out", lora), ("out-dense", dense))
    )
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["own", "fused"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_folder_with_a_base_of_either_layout(layout, lora, tmp_path):
    base = experts.base_model("mixtral")
    save(base, tmp_path / "base", layout)
    session = MergeSession(TASKS, experts.METHOD, tmp_path / "run", head=[])
    tuned = []
    for seed, task in enumerate(TASKS, 1):
        module = experts.with_lora(base) if lora else copy.deepcopy(base)
        session.note_base(module)
        tuned.append(experts.train(module, seed))
        session.collect(module, task)
    paths = dict.fromkeys(TASKS, tmp_path / "run")
    merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", experts.METHOD)
    noise = 1e-7 if lora else 0.0
    check(tmp_path / "out", base, tuned, apart=layout == "own", tolerance=1e-5 if lora else 1e-12, noise=noise)


def test_a_run_folder_of_another_base_is_refused(tmp_path):
    base = experts.base_model("mixtral")
    session = MergeSession(["a"], experts.METHOD, tmp_path / "run", head=[])
    module = copy.deepcopy(base)
    session.note_base(module)
    session.collect(experts.train(module, 1), "a")
    with torch.no_grad():
        base.model.layers[1].mlp.experts.down_proj[2, 0, 0] += 1
    save(base, tmp_path / "base", "own")
    with pytest.raises(
        ValueError, match=r"a: its stored delta of .*layers.1.*experts\.\d\.w2.* was taken from another"
    ):
        merge_checkpoints(tmp_path / "base", {"a": tmp_path / "run"}, tmp_path / "out", experts.METHOD)


def test_a_checkpoint_whose_experts_started_elsewhere_is_refused(tmp_path):
    base = experts.base_model("mixtral")
    model = experts.train(experts.with_lora(base), 1)
    wrapper, lora = models.Wrapper(model.base_model.model), model.peft_config["default"]
    torch.save({"state_dict": wrapper.state_dict(), "hyper_parameters": {"lora": lora}}, tmp_path / "a.ckpt")
    with torch.no_grad():
        base.model.layers[1].mlp.experts.down_proj[2, 0, 0] += 1
    save(base, tmp_path / "base", "own")
    with pytest.raises(ValueError, match=r"a: its adapter was trained on another value of .*experts\.2\.w2"):
        merge_checkpoints(tmp_path / "base", {"a": tmp_path / "a.ckpt"}, tmp_path / "out", experts.METHOD)
