"""The merged model on disk: what is written loads again, in transformers and here, and is replaced as a whole."""

import os
import stat
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from lightning_drm.deltas import TaskVector, backbone_parameters, fingerprint, head_state
from lightning_drm.fusion import Recipe, model_card
from lightning_drm.merging import DRM
from lightning_drm.modules import MultiTaskModule, TransformerTask
from lightning_drm.training.merged_folder import read_merged, write_merged

TEXTS = ["red cat", "a blue dog", "green"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pretrained")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "cat", "dog"]
    BertTokenizerFast(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight  # tied
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)


def head_tensors(module: nn.Module, names: tuple[str, ...], classes: int) -> dict[str, Tensor]:
    torch.manual_seed(classes)
    live = head_state(module, names)
    return {name: torch.randn(classes, *tensor.shape[1:]) for name, tensor in live.items()}


def test_plain_module_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, other = Plain(), Plain()
    heads = {"a": head_tensors(module, ("head",), 2), "b.c": head_tensors(module, ("head",), 7)}
    write_merged(tmp_path / "merged", module, ("head",), heads, "card")
    untouched = {name: tensor.clone() for name, tensor in head_state(other, ("head",)).items()}
    read = read_merged(tmp_path / "merged", other, ("head",), ["b.c", "a"])
    theirs = backbone_parameters(other, ("head",))
    for name, parameter in backbone_parameters(module, ("head",)).items():
        assert torch.equal(parameter.tensor, theirs[name].tensor), name
    assert other.out.weight is other.embed.weight
    assert list(read) == ["b.c", "a"]
    for task, tensors in heads.items():
        assert read[task].keys() == tensors.keys()
        assert all(torch.equal(read[task][name], tensor) for name, tensor in tensors.items())
    for name, tensor in head_state(other, ("head",)).items():
        assert torch.equal(tensor, untouched[name])
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "merged/README.md",
        "merged/heads/a.safetensors",
        "merged/heads/b.c.safetensors",
        "merged/model.safetensors",
    ]


def merged_transformer(
    pretrained: str, pooling: str, lora: LoraConfig | None
) -> tuple[MultiTaskModule, tuple[str, ...], dict[str, dict[str, Tensor]]]:
    """A merged model of two tasks; its backbone is not the pretrained one."""
    task = TransformerTask(pretrained, num_classes=3, pooling=pooling, lora=lora)
    head = task.head_names
    torch.manual_seed(1)
    backbone = {
        name: parameter.tensor.detach() + 0.1 * torch.randn_like(parameter.tensor)
        for name, parameter in backbone_parameters(task, head).items()
    }
    heads = {"a": head_tensors(task, head, 2), "b": head_tensors(task, head, 5)}
    return MultiTaskModule.assemble(dict.fromkeys(heads, task), backbone, heads), head, heads


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules=["query", "value"])], ids=["full", "lora"])
@pytest.mark.parametrize("pooling", ["model", "mean", "first"])
def test_transformer_folder_loads_everywhere(
    pretrained: str, tmp_path: Path, pooling: str, lora: LoraConfig | None
) -> None:
    merged, head, heads = merged_transformer(pretrained, pooling, lora)
    folder = tmp_path / "merged"
    write_merged(folder, merged.task_module("a"), head, heads, "card")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    assert inputs["input_ids"].tolist() == AutoTokenizer.from_pretrained(pretrained)(TEXTS, padding=True)["input_ids"]
    model, problems = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = model.eval()(**inputs).last_hidden_state
        ours = merged.task_module("b").backbone.eval()(**inputs).last_hidden_state
        base = AutoModel.from_pretrained(pretrained).eval()(**inputs).last_hidden_state
    assert torch.equal(theirs, ours)
    assert not torch.allclose(theirs, base)

    # Into a fresh module, with or without adapters in it, as `test` of a LoRA run does.
    fresh = TransformerTask(pretrained, num_classes=2, pooling=pooling, lora=lora)
    read = read_merged(folder, fresh, head, ["a", "b"])
    again = MultiTaskModule.assemble(dict.fromkeys(read, fresh), heads=read)
    for task in ("a", "b"):
        batch = {**inputs, "labels": torch.zeros(3, dtype=torch.long)}
        with torch.no_grad():
            assert torch.equal(again(batch, task), merged(batch, task))


