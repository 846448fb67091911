"""One task of a transformers backbone, over the architectures that people finetune."""

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel

from lightning_drm.deltas import Base, backbone_parameters
from lightning_drm.kinds import IGNORE_INDEX
from lightning_drm.merging import LowRank
from lightning_drm.modules import TransformerTask, duplicate

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

Folder = Callable[[str], str]

HEADS = {
    "bert": ("model.classifier",),
    "deberta": ("model.pooler", "model.classifier"),
    "t5": ("model.classification_head",),
    "llama": ("model.score",),
    "vit": ("model.classifier",),
    "clip": ("model.classifier",),
}
TARGETS = {
    "bert": ["query", "value"],
    "deberta": ["query_proj", "value_proj"],
    "t5": ["q", "v"],
    "llama": ["q_proj", "v_proj"],
    "vit": ["q_proj", "v_proj"],
    "clip": ["q_proj", "v_proj"],
}
IMAGE = ("vit", "clip")


def build(pretrained: Folder, architecture: str, num_classes: int | None = 3, **arguments: object) -> TransformerTask:
    modality = "image" if architecture in IMAGE else "text"
    return TransformerTask(pretrained(architecture), num_classes, modality=modality, **arguments)


def make_batch(architecture: str, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 3
    if architecture in IMAGE:
        return {"pixel_values": torch.rand(size, 3, 8, 8, generator=generator), "labels": labels}
    ids = torch.randint(3, 23, (size, 6), generator=generator)
    ids[:, -1] = 1  # T5 reads the sentence at its end token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def lora_of(architecture: str) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS[architecture])


@pytest.mark.parametrize("architecture", HEADS)
def test_head_is_all_that_is_not_pretrained(pretrained: Folder, architecture: str) -> None:
    task = build(pretrained, architecture)
    assert task.head_names == HEADS[architecture]
    inside = {id(parameter) for parameter in task.backbone.parameters()}
    outside = {name for name, parameter in task.named_parameters() if id(parameter) not in inside}
    assert outside == {
        name
        for name, _ in task.named_parameters()
        if name.startswith(tuple(f"{part}." for part in HEADS[architecture]))
    }
    backbone = backbone_parameters(task, task.head_names)
    assert {id(parameter.tensor) for parameter in backbone.values()} >= inside
    # Whatever the number of classes, the backbone starts from the same weights.
    base = Base()
    base.remember(task, task.head_names, "a")
    base.remember(build(pretrained, architecture, 7), HEADS[architecture], "b")


@pytest.mark.parametrize("architecture", HEADS)
def test_full_finetune_trains_everything(pretrained: Folder, architecture: str) -> None:
    task = build(pretrained, architecture)
    assert all(child.training for child in task.modules()), "from_pretrained leaves models in evaluation mode"
    batch = make_batch(architecture)
    logits, target = task.classify(batch)
    assert logits.shape == (4, 3)
    assert torch.equal(target, batch["labels"])
    loss = step_loss(task, batch)
    loss.backward()
    assert all(parameter.requires_grad for parameter in task.parameters())
    grown = [name for name, parameter in task.named_parameters() if parameter.grad is not None]
    assert len(grown) > 0.7 * len(list(task.parameters()))
    for part in task.head_names:
        assert any(name.startswith(part) for name in grown)


def step_loss(task: TransformerTask, batch: dict[str, Tensor]) -> Tensor:
    """The training step's loss, outside a Trainer."""
    return task.training_step(batch, 0)


def eval_logits(task: TransformerTask, batch: dict[str, Tensor]) -> Tensor:
    frozen = copy.deepcopy(task).eval()
    with torch.no_grad():
        return frozen.classify(batch)[0]


def plain_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    losses = [-row.double().log_softmax(0)[t] for row, t in zip(logits, target.tolist(), strict=True) if t >= 0]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("architecture", HEADS)
def test_loss_leaves_padding_samples_out(pretrained: Folder, architecture: str) -> None:
    task = build(pretrained, architecture).eval()
    batch = make_batch(architecture)
    batch["labels"] = torch.tensor([0, IGNORE_INDEX, 2, IGNORE_INDEX])
    torch.testing.assert_close(
        step_loss(task, batch).double(),
        plain_cross_entropy(eval_logits(task, batch), batch["labels"]),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("architecture", HEADS)
def test_lora_trains_adapters_and_head_alone(pretrained: Folder, architecture: str) -> None:
    plain = build(pretrained, architecture).eval()
    task = build(pretrained, architecture, lora=lora_of(architecture))
    assert task.head_names == HEADS[architecture]
    assert list(backbone_parameters(task, task.head_names)) == list(backbone_parameters(plain, plain.head_names))
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    heads = {name for name in trained if name.startswith(tuple(f"{part}." for part in HEADS[architecture]))}
    assert adapters
    assert heads
    assert trained == adapters | heads
    assert all(
        parameter.requires_grad for part in task.head_names for parameter in task.get_submodule(part).parameters()
    )

    base = Base()
    base.remember(task, task.head_names, "task")
    batch = make_batch(architecture)
    optimizer = task.configure_optimizers()
    for _ in range(2):  # an adapter's first factor moves in the second step
        optimizer.zero_grad()
        step_loss(task, batch).backward()
        optimizer.step()
    vector = base.task_vector(task, task.head_names, "task")
    assert len(vector.deltas) == len(adapters) / 2
    assert all(isinstance(delta, LowRank) and delta.dense().abs().max() > 0 for delta in vector.deltas.values())


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_lora_with_pooling(pretrained: Folder, pooling: str) -> None:
    task = build(pretrained, "bert", pooling=pooling, lora=lora_of("bert"))
    assert task.head_names == ("model.classifier",)
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"model.classifier.weight", "model.classifier.bias"}
    assert {id(p) for p in task.backbone.parameters()} | {id(p) for p in task.model.classifier.parameters()} == {
        id(p) for p in task.parameters()
    }


def test_lora_configuration_is_not_changed(pretrained: Folder) -> None:
    """peft writes into the configuration that it is given; one is shared by all tasks here."""
    config = LoraConfig(r=2, target_modules="all-linear")
    before = copy.deepcopy(config.to_dict())
    build(pretrained, "bert", lora=config)
    assert config.to_dict() == before


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_does_not_change_logits(pretrained: Folder, pooling: str) -> None:
    task = build(pretrained, "bert", pooling=pooling).eval()
    batch = make_batch("bert")
    padding = torch.zeros(4, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([batch["input_ids"], padding + 7], dim=1),  # whatever stands there
        "attention_mask": torch.cat([batch["attention_mask"], padding], dim=1),
        "labels": batch["labels"],
    }
    with torch.no_grad():
        torch.testing.assert_close(task.classify(padded)[0], task.classify(batch)[0], rtol=1e-5, atol=1e-6)
        hidden = task.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        pooled = hidden.double().sum(1) / 6 if pooling == "mean" else hidden[:, 0].double()
        head = task.model.classifier
        expected = pooled @ head.weight.double().T + head.bias.double()
    torch.testing.assert_close(task.classify(batch)[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_pooling_without_a_mask_takes_all_tokens(pretrained: Folder) -> None:
    task = build(pretrained, "bert", pooling="mean").eval()
    batch = make_batch("bert")
    with torch.no_grad():
        torch.testing.assert_close(task(input_ids=batch["input_ids"]), task.classify(batch)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["clip", "bert"])
def test_the_encoders_own_pooling(pretrained: Folder, architecture: str) -> None:
    """Of CLIP, it is that of the vision tower, which is loaded alone and trained as a whole."""
    task = build(pretrained, architecture, pooling="pooler").eval()
    batch = make_batch(architecture)
    whole = AutoModel.from_pretrained(pretrained(architecture))
    encoder = whole.vision_model if architecture == "clip" else whole
    weights = encoder.state_dict()
    assert task.backbone.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in task.backbone.state_dict().items())
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        pooled, head = encoder(**inputs).pooler_output.double(), task.model.classifier
        expected = pooled @ head.weight.double().T + head.bias.double()
        torch.testing.assert_close(task.classify(batch)[0].double(), expected, rtol=1e-5, atol=1e-6)
    step_loss(task, batch).backward()
    assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []


def test_a_vision_tower_that_is_not_whole_is_refused(pretrained: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(pretrained("clip"), tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["vision_model.post_layernorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"Expected all weights of CLIPVisionModel in .*, but it lacks post_layernorm"):
        TransformerTask(str(folder), 3, modality="image", pooling="pooler")


def test_an_encoder_without_pooling_is_refused(pretrained: Folder) -> None:
    task = build(pretrained, "deberta", pooling="pooler")
    with pytest.raises(ValueError, match="DebertaV2Model pools nothing by itself: choose another pooling"):
        task.classify(make_batch("deberta"))


def test_unused_pooler_takes_no_gradient(pretrained: Folder) -> None:
    """Distributed training would wait for its gradients."""
    task = build(pretrained, "bert", pooling="mean")
    step_loss(task, make_batch("bert")).backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


def test_optimizer_groups(pretrained: Folder) -> None:
    task = build(pretrained, "deberta", optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9), head_lr=0.01)
    optimizer = task.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(0.5, 0.9), (0.01, 0.9)]
    backbone, head = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert backbone == {id(p) for p in task.backbone.parameters()}
    assert head == {id(p) for name in task.head_names for p in task.get_submodule(name).parameters()}


def test_optimizer_of_a_lora_holds_nothing_frozen(pretrained: Folder) -> None:
    task = build(pretrained, "bert", lora=lora_of("bert"))
    optimizer = task.configure_optimizers()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in task.parameters() if p.requires_grad}
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]  # AdamW's own


def test_scheduler_steps_after_every_batch(pretrained: Folder) -> None:
    task = build(
        pretrained,
        "bert",
        optimizer=partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        head_lr=8.0,
    )
    samples = [{name: value[0] for name, value in make_batch("bert").items()}] * 6
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1e-6,
    )  # fmt: skip
    trainer.fit(task, DataLoader(samples, batch_size=2))
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1 / 8, 1.0]


