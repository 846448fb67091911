"""Nothing stays in memory: of a hundred fits and of fifty merges in one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

MOST = 5.0  # MB


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("growth")
    subprocess.run([sys.executable, Path(__file__).with_name("growth.py"), folder], check=True, timeout=300)
    return json.loads((folder / "growth.json").read_text())


@pytest.mark.parametrize("what", ["fits", "merges"])
def test_what_is_done_many_times_leaves_nothing_behind(grown: dict[str, float], what: str):
    assert grown[what] <= MOST
