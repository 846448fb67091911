"""The peaks that docs/speed.md gives for large models, against what a process holds of a small one on a CPU.

There, device and host are one memory, so all parts add up.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peak_memory
from benchmarks.peak_memory import Parts, Peaks
from lightning_drm.fusion import Recipe

pytestmark = pytest.mark.processes

NOISE = 8e6  # bytes that threads, caches and pages take beside tensors


@pytest.fixture(scope="module", params=["full", "lora"])
def found(request: pytest.FixtureRequest) -> dict[str, object]:
    """The expected parts, and the measured peaks."""
    script = Path(__file__).with_name("peaks.py")
    done = subprocess.run(
        [sys.executable, script, request.param], check=True, capture_output=True, text=True, timeout=300
    )
    return json.loads(done.stdout)


def test_collecting_takes_what_is_counted(found: dict[str, object]):
    parts = Parts(**found["parts"])
    counted = parts.training + parts.held + parts.deltas
    assert counted - NOISE <= found["collecting"] <= counted + parts.difference + NOISE


def test_fusing_takes_what_is_counted(found: dict[str, object]):
    """A method may take less than what is counted for any method on matrices, and never more."""
    parts = Parts(**found["parts"])
    counted = parts.training + parts.held + parts.deltas + parts.merged
    assert counted - NOISE <= found["fusing"] <= counted + parts.merging + NOISE


def test_the_table_in_the_docs_is_what_is_counted():
    lines = (Path(__file__).parents[2] / "docs/speed.md").read_text().splitlines()
    for row in peak_memory.rows(Recipe(), torch.device("cuda")):
        assert f"| {' | '.join(row)} |" in lines


def test_what_has_no_room_on_the_card_goes_to_the_host():
    parts = Parts(weights=10, states=30, held=10, deltas=12, difference=3, merging=5, merged=10)
    assert Peaks.on_card(parts, 67) == Peaks("device", "device", 55, 67, 10)
    assert Peaks.on_card(parts, 66) == Peaks("device", "host", 55, 57, 20)
    assert Peaks.on_card(parts, 54) == Peaks("host", "host", 43, 45, 32)
