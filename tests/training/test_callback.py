"""The callback in real fits: what it collects, what it leaves alone, what it refuses."""

from pathlib import Path

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, Strategy
from peft import LoraConfig, inject_adapter_in_model
from torch.multiprocessing.spawn import ProcessRaisedException

from helpers import reference, ties
from helpers.tiny import Vectors, VectorTask, quiet_trainer
from lightning_drm import DRM, TIES, Average, DRMMergeCallback, MultiTaskModule, TaskArithmetic
from lightning_drm.fusion import Override
from lightning_drm.training.strategies import refuse_strategy

TASKS = ("first", "second", "third")


def fit_all(merge: DRMMergeCallback, classes: tuple[int, ...] = (2, 3, 2), **trainer: object) -> dict[str, VectorTask]:
    modules = {}
    for index, (name, num_classes) in enumerate(zip(merge.tasks, classes, strict=False)):
        seed_everything(index, verbose=False)
        modules[name] = VectorTask(num_classes)
        quiet_trainer(callbacks=[merge.for_task(name)], **trainer).fit(modules[name], Vectors(index, num_classes))
    return modules


def base_and_deltas(modules: dict[str, VectorTask]) -> tuple[dict, list[dict]]:
    base = {n: t.double() for n, t in VectorTask().backbone.state_dict().items()}
    return base, [{n: t.double() - base[n] for n, t in m.backbone.state_dict().items()} for m in modules.values()]


def test_average_is_the_mean_of_the_finetuned_weights():
    merge = DRMMergeCallback(TASKS, method=Average())
    modules = fit_all(merge)
    for name, merged in merge.merged_module.task_module("first").backbone.state_dict().items():
        mean = torch.stack([m.backbone.state_dict()[name].double() for m in modules.values()]).mean(0)
        torch.testing.assert_close(merged.double(), mean, rtol=0, atol=1e-6)


def test_drm_merges_matrices_and_averages_the_rest():
    method = DRM(density=0.5, scale=0.7)
    merge = DRMMergeCallback(TASKS, method=method, coefficients={"second": 0.5})
    base, deltas = base_and_deltas(fit_all(merge))
    coefficients = [1.0, 0.5, 1.0]
    merged = merge.merged_module.task_module("second").backbone.state_dict()
    for name, tensor in merged.items():
        if tensor.ndim == 2:
            inputs = [d[name] for d in deltas]
            expected = method.merge(inputs, coefficients)
            expected = ties.settled((tensor - base[name]).float(), expected, method, inputs, noise=1e-6)
        else:
            expected = 0.7 * sum(c * d[name] for c, d in zip(coefficients, deltas, strict=True)) / 3
        torch.testing.assert_close(tensor.double(), base[name] + expected, rtol=0, atol=2e-5)


def test_heads_stay_each_tasks_own_and_the_fitted_modules_stay_as_they_were():
    merge = DRMMergeCallback(TASKS)
    modules = fit_all(merge)
    for name, module in modules.items():
        merged = merge.merged_module.task_module(name)
        assert torch.equal(merged.head.weight, module.head.weight)
        assert not torch.equal(merged.backbone[0].weight, module.backbone[0].weight)
    pointers = {merge.merged_module.task_module(name).backbone[0].weight.data_ptr() for name in TASKS}
    assert len(pointers) == 1


def test_trainer_test_measures_the_merged_model():
    merge = DRMMergeCallback(TASKS)
    fit_all(merge)
    loaders = [Vectors(index, c).test_dataloader() for index, c in enumerate((2, 3, 2))]
    results = quiet_trainer().test(merge.merged_module, loaders, verbose=False)
    for name, loader, result in zip(TASKS, loaders, results, strict=True):
        module = merge.merged_module.task_module(name)
        hits = sum(int((module(x).argmax(1) == y).sum()) for x, y in loader)
        assert result == {f"accuracy/{name}": pytest.approx(hits / 32), f"score/{name}": pytest.approx(hits / 32)}


