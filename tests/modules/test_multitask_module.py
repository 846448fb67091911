"""The merged model: one backbone in memory, every task's own head, the right one for each batch."""

from collections.abc import Callable

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertForSequenceClassification

from lightning_drm.deltas import Base, backbone_parameters, head_state
from lightning_drm.kinds import IGNORE_INDEX
from lightning_drm.modules import MultiTaskModule, TransformerTask, classify, head_names_of

Folder = Callable[[str], str]


class SmallTask(L.LightningModule):
    """A plain task: batches are pairs, the output are the logits."""

    head_names = ("head", "scale")

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.shared = nn.Linear(5, 5, bias=False)
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.shared.weight
        self.head = nn.Linear(5, num_classes)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.tied(self.shared(self.body(x))))


CLASSES = {"two": 2, "a.b": 7, "values": 3}  # names that a ModuleDict would refuse


def each(task: nn.Module) -> dict[str, nn.Module]:
    """One module for tasks whose heads have several sizes."""
    return dict.fromkeys(CLASSES, task)


def make_heads(task: nn.Module) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(2)
    return {
        name: {
            "head.weight": torch.randn(classes, 5),
            "head.bias": torch.randn(classes),
            "scale": torch.rand(1) + 1,
        }
        for name, classes in CLASSES.items()
    }


def make_backbone(task: nn.Module, head: tuple[str, ...]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: torch.rand_like(p.tensor) + 0.1 for name, p in backbone_parameters(task, head).items()}


@pytest.fixture
def task() -> SmallTask:
    torch.manual_seed(0)
    return SmallTask()


def independent_logits(backbone: dict[str, Tensor], head: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network written out in float64, from tensors alone."""
    b = {name: tensor.double() for name, tensor in (backbone | head).items()}
    hidden = x.double() @ b["body.0.weight"].T + b["body.0.bias"]
    hidden = (hidden - b["body.1.running_mean"]) / (b["body.1.running_var"] + 1e-5).sqrt()
    hidden = (hidden * b["body.1.weight"] + b["body.1.bias"]).tanh()
    hidden = hidden @ b["shared.weight"].T @ b["shared.weight"].T
    return b["scale"] * (hidden @ b["head.weight"].T + b["head.bias"])


def test_logits_are_those_of_the_merged_backbone_and_each_head(task: SmallTask) -> None:
    backbone, heads = make_backbone(task, task.head_names), make_heads(task)
    merged = MultiTaskModule.assemble(each(task), backbone, heads)
    assert not any(child.training for child in merged.modules())
    x = torch.randn(6, 4)
    for name, classes in CLASSES.items():
        logits = merged((x, torch.zeros(6)), name)
        assert logits.shape == (6, classes)
        torch.testing.assert_close(logits.double(), independent_logits(backbone, heads[name], x), rtol=1e-4, atol=1e-5)
        assert merged.task_module(name).head.out_features == classes


def test_one_backbone_in_memory(task: SmallTask) -> None:
    backbone, heads = make_backbone(task, task.head_names), make_heads(task)
    merged = MultiTaskModule.assemble(each(task), backbone, heads)
    for name in backbone:
        places = {merged.task_module(t).state_dict()[name].data_ptr() for t in CLASSES}
        assert places == {backbone[name].data_ptr()}, f"{name} is used, not copied"
    trained = [p for name, p in task.named_parameters() if not name.startswith(("head", "scale"))]
    expected = sum(p.numel() for p in trained) + sum(t.numel() for head in heads.values() for t in head.values())
    assert sum(p.numel() for p in merged.parameters()) == expected
    assert merged.task_module("two").tied.weight is merged.task_module("a.b").shared.weight
    assert merged.task_module("two").body is merged.task_module("a.b").body, "layers are shared, so they can be sharded"
    assert merged.task_module("two").head is not merged.task_module("a.b").head


def test_heads_are_copies(task: SmallTask) -> None:
    heads = make_heads(task)
    merged = MultiTaskModule.assemble(each(task), heads=heads)
    for name, tensors in heads.items():
        for key, tensor in head_state(merged.task_module(name), task.head_names).items():
            assert torch.equal(tensor, tensors[key])
            assert tensor.data_ptr() != tensors[key].data_ptr()


def test_live_module_stays_as_it_is(task: SmallTask) -> None:
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    tensors = {name: id(parameter) for name, parameter in task.named_parameters()}
    merged = MultiTaskModule.assemble(each(task), make_backbone(task, task.head_names), make_heads(task))
    merged((torch.randn(6, 4), torch.zeros(6)), "two")
    assert task.training
    assert all(parameter.requires_grad for parameter in task.parameters())
    assert {name: id(parameter) for name, parameter in task.named_parameters()} == tensors
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    assert task.head.out_features == 3


def test_heads_that_do_not_fit_are_refused(task: SmallTask) -> None:
    heads = make_heads(task)
    del heads["two"]["scale"]
    with pytest.raises(ValueError, match=r"\['head\.bias', 'head\.weight'\], the module's head .*'scale'"):
        MultiTaskModule.assemble(each(task), heads=heads)


def test_unknown_task_is_named(task: SmallTask) -> None:
    merged = MultiTaskModule.assemble(each(task), heads=make_heads(task))
    with pytest.raises(KeyError, match=r"No task 'three'; tasks: two, a\.b, values"):
        merged.task_module("three")


def test_a_real_test_routes_batches_and_counts_exactly(task: SmallTask) -> None:
    """Sets of different sizes, uneven last batches and samples to leave out: no metric may see another's batches."""
    backbone, heads = make_backbone(task, task.head_names), make_heads(task)
    merged = MultiTaskModule.assemble(each(task), backbone, heads)
    sets, expected = [], {}
    for index, (name, classes) in enumerate(CLASSES.items()):
        torch.manual_seed(index)
        x, y = torch.randn(11 + 3 * index, 4), torch.randint(0, classes, (11 + 3 * index,))
        y[[1, 5, 10]] = IGNORE_INDEX
        sets.append(TensorDataset(x, y))
        guesses = independent_logits(backbone, heads[name], x).argmax(1).tolist()
        pairs = [(guess, target) for guess, target in zip(guesses, y.tolist(), strict=True) if target != IGNORE_INDEX]
        expected[f"accuracy/{name}"] = sum(guess == target for guess, target in pairs) / len(pairs)
        expected[f"score/{name}"] = expected[f"accuracy/{name}"]
    assert len(set(expected.values())) == 3
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loaders = [DataLoader(data, batch_size=4) for data in sets]
    for run in (trainer.test, trainer.validate, trainer.test):
        results = run(merged, loaders, verbose=False)
        assert {key: value for part in results for key, value in part.items()} == pytest.approx(expected)


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_lora_module_becomes_plain_weights(pretrained: Folder, pooling: str) -> None:
    config = LoraConfig(r=2, target_modules=["query", "word_embeddings"])
    task = TransformerTask(pretrained("bert"), 3, pooling=pooling, lora=config)
    head = task.head_names
    backbone = {name: t * 1.5 for name, t in make_backbone(task, head).items()}
    heads = {
        name: {"model.classifier.weight": torch.randn(classes, 16), "model.classifier.bias": torch.randn(classes)}
        for name, classes in CLASSES.items()
    }
    merged = MultiTaskModule.assemble(each(task), backbone, heads)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "base_layer" in name]
    assert [name for name, _ in task.named_parameters() if "lora" in name], "the live module keeps its adapters"

    batch = {"input_ids": torch.randint(3, 23, (4, 6)), "labels": torch.zeros(4)}
    for name, classes in CLASSES.items():
        plain = TransformerTask(pretrained("bert"), classes, pooling=pooling).eval()
        missing = plain.load_state_dict({**backbone, **heads[name]}, strict=False)
        assert not missing.unexpected_keys
        assert not [key for key in missing.missing_keys if key in dict(plain.named_parameters())]
        with torch.no_grad():
            assert torch.equal(merged(batch, name), plain.classify(batch)[0])


