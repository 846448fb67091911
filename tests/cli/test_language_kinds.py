"""Language models from YAML: two tasks each of a tiny T5 and a tiny Llama, fitted, merged and tested by the commands.

Several processes share 13 test samples, which none of the numbers divides; the global batch is always the same.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from helpers.tiny_language import COLORS, PETS, save_answers, save_counting, save_tiny_llama, save_tiny_t5
from helpers.warm import python, torchrun
from lightning_drm import load_merged
from lightning_drm.cli.main import main
from lightning_drm.data import LanguageTask, SequenceTask

WORDS = {"color": COLORS, "pet": PETS}
GLOBAL_BATCH, COUNT = 16, 130
MODELS = ["t5", "llama"]
LORA = {
    "t5": {"r": 4, "lora_alpha": 16, "target_modules": ["q", "v", "wi", "wo"]},
    "llama": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is left in, or read from, the user's cache."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield folder


def task_settings(folder: Path, name: str, task: str) -> dict[str, object]:
    base, file = folder / "base", folder / f"{task}.csv"
    sizes = {"batch_size": GLOBAL_BATCH, "eval_batch_size": 3, "max_train_samples": 96}
    own = {"prefix": "the ", "max_new_tokens": 4} if name == "t5" else {"prompt_column": "prompt"}
    return {"dataset": str(file), "pretrained": str(base), **sizes, **own}


def save_config(folder: Path, name: str, lora: bool) -> Path:
    {"t5": save_tiny_t5, "llama": save_tiny_llama}[name](folder / "base")
    save = {"t5": save_answers, "llama": save_counting}[name]
    for seed, (task, words) in enumerate(WORDS.items()):
        save(folder / f"{task}.csv", words, seed, COUNT)
    data = {"t5": "lightning_drm.data.SequenceTask", "llama": "lightning_drm.data.LanguageTask"}[name]
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}}
    adapters = {"lora": {"class_path": "peft.LoraConfig", "init_args": LORA[name]}} if lora else {}
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_drm.TransformerTask",
            "init_args": {"backbone": str(folder / "base"), "optimizer": optimizer, **adapters},
        },
        "data": {
            "tasks": {t: {"class_path": data, "init_args": task_settings(folder, name, t)} for t in WORDS},
        },
        "drm": {"method": {"class_path": "lightning_drm.DRM", "init_args": {"density": 0.5}}},
        "trainer": {
            "max_steps": {"t5": 90, "llama": 30}[name], "limit_val_batches": 0, "accelerator": "cpu", "devices": 1,
            "logger": False, "enable_checkpointing": False, "enable_model_summary": False,
            "enable_progress_bar": False,
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its tasks' data, and the run of a single process after ``fit``."""
    folder = tmp_path_factory.mktemp(name)
    config = save_config(folder, name, lora=False)
    main(["fit", "--config", str(config), "--drm.dirpath", str(folder / "run1"), "--base_batches", "0"])
    return folder


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def average_of(run: Path) -> list[str]:
    return ["--config", str(run.parent / "config.yaml"), "--drm.dirpath", str(run), "--drm.method", "Average"]


def test_fit_measures_base_individual_and_merged(name: str, folder: Path):
    """The base as it is, though --base_batches is 0: no head has to be trained on it."""
    content = report(folder / "run1")
    metric = {"t5": "exact_match", "llama": "perplexity"}[name]
    expected = {"name": metric, "higher_is_better": name == "t5"}
    assert content["metrics"] == dict.fromkeys(WORDS, expected)
    for task in WORDS:
        base, individual, merged = (content["scores"][row][task] for row in ("base", "individual", "merged"))
        if name == "t5":
            assert base == 0
            assert 0.3 < individual <= 1
            assert merged < 1
        else:
            assert 1 < individual < merged < base
        assert content["intervals"]["individual"][task] is not None
    assert any(content["scores"]["merged"][task] > 0 for task in WORDS), "the case shows nothing"


def test_merged_model_loads_with_all_of_its_weights(name: str, folder: Path):
    merged, base = folder / "run1/merged", folder / "base"
    auto_class = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}[name]
    model, found = auto_class.from_pretrained(merged, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, theirs = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[key] - theirs[key]).abs().max() > 1e-3 for key in ours), "something was not merged"
    assert GenerationConfig.from_pretrained(merged).to_dict() == GenerationConfig.from_pretrained(base).to_dict()
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    if name == "t5":
        assert model.lm_head.weight is model.shared.weight
        assert model.decoder.embed_tokens.weight is model.shared.weight


@torch.no_grad()
def test_load_merged_gives_the_same_logits(name: str, folder: Path):
    merged = folder / "run1/merged"
    theirs = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}[name].from_pretrained(merged).eval()
    tokenized = AutoTokenizer.from_pretrained(merged)(["red cat", "green"], return_tensors="pt", padding=True)
    batch = {key: tokenized[key] for key in ("input_ids", "attention_mask")}
    if name == "t5":
        batch["decoder_input_ids"] = torch.tensor([[0, 5], [0, 7]])
    for task in WORDS:
        ours = load_merged(merged, task)
        assert torch.equal(ours(**batch), theirs(**batch).logits)


