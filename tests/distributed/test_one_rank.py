"""DDP with one process: what many do, on a single GPU, against a fit without DDP on the same device."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(
    backend: str, launch: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    found = tmp_path_factory.mktemp(f"one_rank_{backend}")
    launch([Path(__file__).with_name("one_rank.py"), found], BACKEND=backend)
    return found


def test_the_merged_model_is_that_of_a_fit_without_it(folder: Path):
    ours, theirs = (load_file(folder / f"{name}.safetensors") for name in ("ddp", "alone"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    scores = [json.loads((folder / f"{name}.json").read_text()) for name in ("ddp", "alone")]
    assert scores[0] == scores[1]


def test_the_meeting_takes_tensors_of_host_and_device(folder: Path, backend: str):
    assert json.loads((folder / "met.json").read_text()) == {
        "backend": backend,
        "gathered": ["x"],
        "sum": [1.0, 1.0],
        "copies": [[1.0] * 3] * 3,
    }