def test_metrics_of_a_fit(pretrained: Folder) -> None:
    """Validation and test leave padding samples out; the numbers are those of plain loops."""
    task = build(pretrained, "bert")
    batch = make_batch("bert", 6)
    first = int(eval_logits(task, batch)[0].argmax())  # right, so that the accuracy is not 0 whatever the head is
    labels = [first, 1, 2, IGNORE_INDEX, 1, IGNORE_INDEX]
    samples = [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(label)}
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)
    ]
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(samples, batch_size=4)
    logits = eval_logits(task, batch)
    counted = [index for index, label in enumerate(labels) if label != IGNORE_INDEX]
    accuracy = sum(int(logits[index].argmax()) == labels[index] for index in counted) / len(counted)
    validated = trainer.validate(task, loader, verbose=False)[0]
    assert validated["val_accuracy"] == pytest.approx(accuracy)
    expected = float(plain_cross_entropy(logits, torch.tensor(labels)))
    assert validated["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.test(task, loader, verbose=False)[0]["test_accuracy"] == pytest.approx(accuracy)


def test_template_waits_for_the_number_of_classes(pretrained: Folder) -> None:
    template = build(pretrained, "bert", None, lora=lora_of("bert"))
    assert list(template.parameters()) == []
    for use in (lambda: template(input_ids=torch.ones(1, 2)), lambda: template.head_names, lambda: template.backbone):
        with pytest.raises((RuntimeError, AttributeError), match="no model yet: give num_classes"):
            use()
    copies = [duplicate(template) for _ in range(2)]
    copies[0].configure_task(2)
    copies[1].configure_task(5)
    assert [copied.model.classifier.out_features for copied in copies] == [2, 5]
    assert [copied.hparams["num_classes"] for copied in copies] == [2, 5]
    assert template.hparams["num_classes"] is None
    assert template.model is None
    base = Base()
    for copied in copies:
        base.remember(copied, copied.head_names, str(copied.model.classifier.out_features))


def test_duplicate_is_deep_and_shares_factories(pretrained: Folder) -> None:
    optimizer = partial(torch.optim.SGD, lr=1.0)
    task = build(pretrained, "bert", optimizer=optimizer)
    copied = duplicate(task)
    assert copied.optimizer is optimizer
    assert not {p.data_ptr() for p in task.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), copied.parameters(), strict=True))
    replaced = nn.Linear(16, 9)
    assert duplicate(task, {id(task.model.classifier): replaced}).model.classifier is replaced


