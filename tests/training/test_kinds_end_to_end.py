"""Tags, choices, and images of several labels or with a number: finetuned, merged and tested, in full and with LoRA."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from lightning import seed_everything
from peft import LoraConfig
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTImageProcessor, ViTModel

from helpers.kinds import questions, save_rows, tagged_sentences
from helpers.loaded import assert_loads
from helpers.tiny import save_tiny_bert
from lightning_drm import Average, DRMMergeCallback, MergeTrainer, MultiTaskDataModule, TransformerTask
from lightning_drm.data import ImageTask, MultipleChoiceTask, TokenTask
from lightning_drm.kinds import MultiLabel, Regression

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_resampled_sets")]

on_both_ways = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def scores(folder: Path, data: MultiTaskDataModule, base: str, lora: bool, steps: int, **options: object) -> dict:
    """The report's scores after fit, merge and test."""
    seed_everything(0, verbose=False)
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if lora else None
    module = TransformerTask(
        base, lora=adapters, optimizer=partial(torch.optim.AdamW, lr=1e-2 if lora else 3e-3), head_lr=2e-2, **options
    )
    trainer = MergeTrainer(
        callbacks=[DRMMergeCallback(data.task_names, method=Average(), dirpath=folder)],
        max_steps=steps, limit_val_batches=0, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    report = json.loads((folder / "report.json").read_text())
    assert_loads(folder / "merged", data, trainer.callbacks[0].merged_module)
    in_card = {r.dataset_name: r.metric_value for r in ModelCard.load(folder / "merged/README.md").data.eval_results}
    assert in_card == pytest.approx({task: report["scores"]["merged"][task] for task in data.tasks})
    trainer.merge(module, datamodule=data)  # from what is stored: the same again
    assert json.loads((folder / "report.json").read_text())["scores"] == report["scores"]
    return report


@on_both_ways
def test_tags_and_choices(tmp_path, lora):
    base = save_tiny_bert(tmp_path / "base")
    data = MultiTaskDataModule(
        {
            "tags": TokenTask(save_rows(tmp_path / "tags.jsonl", tagged_sentences(0, 300)), base, batch_size=16),
            "answer": MultipleChoiceTask(
                save_rows(tmp_path / "answer.jsonl", questions(0, 300)), base, label_column="answer", batch_size=16
            ),
        }
    )
    report = scores(tmp_path / "run", data, base, lora, 60, pooling="mean")
    assert {task: metric["name"] for task, metric in report["metrics"].items()} == {
        "tags": "entity_f1",
        "answer": "accuracy",
    }
    assert min(report["scores"]["individual"][task] for task in ("tags", "answer")) > 0.9
    assert set(report["scores"]["base"]) == {"tags", "answer", "average"}, "both heads can be probed"


@on_both_ways
@pytest.mark.parametrize("task", ["tags", "answer"])
def test_the_model_that_transformers_defines(tmp_path, lora, task):
    base = save_tiny_bert(tmp_path / "base")
    file = save_rows(tmp_path / "rows.jsonl", tagged_sentences(0, 200) if task == "tags" else questions(0, 200))
    options = {"batch_size": 16}
    data = (
        TokenTask(file, base, **options)
        if task == "tags"
        else MultipleChoiceTask(file, base, label_column="answer", **options)
    )
    report = scores(tmp_path / "run", MultiTaskDataModule({task: data}), base, lora, 60, pooling="model")
    assert report["scores"]["individual"][task] > 0.8
    assert task in report["scores"]["merged"]


def save_photos(folder: Path, count: int) -> str:
    """Noisy images; the labels are the bright channels, and the number is how bright red is."""
    folder.mkdir()
    draw, rows = np.random.default_rng(0), []
    for number in range(count):
        bright = draw.integers(0, 2, 3)
        red = draw.uniform(0, 150)
        pixels = draw.integers(0, 60, (10, 10, 3)) + bright * 150
        pixels[..., 0] = draw.integers(0, 60, (10, 10)) + red + (40 if bright[0] else 0)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        colors = [color for color, is_bright in zip(("green", "blue"), bright[1:], strict=True) if is_bright]
        rows.append({"file_name": f"{number}.png", "colors": colors, "red": red / 100})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


def save_vision(folder: Path, architecture: str) -> str:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    seed_everything(0, verbose=False)
    config, model = {"vit": (ViTConfig, ViTModel), "clip": (CLIPVisionConfig, CLIPVisionModel)}[architecture]
    model(config(**sizes, image_size=8, patch_size=4)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


@on_both_ways
@pytest.mark.parametrize("architecture", ["vit", "clip"])
def test_images_with_several_labels_or_a_number(tmp_path, lora, architecture):
    photos, base = save_photos(tmp_path / "photos", 200), save_vision(tmp_path / "base", architecture)
    data = MultiTaskDataModule(
        {
            "colors": ImageTask(photos, base, kind=MultiLabel(), label_column="colors", batch_size=16),
            "red": ImageTask(photos, base, kind=Regression(), label_column="red", batch_size=16, cache=False),
        }
    )
    report = scores(tmp_path / "run", data, base, lora, 100, pooling="mean", modality="image")
    assert data.tasks["colors"].class_names == ["blue", "green"]
    assert {task: metric["name"] for task, metric in report["metrics"].items()} == {"colors": "f1", "red": "pearson"}
    assert min(report["scores"]["individual"][task] for task in ("colors", "red")) > 0.75  # 0.67 for all labels
    assert set(report["scores"]["base"]) == set(report["scores"]["merged"]) == {"colors", "red", "average"}