def test_image_folder_loads(tmp_path: Path) -> None:
    """The image processor is written too, without torchvision."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
        )
    ).save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    task = TransformerTask(str(tmp_path / "base"), num_classes=3, modality="image")
    heads = {"a": head_tensors(task, task.head_names, 2)}
    write_merged(tmp_path / "merged", task, task.head_names, heads, "card")
    pixels = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(tmp_path / "merged").eval()(pixels).last_hidden_state
        ours = task.backbone.eval()(pixels).last_hidden_state
    assert torch.equal(theirs, ours)
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    fresh = TransformerTask(str(tmp_path / "base"), num_classes=3, modality="image")
    with torch.no_grad():
        for parameter in fresh.backbone.parameters():
            parameter.zero_()
    read_merged(tmp_path / "merged", fresh, fresh.head_names, ["a"])
    with torch.no_grad():
        assert torch.equal(fresh.backbone.eval()(pixels).last_hidden_state, ours)


def test_missing_heads_are_named(tmp_path: Path) -> None:
    module = Plain()
    with pytest.raises(FileNotFoundError, match="no merged model of task a, b: merge first"):
        read_merged(tmp_path / "merged", module, ("head",), ["a", "b"])
    write_merged(tmp_path / "merged", module, ("head",), {"a": head_tensors(module, ("head",), 2)}, "card")
    with pytest.raises(FileNotFoundError, match="no merged model of task b: merge first"):
        read_merged(tmp_path / "merged", module, ("head",), ["a", "b"])


def test_backbone_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """A shape that would broadcast must not slip in either."""
    module = Plain()
    write_merged(tmp_path / "merged", module, ("head",), {"a": head_tensors(module, ("head",), 2)}, "card")
    other = Plain()
    other.norm = nn.BatchNorm1d(1)
    write_merged(tmp_path / "small", other, ("head",), {"a": head_tensors(module, ("head",), 2)}, "card")
    with pytest.raises(ValueError, match=r"norm\.weight"):
        read_merged(tmp_path / "small", module, ("head",), ["a"])
    larger = Plain()
    larger.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        read_merged(tmp_path / "merged", larger, ("head",), ["a"])


class Failing(L.LightningModule):
    """Saves half of its backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)

    def save_backbone(self, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    def load_backbone(self, folder: Path) -> None:
        raise NotImplementedError


def test_old_folder_is_replaced_or_kept_whole(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    module = Plain()
    write_merged(folder, module, ("head",), {"old": head_tensors(module, ("head",), 2)}, "old card")
    with pytest.raises(OSError, match="disk full"):
        write_merged(folder, Failing(), ("head",), {}, "new card")
    assert (folder / "README.md").read_text() == "old card"
    assert (folder / "heads" / "old.safetensors").is_file()
    assert list(tmp_path.iterdir()) == [folder], "nothing is left beside it"

    write_merged(folder, module, ("head",), {"new": head_tensors(module, ("head",), 2)}, "new card")
    assert (folder / "README.md").read_text() == "new card"
    assert [path.name for path in (folder / "heads").iterdir()] == ["new.safetensors"], "no head of an earlier merge"
    assert list(tmp_path.iterdir()) == [folder]
    assert load_file(folder / "heads" / "new.safetensors")["head.bias"].shape == (2,)


def test_model_card(vectors: list[TaskVector]) -> None:
    card = model_card(
        Recipe(DRM(density=0.3), {"zeta": 0.5}),
        {vector.task: {"deltas": len(vector.deltas)} for vector in vectors},
        base="org/model",
        base_fingerprint=fingerprint(vectors[0].base_hashes),
    )
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == "org/model"
    assert metadata["library_name"] == "transformers"
    assert "merge" in metadata["tags"]
    assert "# 3 tasks merged with DRM" in body
    assert "density=0.3" in body
    assert fingerprint(vectors[0].base_hashes) in body
    for line in ("| zeta | 0.5 | 6 |", "| alpha | 1 | 5 |", "| mid | 1 | 5 |"):
        assert line in body


def test_model_card_without_a_named_base(vectors: list[TaskVector]) -> None:
    card = model_card(Recipe(DRM()), {vector.task: {} for vector in vectors}, base=None, base_fingerprint="x")
    assert "base_model" not in yaml.safe_load(card.split("---\n", 2)[1])
    assert "not named" in card


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_the_folder_can_be_handed_on(mask: int, pretrained: str, tmp_path: Path) -> None:
    """Others may read its files, and no file says where the base lies on this machine."""
    merged, head, heads = merged_transformer(pretrained, "mean", None)
    columns = {task: {"parameters with a delta": 2} for task in heads}
    card = model_card(Recipe(), columns, base=pretrained, base_fingerprint="0")
    before = os.umask(mask)
    try:
        write_merged(tmp_path / "merged", merged.task_module("a"), head, heads, card)
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "merged").rglob("*") if file.is_file()]
    assert len(files) >= 7
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file
        assert str(Path(pretrained).parent).encode() not in file.read_bytes(), file
    _, front, body = (tmp_path / "merged" / "README.md").read_text().split("---\n", 2)
    assert "base_model" not in yaml.safe_load(front), "the hub has no such model"
    assert f"- base: {Path(pretrained).name}, fingerprint" in body


@pytest.mark.parametrize("part", ["model.safetensors", "heads/a.safetensors"])
@pytest.mark.parametrize("kind", ["plain", "transformer"])
def test_damaged_folders_are_named(kind: str, part: str, pretrained: str, tmp_path: Path) -> None:
    if kind == "plain":
        module: nn.Module = Plain()
        head: tuple[str, ...] = ("head",)
        heads = {"a": head_tensors(module, head, 2)}
    else:
        merged, head, heads = merged_transformer(pretrained, "mean", None)
        module = merged.task_module("a")
    write_merged(tmp_path / "merged", module, head, heads, "card")
    file = tmp_path / "merged" / part
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"{tmp_path}/merged.* damaged"):
        read_merged(tmp_path / "merged", module, head, ["a"])