@pytest.mark.parametrize("store", ["auto", "device", "cpu", "disk"])
def test_every_store_gives_the_same_merge(store: str, tmp_path: Path):
    reference = DRMMergeCallback(TASKS)
    fit_all(reference)
    merge = DRMMergeCallback(TASKS, store=store, dirpath=tmp_path / "run")
    fit_all(merge)
    for ours, theirs in zip(merge.merged_module.parameters(), reference.merged_module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (tmp_path / "run/tasks/first/deltas.safetensors").is_file()
    assert (tmp_path / "run/tasks/first/head.safetensors").is_file()
    assert (tmp_path / "run/merged/heads/third.safetensors").is_file()


def test_order_of_fits_does_not_matter():
    merged = []
    for order in (TASKS, TASKS[::-1]):
        merge = DRMMergeCallback(TASKS, method=TIES())
        for name in order:
            index = TASKS.index(name)
            seed_everything(index, verbose=False)
            module = VectorTask()
            module.task_name = name
            quiet_trainer(callbacks=[merge]).fit(module, Vectors(index))
        merged.append(merge.merged_module.task_module("first").backbone.state_dict())
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_lora_deltas_are_the_adapters_products():
    merge = DRMMergeCallback(["a", "b"], method=TaskArithmetic(1.0))
    expected = {}
    for index, task in enumerate(merge.tasks):
        seed_everything(index, verbose=False)
        module = VectorTask()
        adapters = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "3"], use_rslora=True)
        inject_adapter_in_model(adapters, module.backbone)
        quiet_trainer(callbacks=[merge.for_task(task)]).fit(module, Vectors(index))
        for layer in ("0", "3"):
            delta = module.backbone.get_submodule(layer).get_delta_weight("default").detach().double()
            expected[layer] = expected.get(layer, 0) + delta
    merged = merge.merged_module.task_module("a").backbone.state_dict()
    assert merged.keys() == VectorTask().backbone.state_dict().keys()
    for layer, delta in expected.items():
        base = VectorTask().backbone.get_submodule(layer).weight.double()
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(merged[f"{layer}.weight"].double(), base + delta, rtol=0, atol=1e-6)


def test_lora_fits_are_merged_in_core_space():
    """With one threshold per task for the cores of all layers."""
    merge = DRMMergeCallback(["a", "b"], method=TIES(0.4, space="core"))
    layers = ("0", "3")
    deltas = {layer: [] for layer in layers}
    for index, task in enumerate(merge.tasks):
        seed_everything(index, verbose=False)
        module = VectorTask()
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=[*layers]), module.backbone)
        quiet_trainer(callbacks=[merge.for_task(task)]).fit(module, Vectors(index))
        for layer in layers:
            adapter = module.backbone.get_submodule(layer)
            up, down = adapter.lora_B["default"].weight, adapter.lora_A["default"].weight
            deltas[layer].append(3.0 * up.detach().double() @ down.detach().double())
    merged = merge.merged_module.task_module("a").backbone.state_dict()

    spaces = {layer: reference.cores(deltas[layer]) for layer in layers}
    sizes = [cores[0].numel() for _, cores, _ in spaces.values()]
    whole = [torch.cat([cores[task].flatten() for _, cores, _ in spaces.values()]) for task in range(2)]
    trimmed = [reference.trim(values, 0.4, 1e-10).split(sizes) for values in whole]
    for place, (layer, (U, cores, Vh)) in enumerate(spaces.items()):
        stack = torch.stack([task[place].view(cores[0].shape) for task in trimmed])
        delta = U @ reference.elect_and_average(stack, [1.0, 1.0]) @ Vh
        assert delta.abs().max() > 1e-3
        base = VectorTask().backbone.get_submodule(layer).weight.double()
        torch.testing.assert_close(merged[f"{layer}.weight"].double(), base + delta, rtol=0, atol=1e-6)


def test_checkpoints_hold_the_tasks_own_weights(tmp_path: Path):
    merge = DRMMergeCallback(["only"], method=TaskArithmetic(3.0))
    module = VectorTask()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    quiet_trainer(callbacks=[merge, checkpoint], enable_checkpointing=True).fit(module, Vectors(0))
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(stored[name], tensor) for name, tensor in module.state_dict().items())
    assert not torch.equal(merge.merged_module.task_module("only").backbone[0].weight, module.backbone[0].weight)


