"""A session without any Trainer: loops written by hand, several methods on one training, what is refused and when."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from lightning import Fabric
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from helpers.tiny import Vectors, VectorTask
from lightning_drm import DRM, TIES, Average, LiNeS, MergeSession, TaskArithmetic
from lightning_drm.fusion import Override, Recipe

TASKS = {"first": 2, "second": 3}


class Plain(nn.Module):
    """A network that knows nothing of Lightning."""

    head_names = ("head",)

    def __init__(self, num_classes: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))
        self.head = nn.Linear(5, num_classes)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def train(module: nn.Module, seed: int, num_classes: int) -> None:
    module.train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for x, y in Vectors(seed, num_classes).train_dataloader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()


def collect_all(session: MergeSession, **options: object) -> dict[str, Plain]:
    modules = {}
    for seed, (task, num_classes) in enumerate(TASKS.items()):
        torch.manual_seed(seed)
        modules[task] = Plain(num_classes, **options)
        session.note_base(modules[task])
        train(modules[task], seed, num_classes)
        session.collect(modules[task], task)
    return modules


def mean_of(modules: dict[str, Plain], name: str) -> Tensor:
    return torch.stack([module.state_dict()[name].double() for module in modules.values()]).mean(0)


def test_a_loop_written_by_hand_is_merged_by_any_method_without_training_again() -> None:
    session = MergeSession(list(TASKS), method=DRM(density=0.5))
    modules = collect_all(session)
    assert not session.missing
    drm = session.fuse()
    base = Plain().backbone[0].weight.double()
    deltas = [module.backbone[0].weight.double() - base for module in modules.values()]
    expected = base + DRM(density=0.5).merge(deltas)
    torch.testing.assert_close(drm.task_module("first").backbone[0].weight.double(), expected, rtol=0, atol=2e-5)

    averaged = session.fuse(method=Average())
    assert session.merged is averaged
    for name, tensor in averaged.task_module("second").backbone.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), mean_of(modules, f"backbone.{name}"), rtol=0, atol=1e-6)
    own = session.fuse(
        recipe=Recipe(TaskArithmetic(1.0), {"first": 0.5, "second": 0.0}, overrides=[Override("*", "method")])
    )
    torch.testing.assert_close(
        own.task_module("first").backbone[0].weight.double(), base + 0.5 * deltas[0], rtol=0, atol=1e-6
    )
    again = session.fuse()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), drm.parameters(), strict=True))


def test_nothing_of_a_module_is_kept_alive_but_frozen_weights() -> None:
    session = MergeSession(list(TASKS))
    modules = collect_all(session)
    last = weakref.ref(modules.pop("second"))
    weight = weakref.ref(modules.pop("first").backbone[0].weight)
    gc.collect()  # a module may refer to itself
    assert last() is None
    assert weight() is None
    assert session.fuse().task_module("second").head.out_features == 3


def test_adapters_are_collected_and_the_frozen_base_is_still_there_for_another_fuse() -> None:
    session = MergeSession(["a", "b"], method=TaskArithmetic(1.0))
    products = []
    for seed, task in enumerate(session.tasks):
        torch.manual_seed(seed)
        module = Plain()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "3"]), module.backbone)
        session.note_base(module)
        train(module, seed, 2)
        session.collect(module, task)
        products.append(module.backbone[0].get_delta_weight("default").detach().double())
    del module
    for method, factor in ((TaskArithmetic(1.0), 1.0), (Average(), 0.5)):
        merged = session.fuse(method).task_module("b").backbone
        assert merged.state_dict().keys() == Plain().backbone.state_dict().keys()
        expected = Plain().backbone[0].weight.double() + factor * sum(products)
        torch.testing.assert_close(merged[0].weight.double(), expected, rtol=0, atol=1e-6)


def test_fabric_modules_are_taken_as_they_are() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    session = MergeSession(["a"], method=TaskArithmetic(1.0))
    module = Plain()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    session.note_base(model)
    x, y = next(iter(Vectors(0).train_dataloader()))
    fabric.backward(nn.functional.cross_entropy(model(x), y))
    optimizer.step()
    session.collect(model, "a")
    merged = session.fuse().task_module("a")
    assert isinstance(merged, Plain)
    torch.testing.assert_close(merged.backbone[0].weight, module.backbone[0].weight, rtol=0, atol=1e-7)


def test_another_process_takes_up_what_the_folder_has(tmp_path: Path) -> None:
    whole = MergeSession(list(TASKS))
    modules = collect_all(whole)
    first = MergeSession(list(TASKS), dirpath=tmp_path)
    torch.manual_seed(0)
    first.note_base(module := Plain())
    train(module, 0, 2)
    first.collect(module, "first")

    second = MergeSession(list(TASKS), dirpath=tmp_path)
    assert second.restore() == ["first"]
    assert second.missing == ["second"]
    second.keep_module(Plain(), "first")
    torch.manual_seed(1)
    second.note_base(module := Plain(3))
    train(module, 1, 3)
    second.collect(module, "second")
    for ours, theirs in zip(second.fuse().parameters(), whole.fuse().parameters(), strict=True):
        assert torch.equal(ours, theirs)

    third = MergeSession(list(TASKS), dirpath=tmp_path)
    third.restore(list(TASKS))
    with pytest.raises(ValueError, match="All tasks were restored, so no module is known here: give fuse a module"):
        third.fuse()
    with pytest.raises(ValueError, match="base is no longer at hand"):
        third.fuse(module=modules["first"])  # it was trained
    merged = third.fuse(module=Plain())
    assert merged.task_module("second").head.weight.shape == (3, 5)
    rebuilt = third.finetuned(Plain(3), "second").task_module("second")
    torch.testing.assert_close(rebuilt.backbone[0].weight, modules["second"].backbone[0].weight, rtol=0, atol=1e-6)


def test_what_cannot_be_collected_is_refused() -> None:
    session = MergeSession(["a", "b"])
    with pytest.raises(RuntimeError, match=r"'a' cannot be collected: call note_base\(module\) before it is trained"):
        session.collect(Plain(), "a")
    session.note_base(Plain())
    with pytest.raises(ValueError, match="There is no task 'c'; tasks: a, b"):
        session.collect(Plain(), "c")
    with pytest.raises(ValueError, match=r"starts from another base than .*backbone\.0\.weight"):
        session.note_base(Plain(seed=1), "b")
    with pytest.raises(RuntimeError, match="Cannot merge: tasks a, b have not arrived"):
        session.fuse()
    with pytest.raises(RuntimeError, match="Nothing is merged yet: tasks a, b are missing"):
        _ = session.merged
    with pytest.raises(ValueError, match="no dirpath"):
        session.restore()
    session.collect(Plain(), "a")
    session.collect(Plain(), "b")
    with pytest.raises(ValueError, match="a method or a recipe"):
        session.fuse(TIES(), recipe=Recipe())
    with pytest.raises(RuntimeError, match=r"Nothing is merged yet: call fuse\(\) first"):
        _ = session.merged


def test_a_frozen_weight_that_changes_after_collecting_is_noticed() -> None:
    session = MergeSession(["a"])
    module = Plain()
    module.backbone[0].requires_grad_(False)
    session.note_base(module)
    train(module, 0, 2)
    session.collect(module, "a")
    module.backbone[0].weight.data.add_(1)
    with pytest.raises(ValueError, match=r"base is no longer at hand: backbone\.0\.weight differ"):
        session.fuse()
    assert session.fuse(module=Plain()).task_module("a") is not module


def test_a_lightning_module_is_one_of_many() -> None:
    session = MergeSession(["a"], method=TaskArithmetic(1.0))
    module = VectorTask()
    session.note_base(module)
    before = copy.deepcopy(module.state_dict())
    train(module, 0, 2)
    after = copy.deepcopy(module.state_dict())
    session.collect(module, "a")
    session.fuse()
    assert all(torch.equal(tensor, after[name]) for name, tensor in module.state_dict().items())
    assert not torch.equal(after["backbone.0.weight"], before["backbone.0.weight"])


def test_lines_scales_by_depth(tmp_path: Path):
    """The network's blocks with parameters are 0, 1 and 3. Their depths are known of its parameters' names."""
    session = MergeSession(TASKS, LiNeS(TaskArithmetic(1.0), beta=0.4), tmp_path)
    modules = collect_all(session)
    base, merged = Plain().state_dict(), session.fuse().task_module("first").state_dict()
    changed = 0
    for name, start in base.items():
        if name.startswith("backbone") and start.is_floating_point():
            block = int(name.split(".")[1])
            total = sum(module.state_dict()[name].double() - start.double() for module in modules.values())
            expected = start.double() + (0.5 + 0.4 * {0: 0.0, 1: 0.5, 3: 1.0}[block]) * total
            torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)
            changed += bool(total.abs().max() > 1e-3)
    assert changed >= 6
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "- LiNeS: alpha is 0.5, beta is 0.4." in card
    assert "- LiNeS: the depth goes from backbone.0 to backbone.3 (3 blocks).\n" in card


def test_lines_refuses_a_model_without_blocks_before_it_is_trained():
    class Flat(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(6, 5)

    with pytest.raises(ValueError, match=r"LiNeS scales a model's blocks by their depth, .* this model has none"):
        MergeSession(TASKS, LiNeS(DRM())).note_base(Flat())