@torch.no_grad()
def test_merged_scores_are_those_of_the_model_on_disk(name: str, folder: Path):
    """One sample at a time, without padding, with transformers alone."""
    merged = folder / "run1/merged"
    for task, score in report(folder / "run1")["scores"]["merged"].items():
        if task == "average":
            continue
        if name == "t5":
            data = SequenceTask(**task_settings(folder, name, task))
            model = AutoModelForSeq2SeqLM.from_pretrained(merged)
            targets = data.rows["test"]["labels"][:]
            written = [
                data.tokenizer.decode(
                    model.generate(torch.tensor(sample["input_ids"])[None], max_new_tokens=4)[0],
                    skip_special_tokens=True,
                )
                for sample in data.splits["test"]
            ]
            expected = sum(a == b for a, b in zip(written, targets, strict=True)) / len(targets)
        else:
            model = AutoModelForCausalLM.from_pretrained(merged).double()
            losses = []
            for sample in LanguageTask(**task_settings(folder, name, task)).splits["test"]:
                ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
                scores = model(ids[None]).logits[0].log_softmax(-1)
                losses += [-scores[at - 1, ids[at]].item() for at in range(1, len(ids)) if labels[at] >= 0]
            expected = math.exp(sum(losses) / len(losses))
        assert score == pytest.approx(expected, rel=1e-5), task


def test_merge_and_test_again(name: str, folder: Path):
    """The run is merged by another method, and back."""
    run = folder / "run1"
    first, weights = report(run), load_file(run / "merged/model.safetensors")
    main(["merge", *average_of(run)])
    second = report(run)
    assert second["scores"]["merged"] != first["scores"]["merged"]
    assert second["scores"]["base"] == first["scores"]["base"]
    main(["test", *average_of(run)])
    assert_same(report(run), second)
    back = ["--config", str(folder / "config.yaml"), "--drm.dirpath", str(run)]
    main(["merge", *back])
    again = load_file(run / "merged/model.safetensors")
    assert_same(report(run), first)
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_lora(name: str, tmp_path: Path):
    config = save_config(tmp_path, name, lora=True)
    main(["fit", "--config", str(config), "--drm.dirpath", str(tmp_path / "run1")])
    fitted = report(tmp_path / "run1")
    scores = fitted["scores"]
    for task in WORDS:
        better = scores["individual"][task] - scores["base"][task]
        assert better > 0 if name == "t5" else better < 0
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("run1/merged", "base"))
    assert ours.keys() == theirs.keys()
    changed = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    assert {key.split(".")[-2] for key in changed} == set(LORA[name]["target_modules"])
    main(["test", "--config", str(config), "--drm.dirpath", str(tmp_path / "run1")])
    assert_same(report(tmp_path / "run1"), fitted)


def on_processes(size: int, *arguments: str) -> None:
    """Runs a command on several processes."""
    command = ["-m", "lightning_drm", *arguments, "--trainer.strategy", "ddp", "--trainer.devices", size]
    ranks = torchrun(["--standalone", f"--nproc_per_node={size}"], command)
    done = python(*ranks, environment={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=400)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_find_the_same_scores(name: str, folder: Path, size: int):
    """Tested anew from the same finetunes: the base, each task's finetune, and the merged model."""
    alone, run = folder / "again1", folder / f"again{size}"
    if not alone.exists():
        shutil.copytree(folder / "run1", alone)
        main(["merge", *average_of(alone)])
        main(["test", *average_of(alone)])
    shutil.copytree(alone, run)
    on_processes(size, "test", *average_of(run))
    assert_same(report(run), report(alone))
    scores = report(run)["scores"]
    assert all(scores["individual"][task] > 0 for task in WORDS), "the case shows nothing"
    assert any(scores["merged"][task] > 0 for task in WORDS), "the case shows nothing"


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_alike(name: str, folder: Path, size: int):
    """Each has texts of another number of tokens, and every token counts alike. Steps are few, as rounding grows."""
    for number in (1, size):
        run = folder / f"short{number}"
        if not run.exists():
            each = [f"--data.tasks.{task}.init_args.batch_size={GLOBAL_BATCH // number}" for task in WORDS]
            config = ["--config", str(folder / "config.yaml"), "--drm.dirpath", str(run), *each]
            on_processes(number, "fit", *config, "--config", str(sgd(folder)), "--trainer.max_steps", "6")
    assert_same(report(folder / f"short{size}"), report(folder / "short1"))
    for task in WORDS:
        ours, theirs = (load_file(folder / f"short{number}/tasks/{task}/deltas.safetensors") for number in (size, 1))
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 2e-6
        assert max(float(tensor.abs().max()) for tensor in theirs.values()) > 0.05, "the case shows nothing"


def sgd(folder: Path) -> Path:
    """An overlay. Adam would blow up gradients that are zero but for rounding."""
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
    path = folder / "sgd.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": optimizer}}}))
    return path


def assert_same(ours: dict, theirs: dict) -> None:
    """The same scores with the same intervals, but for the rounding of sums and of base + delta."""
    for row in ("base", "individual", "merged"):
        for task in WORDS:
            assert ours["scores"][row][task] == pytest.approx(theirs["scores"][row][task], rel=1e-5), (row, task)
            assert ours["intervals"][row][task] == pytest.approx(theirs["intervals"][row][task], rel=1e-5)
