"""Tasks of every kind in one run of the command line, each by its own metric, on 1, 2 and 4 processes."""

import json
import os
from functools import cache
from pathlib import Path

import pytest
import yaml

from helpers.kinds import questions, save_rows, tagged_sentences, texts_with_a_color, texts_with_pets
from helpers.tiny import save_tiny_bert
from helpers.warm import python, torchrun

pytestmark = pytest.mark.processes

GLOBAL_BATCH = 8
METRICS = {
    "color": "matthews_corr_coef",
    "number": "pearson",
    "pets": "f1",
    "tags": "entity_f1",
    "answer": "accuracy",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything in one YAML file. Every number of processes divides the training sets, and none the test sets."""
    folder = tmp_path_factory.mktemp("kinds")
    base = save_tiny_bert(folder / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def task(class_name: str, rows: list[dict], **options: object) -> dict:
        parts = {"train": rows[:120], "validation": rows[120:125], "test": rows[125:]}
        name = options.get("label_column", "tags")
        files = {split: save_rows(folder / f"{name}_{split}.jsonl", part) for split, part in parts.items()}
        settings = {"dataset": "json", "data_files": files, "pretrained": base, "eval_batch_size": 3, **options}
        return {"class_path": f"lightning_drm.data.{class_name}", "init_args": settings}

    def kind(name: str) -> dict:
        return {"class_path": f"lightning_drm.kinds.{name}"}

    texts = texts_with_pets(1, 140)
    matthews = {"class_path": "torchmetrics.classification.MulticlassMatthewsCorrCoef"}
    tasks = {
        "color": task("TextTask", texts_with_a_color(0, 140), label_column="color", metric=matthews),
        "number": task("TextTask", texts, label_column="number", kind=kind("Regression")),
        "pets": task("TextTask", texts, label_column="pets", kind=kind("MultiLabel")),
        "tags": task("TokenTask", tagged_sentences(2, 138)),
        "answer": task("MultipleChoiceTask", questions(3, 138), label_column="answer"),
    }
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_drm.TransformerTask",
            "init_args": {
                "backbone": base,
                "pooling": "mean",
                # Adam would blow up gradients that are zero but for rounding.
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.03, "momentum": 0.9}},
            },
        },
        "data": {"tasks": tasks},
        "drm": {"method": {"class_path": "lightning_drm.Average"}},
        "trainer": {
            "max_steps": 120,
            "limit_val_batches": 0,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def report(config: Path):
    """What a fit on so many processes reports, with the same batches on all of them together."""

    @cache
    def run(size: int) -> dict:
        folder = config.parent / f"run{size}"
        shares = [f"--data.tasks.{task}.init_args.batch_size={GLOBAL_BATCH // size}" for task in METRICS]
        arguments = ["fit", "--config", config, "--drm.dirpath", folder, "--base_batches=100", *shares]
        command = ["-m", "lightning_drm", *arguments]
        if size > 1:
            command += ["--trainer.strategy=ddp", f"--trainer.devices={size}"]
            command = torchrun(["--standalone", f"--nproc_per_node={size}"], command)
        environment = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(config.parent / "cache")}
        done = python(*command, environment={**os.environ, **environment}, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return json.loads((folder / "report.json").read_text())

    return run


def test_every_task_is_judged_by_its_own_metric(report):
    alone = report(1)
    assert {task: metric["name"] for task, metric in alone["metrics"].items()} == METRICS
    assert all(metric["higher_is_better"] for metric in alone["metrics"].values())
    assert min(alone["scores"]["individual"].values()) > 0.5, "each kind is learned"
    assert alone["scores"]["base"].keys() == alone["scores"]["merged"].keys() == {*METRICS, "average"}
    for task in METRICS:
        ratio = alone["scores"]["merged"][task] / alone["scores"]["individual"][task]
        assert alone["normalized"][task] == pytest.approx(ratio)


@pytest.mark.parametrize("size", [2, 4])
def test_scores_are_those_of_one_process(report, size):
    ours, theirs = report(size)["scores"], report(1)["scores"]
    for row in ("base", "individual", "merged"):
        assert ours[row] == pytest.approx(theirs[row], abs=5e-4), row
