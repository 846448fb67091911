"""The run folder: what is done, and files that are whole."""

import json
from pathlib import Path

import pytest
import torch

from lightning_drm.deltas import TaskVector
from lightning_drm.evaluation import Score
from lightning_drm.kinds import MetricInfo
from lightning_drm.storage import write_json, write_text
from lightning_drm.training.run_folder import RunFolder


def test_a_task_is_done_once_its_metrics_are_there(tmp_path: Path, vectors: list[TaskVector]) -> None:
    folder = RunFolder(tmp_path / "run")
    tasks = ["zeta", "alpha"]
    assert folder.missing(tasks) == tasks
    folder.save_task_vector(vectors[0])
    assert not folder.is_done("zeta")
    half = Score(0.5, MetricInfo("perplexity", higher_is_better=False), (0.25, 0.75))
    folder.write_metrics("zeta", {"individual": half, "base": None})
    assert folder.is_done("zeta")
    assert folder.missing(tasks) == ["alpha"]
    assert folder.read_metrics("zeta") == {"individual": half, "base": None}
    assert json.loads((tmp_path / "run" / "tasks" / "zeta" / "metrics.json").read_text())["individual"] == 0.5


def test_a_new_finetune_is_not_done_with_the_old_metrics(tmp_path: Path, vectors: list[TaskVector]) -> None:
    folder = RunFolder(tmp_path)
    folder.save_task_vector(vectors[0])
    folder.write_metrics("zeta", {"individual": Score(0.5, MetricInfo("accuracy")), "base": None})
    folder.save_task_vector(vectors[0])
    assert not folder.is_done("zeta")


def test_task_vectors_come_back(tmp_path: Path, vectors: list[TaskVector]) -> None:
    folder = RunFolder(str(tmp_path))
    folder.save_task_vector(vectors[1])
    loaded = folder.load_task_vector("alpha")
    assert loaded.task == "alpha"
    assert torch.equal(loaded.deltas["embed.weight"], vectors[1].deltas["embed.weight"])
    with pytest.raises(FileNotFoundError, match="no deltas of task 'zeta': finetune it first"):
        folder.load_task_vector("zeta")


def test_paths(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.merged == tmp_path / "run" / "merged"
    assert folder.task("a.b") == tmp_path / "run" / "tasks" / "a.b"
    assert folder.base_head("a.b").parent == folder.task("a.b")
    assert not (tmp_path / "run").exists(), "asking for paths makes no folder"


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_json(path, {"a": "ü", "b": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü", "b": [1, None]}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "should hold a JSON object, but holds"),
        ('{"individual": 0.5', "is not JSON that can be read"),
        ('{"base": 0.5}', "expected a number for individual, got None"),
        ('{"individual": "x"}', "expected a number for individual, got 'x'"),
        ('{"individual": 0.5, "base": true}', "expected a number for base, got True"),
    ],
)
def test_damaged_metrics_are_named(text: str, message: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_text(folder.task("zeta") / "metrics.json", text)
    with pytest.raises(ValueError, match=f"tasks/zeta/metrics.json:? {message}"):
        folder.read_metrics("zeta")
