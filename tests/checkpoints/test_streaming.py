"""Shards written tensor by tensor: what a kill leaves, and what the next run makes of it."""

import json
import multiprocessing
import os
import random
import shutil
import signal
from functools import cache
from threading import Event, Lock, Timer

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import models
from lightning_drm import DRM, TIES, merge_checkpoints
from lightning_drm.checkpoints.reading import TensorHeader
from lightning_drm.checkpoints.writing.shards import ShardWriter
from lightning_drm.fusion.read_ahead import read_ahead

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("streaming")
    models.save_llamas(path, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    return path


METHOD = DRM(density=0.3)


def merge(folder, output, method=METHOD):
    paths = {task: folder / task for task in "ab"}
    return merge_checkpoints(folder / "base", paths, output, method, max_shard_size="150KB")


def contents(output):
    return {file.name: file.read_bytes() for file in sorted(output.rglob("*")) if file.is_file()}


def killed(folder, num_writes, delay):
    """A merge in a forked process that is killed `delay` seconds after it began to write so many tensors.

    No more tensors are written meanwhile, so that it is never done before, however busy the machine is.
    """

    def merge_until():
        write, count = ShardWriter.write, iter(range(1, 1000))

        def last(self, *arguments):
            number = next(count)
            if number == num_writes:
                Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            if number > num_writes:
                Event().wait()
            write(self, *arguments)

        ShardWriter.write = last
        merge(folder, folder / "out")

    child = multiprocessing.get_context("fork").Process(target=merge_until)
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(folder):
    """By method, the files of a merge that nothing disturbed; each is made once."""

    @cache
    def files(method):
        output = folder / f"undisturbed {method!r}"
        merge(folder, output, method)
        return contents(output)

    return files


@pytest.mark.processes
def test_killed_at_random_moments(folder, undisturbed):
    expected = undisturbed(METHOD)
    assert sum(name.endswith(".safetensors") for name in expected) > 2
    num_tensors = sum(len(load_file(file)) for file in (folder / "base").glob("*.safetensors"))
    draws = random.Random(0)
    num_resumed = []
    for num_writes in [1, num_tensors - 1, *draws.choices(range(1, num_tensors), k=6)]:
        assert killed(folder, num_writes, delay=draws.uniform(0, 0.005))
        assert not (folder / "out").exists()
        num_resumed.append(merge(folder, folder / "out").num_resumed)
        assert num_resumed[-1] <= num_writes
        assert contents(folder / "out") == expected
        assert not (folder / ".out.partial").exists()
        shutil.rmtree(folder / "out")
    assert any(num_resumed)


@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize("method", [METHOD, TIES(0.3)])
def test_taken_up_after_some_tensors(after, method, folder, undisturbed, tmp_path, monkeypatch):
    """Stops at a known point, so that what is taken up can be counted."""
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", stops(after))
        with pytest.raises(KeyboardInterrupt):
            merge(folder, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()
    assert merge(folder, tmp_path / "out", method).num_resumed == after
    assert contents(tmp_path / "out") == undisturbed(method)


def test_what_an_interrupted_merge_wrote_is_not_asked_of_the_disk_again(folder, tmp_path, monkeypatch):
    interrupted(folder, tmp_path / "out", monkeypatch)
    held = sum(file.stat().st_blocks * 512 for file in (tmp_path / ".out.partial").iterdir())
    needed = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    assert 0 < held < needed
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk._replace(free=0))
    with pytest.raises(ValueError, match="but its disk has"):
        merge(folder, tmp_path / "out")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: disk._replace(free=needed + (32 << 20) - held)
    )  # and what comes and goes beside them
    assert merge(folder, tmp_path / "out").num_resumed > 0


def stops(after):
    """`ShardWriter.write`, which several threads call, but interrupted after so many tensors."""
    write, count, lock = ShardWriter.write, iter(range(1000)), Lock()

    def stop(self, *arguments):
        with lock:
            if next(count) >= after:
                raise KeyboardInterrupt
        write(self, *arguments)

    return stop


def interrupted(folder, output, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", stops(9))
        with pytest.raises(KeyboardInterrupt):
            merge(folder, output)


def test_bytes_that_were_damaged_are_written_again(folder, undisturbed, tmp_path, monkeypatch):
    interrupted(folder, tmp_path / "out", monkeypatch)
    partial = tmp_path / ".out.partial"
    record = json.loads((partial / ".journal.jsonl.0").read_text().splitlines()[1])
    for shard in partial.glob("*.safetensors"):
        damaged = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(damaged[:8], "little")
        place = json.loads(damaged[8:start]).get(record["name"])
        if place:
            damaged[start + place["data_offsets"][1] - 1] ^= 1
            shard.write_bytes(damaged)
    with (partial / ".journal.jsonl").open("a") as journal:
        journal.write('{"name": "model.norm.we')  # as a kill would cut it
    result = merge(folder, tmp_path / "out")
    assert result.num_resumed == 8
    assert contents(tmp_path / "out") == undisturbed(METHOD)


def test_another_merge_is_not_taken_up(folder, tmp_path, monkeypatch):
    interrupted(folder, tmp_path / "out", monkeypatch)
    paths = {task: str(folder / task) for task in "ab"}
    result = merge_checkpoints(folder / "base", paths, tmp_path / "out", DRM(density=0.4))
    assert result.num_resumed == 0


def test_overwrite_replaces(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    paths = {task: str(folder / task) for task in "ab"}
    merge_checkpoints(folder / "base", paths, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_shards_of_all_types(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "double": torch.randn(3, 2).double(),
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "flag": torch.tensor(True),
        "count": torch.tensor(7),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
    }
    headers = {name: TensorHeader(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    writer = ShardWriter(tmp_path / "out", headers, "5GB", "x")
    assert sorted(writer.order) == sorted(tensors)
    for name in writer.order:
        writer.write(name, [tensors[name]])
    writer.finish()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(
        torch.equal(written[name], value) and written[name].dtype == value.dtype for name, value in tensors.items()
    )


def test_read_ahead_keeps_order_and_errors():
    def numbers():
        yield 1
        yield 2
        raise ValueError("third")

    seen = []
    with pytest.raises(ValueError, match="third"):
        seen.extend(read_ahead(numbers()))
    assert list(read_ahead([])) == []
    taken = read_ahead(iter(range(10)))
    assert [next(taken), next(taken)] == [0, 1]


def test_inputs_that_change_meanwhile_are_noticed(folder, tmp_path, monkeypatch):
    """As those of a run folder do, when a fit writes into it."""
    shutil.copytree(folder / "a", tmp_path / "a")
    changed = {name: value + 1 for name, value in load_file(folder / "a" / "model.safetensors").items()}
    write = ShardWriter.write

    def change_and_write(self, *arguments):
        save_file(changed, tmp_path / "a" / "model.safetensors", {"format": "pt"})
        write(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write", change_and_write)
    paths = {"a": str(tmp_path / "a"), "b": str(folder / "b")}
    with pytest.raises(ValueError, match="The files of a were changed while they were merged"):
        merge_checkpoints(folder / "base", paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
