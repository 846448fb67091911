"""Processes for tests on several ranks, and what they work on."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.devices import require_gpus
from helpers.tiny import COLORS, save_texts, save_tiny_bert
from helpers.warm import python, torchrun

HERE = Path(__file__).parent

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> str:
    """gloo on the CPU, and NCCL on as many GPUs as there are processes."""
    require_gpus(request.param, 1)
    return request.param


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One thread per process, and a cache of its own."""
    added = {
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets")),
    }
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return {**inherited, **added}


@pytest.fixture(scope="session")
def launch(environment: dict[str, str]) -> Launch:
    """Runs a Python script or module, on several processes by torchrun; returns what it printed."""

    def run(
        arguments: Sequence[object], num_processes: int = 1, timeout: float = 300, check: bool = True, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        require_gpus(extra.get("BACKEND", ""), num_processes)
        if num_processes > 1:
            arguments = torchrun(["--standalone", f"--nproc_per_node={num_processes}"], arguments)
        done = python(*arguments, environment={**environment, **extra}, timeout=timeout)
        if check and done.returncode:
            words = " ".join(done.args)
            pytest.fail(f"{words} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done

    return run


@pytest.fixture(scope="session")
def on_two_ranks(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Runs a script on two ranks; returns what each found, which the script leaves in a json file of its rank."""

    def run(script: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(Path(script).stem)
        launch([HERE / script, folder], 2)
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    return run


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pretrained model without dropout, which would differ from rank to rank, and a csv of texts."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_bert(folder / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_texts(folder / "texts.csv", COLORS, seed=1)
    return folder


@pytest.fixture(scope="session")
def alone(inputs: Path, launch: Launch, backend: str) -> Path:
    """What a single process leaves."""
    left = inputs / f"{backend}1"
    if not left.exists():  # the other backend may have come in between, with the tests of another file
        launch([HERE / "together.py", inputs], BACKEND=backend)
    return left