def test_duplicate_leaves_the_trainer_behind(pretrained: Folder) -> None:
    task = build(pretrained, "bert")
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, DataLoader([{name: value[0] for name, value in make_batch("bert").items()}], batch_size=1))
    assert task._trainer is trainer
    assert duplicate(task)._trainer is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_precision(pretrained: Folder, dtype: str) -> None:
    for pooling in ("model", "mean"):
        task = build(pretrained, "bert", dtype=dtype, pooling=pooling)
        expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        assert {parameter.dtype for parameter in task.parameters()} == {expected}
        assert step_loss(task, make_batch("bert")).isfinite()


@pytest.mark.parametrize("architecture", ["vit", "llama"])
def test_backbone_is_saved_without_a_processor_too(pretrained: Folder, architecture: str, tmp_path: Path) -> None:
    """A merge that took hours must not be lost for want of a tokenizer."""
    task = build(pretrained, architecture)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.mul_(1.5)
    with pytest.warns(UserWarning, match="written without a processor"):
        task.save_backbone(tmp_path)
    fresh = build(pretrained, architecture)
    fresh.load_backbone(tmp_path)
    for name, parameter in backbone_parameters(fresh, fresh.head_names).items():
        assert torch.equal(parameter.tensor, backbone_parameters(task, task.head_names)[name].tensor), name


def test_backbone_is_read_below_adapters(pretrained: Folder, tmp_path: Path) -> None:
    plain = build(pretrained, "clip")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    plain.backbone.save_pretrained(tmp_path)
    task = build(pretrained, "clip", lora=lora_of("clip"))
    task.load_backbone(tmp_path)
    for name, parameter in backbone_parameters(task, task.head_names).items():
        assert torch.equal(parameter.tensor, backbone_parameters(plain, plain.head_names)[name].tensor), name
