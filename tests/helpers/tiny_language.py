"""Tiny language models with a word tokenizer, and texts that they learn in some dozens of steps."""

import csv
import random
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from helpers.tiny import quiet_trainer
from lightning_drm import TransformerTask
from lightning_drm.data.task import DatasetTask

COLORS, PETS = ["red", "green", "blue"], ["cat", "dog", "bird"]
NUMBERS = ["one", "two", "three", "four", "five"]
FILLING = ["the", "a", "small", "old", "new"]
WORDS = [*COLORS, *PETS, *NUMBERS, *FILLING]
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}


def tokenizer(*, begins: bool, ends: bool, pads: bool = True) -> PreTrainedTokenizerFast:
    """Words to numbers; with a token that begins each text, as Llama's, or one that ends it, as T5's."""
    made = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    template = f"{'<s> ' if begins else ''}$A{' </s>' if ends else ''}"
    made.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 1)])
    padding = {"pad_token": "<pad>"} if pads else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64, **padding
    )


def save_tiny_t5(folder: Path, **settings: object) -> str:
    """A T5 with its tokenizer; without dropout, which would differ between processes."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=32, d_kv=16, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, **settings,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer(begins=False, ends=True).save_pretrained(folder)
    return str(folder)


def save_tiny_llama(folder: Path, *, pads: bool = True, **settings: object) -> str:
    """A Llama with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, bos_token_id=2, eos_token_id=1, **settings,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer(begins=True, ends=False, pads=pads).save_pretrained(folder)
    return str(folder)


def save_answers(path: Path, kinds: list[str], seed: int, count: int = 120) -> str:
    """A csv of short texts of different lengths; the target is the one word of a kind in each, once or twice."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        kind, times = draw.choice(kinds), draw.randint(1, 2)
        words = [*[kind] * times, *draw.choices(FILLING, k=draw.randint(1, 4))]
        draw.shuffle(words)
        rows.append((" ".join(words), " ".join([kind] * times)))
    return _write(path, ("text", "target"), rows)


def save_counting(path: Path, words: list[str], seed: int, count: int = 120) -> str:
    """A csv of texts that go through some words in turn from any of them, to different lengths, with a prompt each."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        start, length = draw.randrange(len(words)), draw.randint(2, 7)
        said = [words[(start + step) % len(words)] for step in range(length)]
        rows.append((" ".join(draw.choices(FILLING, k=draw.randint(1, 4))), " ".join(said)))
    return _write(path, ("prompt", "text"), rows)


def _write(path: Path, header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def finetuned(data: DatasetTask, base: str, lora: LoraConfig | None = None, *, steps: int) -> TransformerTask:
    """A tiny language model that has learned a task."""
    torch.manual_seed(0)
    module = TransformerTask(base, lora=lora, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    data.setup("fit")
    module.configure_for(data)
    quiet_trainer(max_epochs=None, max_steps=steps, limit_val_batches=0).fit(module, datamodule=data)
    return module
