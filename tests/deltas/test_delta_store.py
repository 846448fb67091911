"""Task vectors on disk: nothing lost, nothing half written, nothing mistaken for something else."""

import json
import multiprocessing
import os
import signal
import stat
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_drm.deltas import StoredDeltas, TaskVector, fingerprint, load_task_vector, save_task_vector
from lightning_drm.merging import LowRank
from lightning_drm.storage import write_tensors


def make_vector(task: str = "topic") -> TaskVector:
    torch.manual_seed(0)
    return TaskVector(
        task=task,
        deltas={
            "dense.weight": torch.randn(5, 4),
            "lora.weight": LowRank(torch.randn(6, 2), torch.randn(2, 3)),
            "double": torch.randn(3, dtype=torch.float64),
            "scalar": torch.tensor(0.25),
            "transposed": torch.randn(4, 5).T,
            "empty": LowRank(torch.zeros(6, 0), torch.zeros(0, 3)),
        },
        kinds={
            "dense.weight": "matrix", "lora.weight": "matrix", "double": "other", "scalar": "other",
            "transposed": "convolution", "empty": "embedding",
        },
        head={"head.weight": torch.randn(2, 4).bfloat16(), "head.steps": torch.tensor(7)},
        base_hashes={"dense.weight": "ab", "lora.weight": "cd", "frozen": "ef"},
        settings={"lr": 1e-3, "name": "ünïcode", "none": None, "flag": True},
    )  # fmt: skip


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    vector = make_vector()
    save_task_vector(vector, tmp_path / "new" / "folder")
    loaded = load_task_vector(tmp_path / "new" / "folder")
    assert (loaded.task, loaded.kinds, loaded.base_hashes, loaded.settings) == (
        vector.task,
        vector.kinds,
        vector.base_hashes,
        vector.settings,
    )
    assert set(loaded.deltas) == set(vector.deltas)
    assert len(loaded.deltas) == len(vector.deltas)
    for name, delta in vector.deltas.items():
        stored = loaded.deltas[name]
        assert type(stored) is type(delta)
        if isinstance(delta, LowRank):
            assert_same(stored.up, delta.up)
            assert_same(stored.down, delta.down)
        else:
            assert_same(stored, delta)
    assert set(loaded.head) == set(vector.head)
    for name, tensor in vector.head.items():
        assert_same(loaded.head[name], tensor)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "deltas.safetensors",
        "head.safetensors",
    ]


def test_file_says_what_it_is(tmp_path: Path) -> None:
    vector = make_vector()
    save_task_vector(vector, tmp_path)
    with safe_open(tmp_path / "deltas.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["task"] == "topic"
    assert metadata["base_fingerprint"] == fingerprint(vector.base_hashes)
    assert json.loads(metadata["versions"])["torch"] == version("torch")


def test_unknown_parameter_is_a_key_error(tmp_path: Path) -> None:
    save_task_vector(make_vector(), tmp_path)
    deltas = load_task_vector(tmp_path).deltas
    with pytest.raises(KeyError, match="nothing"):
        deltas["nothing"]
    assert deltas.get("nothing") is None
    assert "lora.weight" in deltas
    assert "lora.weight::up" not in deltas


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_honour_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_task_vector(make_vector(), tmp_path)
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_overwriting_replaces(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"old": torch.ones(2)})
    write_tensors(tmp_path / "x.safetensors", {"new": torch.zeros(3)})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["new"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"old": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"meta|storage"):
        write_tensors(path, {"new": torch.empty(3, device="meta")})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.processes
def test_killed_writer_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "deltas.safetensors"
    tensors = {"first": torch.ones(60_000_000), "last": torch.ones(1)}
    writer = multiprocessing.get_context("fork").Process(target=write_tensors, args=(path, tensors))
    writer.start()
    while writer.is_alive() and not any(tmp_path.iterdir()):
        time.sleep(0.0005)
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL, "the writer was faster than the test: nothing is shown"
    assert any(tmp_path.iterdir()), "the writer had not begun"
    assert not path.exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_task_vector(tmp_path)
    save_task_vector(make_vector(), tmp_path)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load_task_vector(tmp_path)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deltas.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"deltas\.safetensors does not hold deltas: expected format '.*', got None"):
        StoredDeltas(path)
    save_file({"weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="got 'pt'"):
        load_task_vector(tmp_path)
    path.write_bytes(b"anything else")
    with pytest.raises(ValueError, match=r"deltas\.safetensors does not hold deltas: it is damaged"):
        StoredDeltas(path)


def test_cut_off_file_is_refused(tmp_path: Path) -> None:
    save_task_vector(make_vector(), tmp_path)
    path = tmp_path / "deltas.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="it is damaged"):
        load_task_vector(tmp_path)
