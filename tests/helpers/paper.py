"""What `configs/paper` reads from the hub, tiny and on this machine: pretrained models, and data sets as on the hub.

A data set is a folder as on the hub: its configurations are in README.md, and each split has all of the hub's columns.
What the configurations name that is not here, or has another name on the hub, fails as it would there.
"""

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = ("vit_b32", "vit_l14", "deberta_v3_base", "t5_base", "t5_large", "llama31_8b_lora")

_WORDS = [f"word{number}" for number in range(40)]
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_NUM_TRAIN, _NUM_EVAL = 96, 24
_TEXT, _NUMBER = Value("string"), Value("int32")
_CHOICES = {"text": List(_TEXT), "label": List(_TEXT)}

Row = Callable[[random.Random, int], dict[str, Any]]


def _said(draw: random.Random, length: int = 5) -> str:
    return " ".join(draw.choices(_WORDS, k=length))


def _lettered(draw: random.Random, number: int) -> dict[str, list[str]]:
    return {"text": [_said(draw, 2) for _ in range(number)], "label": list("ABCDEFGH"[:number])}


def _image(draw: random.Random, row: int) -> dict[str, Any]:
    pixels = np.random.default_rng(row).integers(0, 90, (12, 10, 3), dtype=np.uint8)
    pixels[..., row % 3] += 120
    return {"image": Pictures.fromarray(pixels), "label": row % 3}


def _sentences(*columns: str, num_classes: int = 2) -> tuple[Features, Row]:
    """Rows of GLUE and the like: texts, a number and a class."""
    labels = ClassLabel(names=[f"class {number}" for number in range(num_classes)])
    features = Features({**dict.fromkeys(columns, _TEXT), "label": labels, "idx": _NUMBER})
    return features, lambda draw, row: {
        **{column: _said(draw) for column in columns},
        "label": row % num_classes,
        "idx": row,
    }


def _qasc(draw: random.Random, row: int) -> dict[str, Any]:
    choices, question = _lettered(draw, 8), _said(draw)
    listed = " ".join(f"({letter}) {text}" for letter, text in zip(choices["label"], choices["text"], strict=True))
    facts = {name: _said(draw) for name in ("fact1", "fact2", "combinedfact")}
    return {
        "id": str(row), "question": question, "choices": choices, "answerKey": "ABCDEFGH"[row % 8], **facts,
        "formatted_question": f"{question} {listed}",
    }  # fmt: skip


def _quartz(draw: random.Random, row: int) -> dict[str, Any]:
    texts = {"question": _said(draw), "para": _said(draw), "para_id": str(row)}
    return {"id": str(row), "choices": _lettered(draw, 2), "answerKey": "AB"[row % 2], **texts}


def _wiki_qa(draw: random.Random, row: int) -> dict[str, Any]:
    texts = {name: _said(draw) for name in ("question", "document_title", "answer")}
    return {"question_id": f"Q{row}", **texts, "label": row % 2}


def _winogrande(draw: random.Random, row: int) -> dict[str, Any]:
    return {"sentence": _said(draw), "option1": _said(draw, 1), "option2": _said(draw, 1), "answer": str(1 + row % 2)}


def _story(draw: random.Random, row: int) -> dict[str, Any]:
    columns = [*(f"InputSentence{number}" for number in range(1, 5)), *_ENDINGS]
    return {"InputStoryid": str(row), **{name: _said(draw) for name in columns}, "AnswerRightEnding": 1 + row % 2}


_ENDINGS = ("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2")
_IMAGES = (Features({"image": Image(), "label": ClassLabel(names=["red", "green", "blue"])}), _image)
_QASC = (
    Features(
        {
            **dict.fromkeys(("id", "question", "answerKey", "fact1", "fact2", "combinedfact"), _TEXT),
            "choices": _CHOICES,
            "formatted_question": _TEXT,
        }
    ),
    _qasc,
)
_QUARTZ = (
    Features({**dict.fromkeys(("id", "question", "answerKey", "para", "para_id"), _TEXT), "choices": _CHOICES}),
    _quartz,
)
_WIKI_QA = (
    Features(
        {
            **dict.fromkeys(("question_id", "question", "document_title", "answer"), _TEXT),
            "label": ClassLabel(names=["0", "1"]),
        }
    ),
    _wiki_qa,
)
_WINOGRANDE = (Features(dict.fromkeys(("sentence", "option1", "option2", "answer"), _TEXT)), _winogrande)
_UNLABELED = {"answerKey": "", "answer": "", "fact1": "", "fact2": "", "label": -1}
_BOTH, _USUAL, _CORRUPTED = ("train", "test"), ("train", "validation", "test"), ("train", "test", "contrast")
_MNLI = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")

