"""Small real parts that several tests share: a vector task for plain modules, and a pretrained BERT with text files."""

import csv
import random
from pathlib import Path

import lightning as L
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import BertConfig, BertModel, BertTokenizerFast

KINDS = {"color": ["red", "green", "blue"], "pet": ["cat", "dog"]}  # by task, its classes: the telling words
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird"]


class VectorTask(L.LightningModule):
    """A small network on vectors, with a head."""

    head_names = ("head",)

    def __init__(self, num_classes: int = 2, seed: int = 0, lr: float = 0.05) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 5))
        self.head = nn.Linear(5, num_classes)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Vectors(L.LightningDataModule):
    """Vectors labelled by a random linear rule that depends on the seed."""

    def __init__(self, seed: int, num_classes: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(96, 6, generator=generator)
        y = (x @ torch.randn(6, num_classes, generator=generator)).argmax(1)
        self.train, self.test = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])
        self.num_classes = num_classes

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=16)


def quiet_trainer(**arguments: object) -> L.Trainer:
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return L.Trainer(**{**defaults, "enable_progress_bar": False, "enable_model_summary": False, **arguments})


def save_tiny_bert(folder: Path, **settings: object) -> str:
    """A pretrained-model folder: a two-layer BERT with a word tokenizer, as ``from_pretrained`` wants it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        **settings,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


def save_texts(path: Path, kinds: list[str], seed: int, count: int = 120) -> str:
    """A csv of short texts; the label is the kind (red or green, say) of the one telling word in each."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            kind = draw.choice(kinds)
            words = [kind, *draw.choices([word for word in WORDS if word not in kinds], k=3)]
            draw.shuffle(words)
            writer.writerow([" ".join(words), kind])
    return str(path)


COLORS = ["red", "green", "blue"]


class Tokens(L.LightningDataModule):
    """A user's own data: token numbers, of which one tells the class; processes share it as Lightning does."""

    num_classes = len(COLORS)

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(5)
        labels = torch.randint(len(COLORS), (75,), generator=generator)
        ids = torch.randint(8, 14, (75, 5), generator=generator)
        ids[:, 2] = labels + 5
        rows = [
            {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": label}
            for i, label in zip(ids, labels, strict=True)
        ]
        self.train, self.test = rows[:64], rows[64:]  # 11 to test: no number of processes divides them

    def train_dataloader(self) -> DataLoader:
        in_turns = self.trainer is not None and self.trainer.training and self.trainer.world_size > 1
        order = DistributedSampler(self.train, shuffle=False) if in_turns else None
        return DataLoader(self.train, self.batch_size, sampler=order)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=3)


def save_run_config(folder: Path) -> Path:
    """A configuration of two tasks, finetuned in a few steps each, with its data and its pretrained model."""
    base = save_tiny_bert(folder / "base")
    tasks = {}
    for seed, (name, kinds) in enumerate(KINDS.items()):
        dataset = save_texts(folder / f"{name}.csv", kinds, seed)
        tasks[name] = {
            "class_path": "lightning_drm.data.TextTask",
            "init_args": {"dataset": dataset, "pretrained": base, "batch_size": 16},
        }
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}}
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_drm.TransformerTask",
            "init_args": {"backbone": base, "pooling": "mean", "optimizer": optimizer, "head_lr": 5e-2},
        },
        "data": {"tasks": tasks},
        "drm": {"dirpath": str(folder / "run"), "method": {"class_path": "lightning_drm.DRM"}},
        "trainer": {
            "max_steps": 40,
            "limit_val_batches": 0,
            "accelerator": "cpu",
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}},
            "enable_checkpointing": False,
            "enable_model_summary": False,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
