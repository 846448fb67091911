"""Mixtures of experts on disk: each expert is merged alone, in whatever layout the base and the finetunes are."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.merge_on_ranks import merge_all
from helpers import experts, models
from helpers.ranks import end_codes, start_ranks
from lightning_drm import DRM, TIES, Average, IsoC, MergeSession, TaskArithmetic, merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan, plan_costs, table
from lightning_drm.cli.main import main
from lightning_drm.fusion import Override, Recipe

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


@pytest.mark.slow
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


REFUSED = {  # what becomes of the adapter's configuration, and the message
    "rank": ({"r": 6}, r"a: .*down_proj\S* has shape \(1, .*the base's (experts make|has) \(3, "),
    "odd rank": ({"r": 5}, r"a: .*down_proj has factors of shapes .* which are none of experts with rank 5"),
    "unknown": (
        {"target_parameters": [*experts.TARGETS, "mlp.experts.other"]},
        "a: .*target_parameters names mlp.experts.other, but no experts of the base have that name",
    ),
    "one of two": ({"target_parameters": experts.TARGETS[:1]}, "target_parameters names 1 parameters .* for 2"),
    "no list": ({"target_parameters": "mlp.experts.down_proj"}, "target_parameters must be a list of names, got 'mlp"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("layout", ["own", "fused"])
def test_refused_adapters(case, layout, tmp_path):
    change, message = REFUSED[case]
    base = experts.base_model("mixtral")
    save(base, tmp_path / "base", layout)
    settings = {"r": 3, "lora_alpha": 3} if case == "odd rank" else {"r": 2}
    save(experts.train(experts.with_lora(base, target_modules=[], **settings), 1), tmp_path / "a", "adapter")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", experts.METHOD)


def test_nested_factors_need_the_class_of_the_base(tmp_path):
    """Without it, nothing says in which order peft wrapped the parameters."""
    base = experts.base_model("mixtral")
    save_file({name: value.detach() for name, value in base.named_parameters()}, tmp_path / "base.safetensors")
    save(experts.train(experts.with_lora(base), 1), tmp_path / "a", "adapter")
    with pytest.raises(ValueError, match=r"which factors of .*experts are for which .* give a base with a config.json"):
        merge_checkpoints(tmp_path / "base.safetensors", {"a": tmp_path / "a"}, tmp_path / "out", experts.METHOD)
    one = experts.train(experts.with_lora(base, target_parameters=experts.TARGETS[1:]), 1)
    save(one, tmp_path / "one", "adapter")
    merge_checkpoints(tmp_path / "base.safetensors", {"a": tmp_path / "one"}, tmp_path / "out", TaskArithmetic(1.0))
    merged, deltas = load_file(tmp_path / "out" / "model.safetensors"), experts.deltas_of(one, base)
    for key, value in base.named_parameters():
        torch.testing.assert_close(merged[key], value + deltas[key], rtol=1e-6, atol=1e-6)


def test_square_experts_need_the_class_of_the_base(tmp_path):
    base = experts.base_model("gpt_oss")
    save_file({name: value.detach() for name, value in base.named_parameters()}, tmp_path / "base.safetensors")
    model = experts.train(experts.with_lora(base, target_parameters=experts.TARGETS[1:]), 1)
    save(model, tmp_path / "a", "adapter")
    with pytest.raises(ValueError, match=r"a: .*down_proj has square experts, .* give a base with a config.json"):
        merge_checkpoints(tmp_path / "base.safetensors", {"a": tmp_path / "a"}, tmp_path / "out", experts.METHOD)


def test_a_base_without_a_configuration(tmp_path):
    """Names and shapes tell experts and output embeddings."""
    base = experts.base_model("qwen3_moe")
    tuned = [experts.train(copy.deepcopy(base), seed) for seed in (1, 2)]
    for task, model in zip(["base", *TASKS], [base, *tuned], strict=True):
        state = {name: value.detach() for name, value in model.named_parameters()}
        save_file(state, tmp_path / f"{task}.safetensors")
    paths = {task: tmp_path / f"{task}.safetensors" for task in TASKS}
    merge_checkpoints(tmp_path / "base.safetensors", paths, tmp_path / "out", experts.METHOD)
    base.config.save_pretrained(tmp_path / "out")
    check(tmp_path / "out", base, tuned, apart=False)
    merged = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    expected = sum(model.lm_head.weight for model in tuned) / 2
    torch.testing.assert_close(merged, expected.detach(), rtol=0, atol=1e-12)


def test_missing_experts_are_named(tmp_path):
    base = experts.base_model("mixtral")
    save(base, tmp_path / "base", "fused")
    save(experts.train(copy.deepcopy(base), 1), tmp_path / "a", "own")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match=r"a: lacks 1 of the 6 tensors that make up .*layers.1.*gate_up_proj: .*2\.w3"):
        merge_checkpoints(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", experts.METHOD)


@pytest.mark.parametrize("layout", ["own", "fused"])
def test_gate_and_up_apart_are_what_a_split_gives(layout, tmp_path):
    """So the layout of the files need not decide what is merged."""
    base = experts.base_model("mixtral")
    save(base, tmp_path / "base", layout)
    tuned = [experts.train(copy.deepcopy(base), seed) for seed in (1, 2)]
    paths = {task: save(model, tmp_path / task, layout) for task, model in zip(TASKS, tuned, strict=True)}
    overrides = [Override("*gate_up_proj", split=2)] if layout == "fused" else []
    merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", experts.METHOD, overrides=overrides)
    check(tmp_path / "out", base, tuned, apart=True)


def test_output_embeddings_are_merged_by_the_method_where_that_is_asked_for(tmp_path):
    base = experts.base_model("mixtral")
    save(base, tmp_path / "base", "own")
    tuned = [experts.train(copy.deepcopy(base), seed) for seed in (1, 2)]
    paths = {task: save(model, tmp_path / task, "own") for task, model in zip(TASKS, tuned, strict=True)}
    overrides = [Override("lm_head.weight", rule="method")]
    merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", experts.METHOD, overrides=overrides)
    found = (weights(tmp_path / "out", base)["lm_head.weight"] - base.lm_head.weight).detach()
    experts.assert_merged(found, [experts.deltas_of(model, base)["lm_head.weight"] for model in tuned], 1e-12)


def test_the_plan_and_the_card_say_what_they_are(tmp_path, capsys, monkeypatch):
    base = experts.base_model("qwen3_moe")
    save(base, tmp_path / "base", "fused")
    tuned = [experts.train(copy.deepcopy(base), seed) for seed in (1, 2)]
    paths = {task: save(model, tmp_path / task, "fused") for task, model in zip(TASKS, tuned, strict=True)}
    plan = make_plan(str(tmp_path / "base"), paths, Recipe(DRM()), MismatchPolicy())
    costs = plan_costs(plan)
    rows = {(row.rule, row.what): row for row in table(plan, costs)}
    assert rows.keys() == {
        ("method", "matrices"),
        ("method", "3 experts of (24, 16)"),
        ("method", "3 experts of (16, 12)"),
        ("average", "output embeddings"),
        ("average", "embeddings"),
        ("average", "biases, norms and others"),
    }
    stacks = rows["method", "3 experts of (24, 16)"]
    assert stacks.names == tuple(f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1))
    assert stacks.num_values == 2 * 3 * 24 * 16
    assert stacks.cost == pytest.approx(6 * DRM().cost((24, 16), 2))
    assert rows["average", "output embeddings"].names == ("lm_head.weight",)
    options = [
        "merge",
        "--base",
        str(tmp_path / "base"),
        "--models",
        json.dumps(paths),
        "--output",
        str(tmp_path / "out"),
    ]
    for side in ("COLUMNS", "LINES"):  # of the terminal; one alone would not count where it is a dumb one
        monkeypatch.setenv(side, "200")
    main([*options, "--dry_run"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("│ 3 experts of (24, 16) ", "│ output embeddings ", "┃ work "))
    merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", DRM())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- 3 experts of (24, 16), in 2 parameters: method, one expert after another" in card
    assert "- output embeddings, in 1 parameter: average" in card


@pytest.mark.processes
@pytest.mark.parametrize("form", ["fused", "adapter"])
@pytest.mark.parametrize("layout", ["own", "fused"])
def test_the_number_of_processes_changes_no_bit(layout, form, one_thread, tmp_path):
    base = experts.base_model("mixtral")
    save(base, tmp_path / "base", layout)
    paths = {}
    for seed, task in enumerate(TASKS, 1):
        module = experts.with_lora(base) if form == "adapter" else copy.deepcopy(base)
        paths[task] = save(experts.train(module, seed), tmp_path / task, form)
    merge = {"base": tmp_path / "base", "models": paths, "method": experts.METHOD}
    merge_checkpoints(**merge, output=tmp_path / "alone")
    assert end_codes(start_ranks(merge_all, 2, tmp_path, [{**merge, "output": tmp_path / "out"}]), 120) == [0, 0]
    alone, together = (load_file(tmp_path / folder / "model.safetensors") for folder in ("alone", "out"))
    assert alone.keys() == together.keys()
    assert all(torch.equal(value, together[key]) for key, value in alone.items())