HUB: dict[str, dict[str, tuple[tuple[Features, Row], Sequence[str], Sequence[str]]]] = {
    "tanganke/stanford_cars": {"default": (_IMAGES, _CORRUPTED, [])},
    "tanganke/dtd": {"default": (_IMAGES, _BOTH, [])},
    "tanganke/eurosat": {"default": (_IMAGES, _CORRUPTED, [])},
    "tanganke/gtsrb": {"default": (_IMAGES, _CORRUPTED, [])},
    "tanganke/resisc45": {"default": (_IMAGES, _CORRUPTED, [])},
    "tanganke/sun397": {"default": (_IMAGES, _BOTH, [])},
    "ylecun/mnist": {"mnist": (_IMAGES, _BOTH, [])},
    "ufldl-stanford/svhn": {
        "cropped_digits": (_IMAGES, ("train", "test", "extra"), []),
        "full_numbers": (_IMAGES, _BOTH, []),
    },
    "google-research-datasets/paws": {
        "labeled_final": (_sentences("sentence1", "sentence2"), _USUAL, []),
        "labeled_swap": (_sentences("sentence1", "sentence2"), ("train",), []),
    },
    "allenai/qasc": {"default": (_QASC, _USUAL, ["test"])},
    "allenai/quartz": {"default": (_QUARTZ, _USUAL, [])},
    "microsoft/wiki_qa": {"default": (_WIKI_QA, _USUAL, [])},
    "allenai/winogrande": {name: (_WINOGRANDE, _USUAL, ["test"]) for name in ("winogrande_l", "winogrande_xl")},
    "nyu-mll/glue": {
        "cola": (_sentences("sentence"), _USUAL, ["test"]),
        "sst2": (_sentences("sentence"), _USUAL, ["test"]),
        "mnli": (_sentences("premise", "hypothesis", num_classes=3), _MNLI, _MNLI[3:]),
        "qnli": (_sentences("question", "sentence"), _USUAL, ["test"]),
        "rte": (_sentences("sentence1", "sentence2"), _USUAL, ["test"]),
    },
}
"""By hub name and configuration: columns and how a row is made, the splits, and those whose labels are kept secret."""


def save_hub_set(name: str, folder: Path) -> str:
    """A data set as on the hub."""
    described = []
    for config, ((features, make), splits, unlabeled) in HUB[name].items():
        files = []
        for split in splits:
            file = folder / config / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            draw = random.Random(split)
            rows = [make(draw, row) for row in range(_NUM_TRAIN if split == "train" else _NUM_EVAL)]
            if split in unlabeled:
                rows = [{**row, **{key: value for key, value in _UNLABELED.items() if key in row}} for row in rows]
            Dataset.from_list(rows, features=features).to_parquet(file)
            files.append({"split": split, "path": f"{config}/{split}-*"})
        described.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': described})}---\n")
    return str(folder)


def save_stories(file: Path) -> str:
    """A file of StoryCloze."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(file.name)
    Dataset.from_list([_story(draw, row) for row in range(_NUM_TRAIN)]).to_csv(file)
    return str(file)


def _tokenizer(
    single: str, pair: str, special: dict[str, str], others: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Words to numbers; the special tokens come first, in their order."""
    tokens = [*dict.fromkeys(special.values()), *others]
    numbers = {token: number for number, token in enumerate([*tokens, *_WORDS])}
    made = Tokenizer(WordLevel(numbers, unk_token=special["unk_token"]))
    made.pre_tokenizer = Whitespace()
    used = [(token, numbers[token]) for token in tokens if token in f"{single} {pair}".split()]
    made.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=used)
    found = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=2048, **special)
    found.add_special_tokens({"additional_special_tokens": list(others)})
    return found