def test_a_resumed_fit_counts_from_the_base(tmp_path: Path):
    def fit(epochs: int, merge: DRMMergeCallback, resume: Path | None = None) -> VectorTask:
        seed_everything(0, verbose=False)
        module = VectorTask()
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[merge])
        trainer.fit(module, Vectors(0), ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    fit(1, DRMMergeCallback(["only"]))
    merge = DRMMergeCallback(["only"])
    module = fit(2, merge, tmp_path / "1.ckpt")
    delta = merge.task_vectors["only"].deltas["backbone.0.weight"]
    torch.testing.assert_close(delta, module.backbone[0].weight - VectorTask().backbone[0].weight, rtol=0, atol=0)


def test_another_base_is_refused_with_task_and_parameter():
    merge = DRMMergeCallback(["first", "second"])
    quiet_trainer(callbacks=[merge.for_task("first")]).fit(VectorTask(), Vectors(0))
    with pytest.raises(ValueError, match=r"'second' starts from another base than task 'first'.*backbone\.0\.weight"):
        quiet_trainer(callbacks=[merge]).fit(VectorTask(seed=1), Vectors(1))
    assert merge.missing == ["second"]


def test_a_fit_that_fails_leaves_its_task_to_be_done_again():
    class Fails(Callback):
        def on_train_epoch_end(self, *_: object) -> None:
            raise RuntimeError("power cut")

    merge = DRMMergeCallback(["first", "second"])
    with pytest.raises(RuntimeError, match="power cut"):
        quiet_trainer(callbacks=[merge.for_task("first"), Fails()]).fit(VectorTask(), Vectors(0))
    assert merge.missing == ["first", "second"]
    quiet_trainer(callbacks=[merge.for_task("first")]).fit(VectorTask(), Vectors(0))
    assert merge.missing == ["second"]


def test_diverged_training_is_refused_with_task_and_parameter():
    merge = DRMMergeCallback(["first"])
    with pytest.raises(ValueError, match=r"'first' cannot be collected: the delta of backbone\.0\.weight has NaN"):
        quiet_trainer(callbacks=[merge]).fit(VectorTask(lr=1e30), Vectors(0))


def test_restore_takes_up_where_another_process_stopped(tmp_path: Path):
    whole = DRMMergeCallback(TASKS, dirpath=tmp_path / "run")
    fit_all(whole)
    again = DRMMergeCallback(TASKS, dirpath=tmp_path / "run")
    again.restore()
    again.fuse(VectorTask())
    for ours, theirs in zip(
        again.merged_module.task_module("third").backbone.parameters(),
        whole.merged_module.task_module("third").backbone.parameters(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_its_attributes_are_those_that_it_was_given(tmp_path: Path):
    merge = DRMMergeCallback(["a"], TIES(0.3), tmp_path, coefficients={"a": 0.5}, store="cpu", head=["head"])
    assert (merge.tasks, merge.store, merge.head) == (["a"], "cpu", ["head"])
    assert (merge.recipe.method, merge.recipe.coefficients) == (TIES(0.3), {"a": 0.5})
    assert merge.run_folder.path == tmp_path
    assert merge.join(1).size == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "tasks must be different names"),
        ({"tasks": ["a", "a"]}, "tasks must be different names"),
        ({"tasks": ["../a"]}, "names that can be folder names"),
        ({"tasks": ["a"], "store": "disk"}, "needs a dirpath"),
        ({"tasks": ["a"], "store": "tape"}, "store must be auto, device, cpu or disk, got 'tape'"),
        ({"tasks": ["a"], "coefficients": {"b": 1.0}}, "unknown tasks b; tasks: a"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DRMMergeCallback(**arguments)


@pytest.mark.processes
def test_spawned_processes_are_refused_by_name():
    merge = DRMMergeCallback(["a"])
    with pytest.raises(ProcessRaisedException, match=r"DDPStrategy starts its processes by spawn.*use strategy 'ddp'"):
        quiet_trainer(strategy="ddp_spawn", devices=2, callbacks=[merge]).fit(VectorTask(), Vectors(0))


class PartitionedStrategy(DeepSpeedStrategy):
    """DeepSpeed's strategy, which is a kind of DDPStrategy, without DeepSpeed."""

    def __init__(self) -> None:
        DDPStrategy.__init__(self)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (PartitionedStrategy(), "PartitionedStrategy is not supported"),
        (FSDPStrategy(cpu_offload=True), "FSDPStrategy has cpu_offload, .* leave it out"),
        (FSDPStrategy(use_orig_params=False), "FSDPStrategy has use_orig_params=False, .* leave it at .* True"),
    ],
)
def test_strategies_without_whole_weights_are_refused_by_name(strategy: Strategy, message: str):
    with pytest.raises(ValueError, match=message):
        refuse_strategy(strategy)


def test_a_recipe_that_fits_no_matrix_is_refused_before_training():
    started = []

    class Notes(Callback):
        def on_train_start(self, *_: object) -> None:
            started.append(True)

    merge = DRMMergeCallback(["a"], overrides=[Override("backbone.0.bias", rule="method")])
    with pytest.raises(ValueError, match=r"backbone\.0\.bias has shape \(8,\), but DRM merges matrices"):
        quiet_trainer(callbacks=[merge, Notes()]).fit(VectorTask(), Vectors(0))
    assert not started


def test_a_module_without_a_head_is_refused_until_told():
    class Headless(VectorTask):
        head_names = None

    with pytest.raises(ValueError, match="Headless does not say which parameters are its head"):
        quiet_trainer(callbacks=[DRMMergeCallback(["a"])]).fit(Headless(), Vectors(0))
    merge = DRMMergeCallback(["a"], head=["head"])
    quiet_trainer(callbacks=[merge]).fit(Headless(), Vectors(0))
    assert set(merge.task_vectors["a"].head) == {"head.weight", "head.bias"}


def test_unknown_names_are_refused():
    merge = DRMMergeCallback(["a"])
    with pytest.raises(RuntimeError, match="tasks a are missing"):
        _ = merge.merged_module
    stranger = VectorTask()
    stranger.task_name = "z"
    with pytest.raises(ValueError, match="'z', which is not one of the tasks a"):
        quiet_trainer(callbacks=[merge]).fit(stranger, Vectors(0))
    with pytest.raises(ValueError, match="There is no task 'z'; tasks: a"):
        merge.for_task("z")


def test_a_fit_that_names_no_task_is_refused_while_several_are_missing():
    merge = DRMMergeCallback(["digit", "odd"])
    with pytest.raises(ValueError, match=r"Which of the tasks digit, odd .*for_task\('NAME'\)"):
        quiet_trainer(callbacks=[merge]).fit(VectorTask(), Vectors(0))
    quiet_trainer(callbacks=[merge.for_task("digit")]).fit(VectorTask(), Vectors(0))
    quiet_trainer(callbacks=[merge]).fit(VectorTask(), Vectors(1))  # only one is left
    assert merge.is_merged
    with pytest.raises(ValueError, match="all of them have arrived"):
        quiet_trainer(callbacks=[merge]).fit(VectorTask(), Vectors(1))


def test_a_fit_that_is_done_twice_replaces_its_own_task():
    """As where a notebook's cell is run again."""
    merge = DRMMergeCallback(["digit", "odd"], method=TaskArithmetic(1.0))
    for seed in (3, 4):
        seed_everything(seed, verbose=False)
        module = VectorTask()
        quiet_trainer(callbacks=[merge.for_task("digit")]).fit(module, Vectors(seed))
    assert merge.missing == ["odd"]
    step = module.backbone[0].weight - VectorTask().backbone[0].weight
    assert torch.equal(merge.task_vectors["digit"].deltas["backbone.0.weight"], step.detach())
    module = VectorTask()
    module.task_name = "digit"
    with pytest.raises(ValueError, match="announced as task 'odd', but the module's task_name is 'digit'"):
        quiet_trainer(callbacks=[merge.for_task("odd")]).fit(module, Vectors(0))


def test_a_second_process_knows_what_the_folder_has(tmp_path: Path):
    """Each of two callbacks stands for a process of its own, as where a user's own command trains one task."""
    whole = DRMMergeCallback(["digit", "odd"])
    modules = fit_all(whole, classes=(2, 3))
    fit_all(DRMMergeCallback(["digit", "odd"], dirpath=tmp_path), classes=(2,))
    before = (tmp_path / "tasks/digit/head.safetensors").read_bytes()
    second = DRMMergeCallback(["digit", "odd"], dirpath=tmp_path)
    seed_everything(1, verbose=False)
    with pytest.warns(UserWarning, match=r"modules of digit were not seen here.*copies of odd's stand in"):
        quiet_trainer(callbacks=[second]).fit(VectorTask(3), Vectors(1, 3))
    assert (tmp_path / "tasks/digit/head.safetensors").read_bytes() == before
    for name, module in modules.items():
        assert torch.equal(second.task_vectors[name].head["head.weight"], module.head.weight)
        ours, theirs = second.merged_module.task_module(name), whole.merged_module.task_module(name)
        assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())
    with pytest.raises(ValueError, match=rf"task 'digit' \(stored in {tmp_path}\)"):
        quiet_trainer(callbacks=[DRMMergeCallback(["digit", "odd"], dirpath=tmp_path).for_task("odd")]).fit(
            VectorTask(seed=1), Vectors(1)
        )


def test_individual_models_are_rebuilt_exactly(tmp_path: Path):
    merge = DRMMergeCallback(TASKS, dirpath=tmp_path)
    modules = fit_all(merge)
    for name, module in modules.items():
        rebuilt = merge.finetuned_module(VectorTask(), name)
        assert isinstance(rebuilt, MultiTaskModule)
        x = torch.randn(4, 6)
        torch.testing.assert_close(rebuilt.task_module(name)(x), module(x), rtol=0, atol=1e-6)
