"""The command line with Lightning's launcher, which starts the other processes itself, against a single process.

The strategies are those of ``configs/strategy``, with two processes, on the CPU or on GPUs.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from helpers.devices import require_gpus

pytestmark = pytest.mark.processes

Launch = Callable[..., subprocess.CompletedProcess[str]]
STRATEGIES = Path(__file__).parents[2] / "configs/strategy"


def overlay(strategy: str, backend: str, folder: Path) -> Path:
    """The shipped overlay, with the sizes changed to two processes, as its comment says."""
    content = yaml.safe_load((STRATEGIES / f"{strategy}.yaml").read_text())
    content["trainer"] |= {"accelerator": {"gloo": "cpu", "nccl": "gpu"}[backend], "devices": 2}
    if strategy == "fsdp" and backend == "gloo":
        content["trainer"]["strategy"] = {"class_path": "helpers.on_cpu.FSDPOnCPU"}
    if strategy == "fsdp2":
        content["trainer"]["strategy"]["init_args"]["data_parallel_size"] = 2
    path = folder / f"{strategy}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def config(inputs: Path) -> Path:
    """What `together.py` does, as a configuration for 2 processes."""
    base = str(inputs / "base")
    texts = {"dataset": str(inputs / "texts.csv"), "pretrained": base, "batch_size": 4, "eval_batch_size": 3}
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}}
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_drm.TransformerTask",
            "init_args": {"backbone": base, "pooling": "mean", "optimizer": optimizer},
        },
        "data": {
            "tasks": {
                "texts": {"class_path": "lightning_drm.data.TextTask", "init_args": texts},
                "tokens": {"class_path": "helpers.tiny.Tokens", "init_args": {"batch_size": 4}},
            }
        },
        "drm": {"method": {"class_path": "lightning_drm.Average"}},
        "trainer": {
            "max_epochs": 2, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False,
            "enable_model_summary": False, "enable_progress_bar": False,
        },
    }  # fmt: skip
    path = inputs / "launched.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module", params=["ddp", "fsdp", "fsdp2"])
def launched(
    request: pytest.FixtureRequest, config: Path, backend: str, launch: Launch
) -> tuple[list[object], Path, str]:
    """The arguments of a run, its folder after ``fit``, and what was printed."""
    require_gpus(backend, 2)
    folder = config.parent / f"launched_{backend}_{request.param}"
    arguments = [
        "--config",
        config,
        "--config",
        overlay(request.param, backend, config.parent),
        "--drm.dirpath",
        folder,
    ]
    return arguments, folder, launch(["-m", "lightning_drm", "fit", *arguments]).stdout


def accuracies(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())["accuracy"]


def test_fit_gives_what_one_process_gives(alone: Path, launched: tuple[list[object], Path, str]):
    _, folder, printed = launched
    for file in ("tasks/texts/deltas", "tasks/tokens/deltas", "tasks/tokens/head", "merged/model"):
        ours, theirs = (load_file(run / f"{file}.safetensors") for run in (folder, alone / "alone_full"))
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 2e-6, file
    assert accuracies(folder) == accuracies(alone / "alone_full")
    assert printed.count("Report: ") == 1, "one process speaks"


def test_merge_starts_processes_too(alone: Path, config: Path, backend: str, launch: Launch, tmp_path: Path):
    """What one process finetuned, merged by two, is to the bit what one merges."""
    require_gpus(backend, 2)
    shutil.copytree(alone / "alone_full", tmp_path / "run", ignore=shutil.ignore_patterns("merged", "report*"))
    method = ["--drm.method", "TIES", "--drm.method.density", "0.4", "--drm.dirpath", tmp_path / "run"]
    files = ["--config", config, "--config", overlay("ddp", backend, tmp_path)]
    launch(["-m", "lightning_drm", "merge", *files, *method])
    assert (tmp_path / "run/merged/model.safetensors").read_bytes() == (
        alone / "again_ties/merged/model.safetensors"
    ).read_bytes()
    assert accuracies(tmp_path / "run") == accuracies(alone / "again_ties")


def test_test_measures_the_same_again(launched: tuple[list[object], Path, str], launch: Launch):
    arguments, folder, _ = launched
    before = accuracies(folder)
    (folder / "report.json").unlink()
    launch(["-m", "lightning_drm", "test", *arguments])
    assert accuracies(folder) == before