def _save_clip(folder: Path) -> None:
    vision = {**_SIZES, "image_size": 8, "patch_size": 4}
    text = {**_SIZES, "vocab_size": 40}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)


def _save_deberta(folder: Path) -> None:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = _tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", special)
    config = DebertaV2Config(
        **_SIZES, vocab_size=len(tokenizer), type_vocab_size=0, relative_attention=True, position_buckets=8,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, share_att_key=True, norm_rel_ebd="layer_norm",
    )  # fmt: skip
    DebertaV2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_t5(folder: Path) -> None:
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = _tokenizer("$A </s>", "$A </s> $B </s>", special)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_llama(folder: Path) -> None:
    """As on the hub: no token for padding is named, though there is one."""
    begin = "<|begin_of_text|>"
    special = {"bos_token": begin, "eos_token": "<|end_of_text|>", "unk_token": "<unk>"}
    tokenizer = _tokenizer(f"{begin} $A", f"{begin} $A {begin} $B", special, ("<|finetune_right_pad_id|>",))
    config = LlamaConfig(
        **_SIZES, vocab_size=len(tokenizer), num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=None
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "openai/clip-vit-base-patch32": _save_clip,
    "openai/clip-vit-large-patch14": _save_clip,
    "microsoft/deberta-v3-base": _save_deberta,
    "google-t5/t5-base": _save_t5,
    "google-t5/t5-large": _save_t5,
    "meta-llama/Llama-3.1-8B": _save_llama,
}


class TinyHub:
    """Makes what is asked for, once.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, name: str) -> str:
        """The folder of a pretrained model."""
        folder = self._folder / "models" / name
        if not folder.exists():
            torch.manual_seed(0)
            MODELS[name](folder)
        return str(folder)

    def data(self, name: str) -> str:
        """The folder of a data set."""
        folder = self._folder / "data" / name
        return str(folder) if folder.exists() else save_hub_set(name, folder)

    def stories(self, file: str) -> str:
        """A file of StoryCloze, which is not on the hub."""
        path = self._folder / file
        return str(path) if path.exists() else save_stories(path)

    def overlay(self, name: str, tasks: list[str] | None = None) -> dict[str, Any]:
        """What of a configuration is replaced: where models and data are, sizes, and numbers of steps.

        Args:
            name: The configuration.
            tasks: Only these tasks; all if left out.
        """
        shipped = shipped_config(name)
        model, trainer = shipped["model"], shipped["trainer"]
        arguments = model["init_args"]
        arguments.update(backbone=self.model(arguments["backbone"]), revision=None)
        if "lr_scheduler" in arguments:
            arguments["lr_scheduler"]["init_args"]["total_steps"] = STEPS
        chosen = {task: shipped["data"]["tasks"][task] for task in tasks or shipped["data"]["tasks"]}
        for task in chosen.values():
            self._bring_here(task["init_args"])
        steps = {"max_steps": STEPS, "accumulate_grad_batches": 1}
        if "val_check_interval" in trainer:
            steps["val_check_interval"] = STEPS // 2
        return {"model": model, "data": {"tasks": chosen}, "trainer": steps}

    def _bring_here(self, arguments: dict[str, Any]) -> None:
        arguments.update(pretrained=self.model(arguments["pretrained"]), pretrained_revision=None, num_workers=0)
        arguments.update(batch_size=8, eval_batch_size=16)
        if "data_files" in arguments:
            arguments["data_files"] = {split: self.stories(file) for split, file in arguments["data_files"].items()}
        else:
            arguments.update(dataset=self.data(arguments["dataset"]), revision=None)


STEPS = 6


def shipped_config(name: str) -> dict[str, Any]:
    """A configuration of `configs/paper`, to be changed at will: YAML's references to one object become copies."""
    content = yaml.safe_load((CONFIGS / "paper" / f"{name}.yaml").read_text())
    for task in content["data"]["tasks"].values():
        task["init_args"] = copy.deepcopy(task["init_args"])
    return content