@pytest.mark.parametrize("architecture", ["t5", "llama", "deberta"])
def test_heads_of_other_architectures_take_any_number_of_classes(pretrained: Folder, architecture: str) -> None:
    tasks = {classes: TransformerTask(pretrained(architecture), classes).eval() for classes in (2, 5)}
    merged = MultiTaskModule.assemble({str(classes): module for classes, module in tasks.items()})
    ids = torch.randint(3, 23, (4, 6))
    ids[:, -1] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(4)}
    for classes, task in tasks.items():
        with torch.no_grad():
            assert torch.equal(merged(batch, str(classes)), task.classify(batch)[0])


def test_classify_reads_pairs_or_asks_the_module(task: SmallTask) -> None:
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    logits, target = classify(task.eval(), [x, y])
    assert torch.equal(logits, task(x))
    assert target is y
    with pytest.raises(TypeError, match="SmallTask has no `classify"):
        classify(task, {"x": x, "y": y})
    with pytest.raises(TypeError, match="not a pair"):
        classify(task, (x, y, y))


def test_head_names() -> None:
    task = SmallTask()
    assert head_names_of(task) == ("head", "scale")
    assert head_names_of(task, ["body.0"]) == ("body.0",)
    assert head_names_of(task, []) == ()
    with pytest.raises(ValueError, match="Linear does not say which parameters are its head"):
        head_names_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not say"):
        head_names_of(task, "head")


class PeftTask(L.LightningModule):
    """As people write it: a `PeftModel` inside, whose head peft keeps beside the adapters."""

    head_names = ("model.classifier",)

    def __init__(self, folder: str, num_classes: int) -> None:
        super().__init__()
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=num_classes)
        self.model = get_peft_model(model, LoraConfig(r=2, task_type=TaskType.SEQ_CLS, target_modules=["query"]))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def test_module_around_a_peft_model(pretrained: Folder) -> None:
    """Merging nothing but one task's own delta gives that task's finetune, without adapters."""
    torch.manual_seed(0)
    task = PeftTask(pretrained("bert"), 3)
    base = Base()
    base.remember(task, task.head_names, "only")
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    vector = base.task_vector(task, task.head_names, "only")
    backbone = base.tensors(task, task.head_names)
    for name, delta in vector.deltas.items():
        backbone[name] = backbone[name] + delta.dense()
    other = {"model.classifier.weight": torch.randn(8, 16), "model.classifier.bias": torch.randn(8)}
    merged = MultiTaskModule.assemble({"only": task, "other": task}, backbone, {"only": vector.head, "other": other})
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "modules_to_save" in name]
    ids = torch.randint(3, 23, (4, 6))
    with torch.no_grad():
        torch.testing.assert_close(merged((ids, None), "only"), task.eval()(ids), rtol=1e-4, atol=1e-5)
        assert merged((ids, None), "other").shape == (4, 8)
    assert isinstance(task.model, PeftModel)
