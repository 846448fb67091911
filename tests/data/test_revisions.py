"""Versions of data sets and pretrained models on the hub: asked for, or refused where there are none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import hub
from helpers.sample_rows import BASE
from helpers.tiny import save_tiny_bert
from lightning_drm import TransformerTask
from lightning_drm.data import ImageTask, TextTask

LOADS = """
from datasets.exceptions import DatasetNotFoundError

from lightning_drm import TransformerTask
from lightning_drm.data import TextTask

TransformerTask("org/base", num_classes=2, pooling="mean", revision="of-the-model")
task = TextTask("org/rows", "org/base", revision="of-the-rows", pretrained_revision="of-the-tokenizer")
task.tokenizer
try:
    task.load()
except DatasetNotFoundError as error:  # the hub has models only
    assert "org/rows" in str(error), error
"""


@pytest.mark.processes
def test_the_hub_is_asked_for_them(tmp_path: Path):
    folder = Path(save_tiny_bert(tmp_path / "base"))
    server = hub.serve()
    handler = server.RequestHandlerClass
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    handler.repositories |= {"org/base": {}, "org/base@of-the-model": files, "org/base@of-the-tokenizer": files}
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", LOADS], env=environment, capture_output=True, text=True, timeout=300)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    asked = [line.split()[1] for line in handler.log]
    versions = {path.rpartition("/")[2] for path in asked if path.startswith("api/models/org/base/revision/")}
    assert versions == {"of-the-model", "of-the-tokenizer"}
    assert "datasets/org/rows/resolve/of-the-rows/README.md" in asked
    assert not [path for path in asked if "main" in path.split("/")]


def test_what_is_on_this_machine_has_none(tmp_path: Path, reviews: Path):
    base = save_tiny_bert(tmp_path / "base")
    local = {"csv": {"data_files": str(reviews)}, str(reviews): {}, str(tmp_path): {}}
    for dataset, options in local.items():
        with pytest.raises(ValueError, match=r"is read from files: leave out 'v1'"):
            TextTask(dataset, base, revision="v1", **options).load()
    with pytest.raises(ValueError, match=r"is on this machine: leave out 'v1'"):
        TextTask(str(reviews), base, pretrained_revision="v1").load_tokenizer()
    with pytest.raises(ValueError, match=r"is on this machine: leave out 'v1'"):
        _ = ImageTask(str(tmp_path), BASE, pretrained_revision="v1").encoder
    with pytest.raises(ValueError, match=r"is on this machine: leave out 'v1'"):
        TransformerTask(base, num_classes=2, revision="v1")
