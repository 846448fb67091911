"""Files and folders that are whole or not there, with writers that are killed or work at the same time."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from helpers.faults import largest_file
from lightning_drm.storage import WriteError, write_tensors, written_whole

FORK = multiprocessing.get_context("fork")


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    with written_whole(file) as place:
        place.write_text("old")
    with pytest.raises(UnicodeEncodeError), written_whole(file) as place:
        place.write_text("half \ud800", encoding="utf-8")
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with written_whole(tmp_path / "model") as place:
            place.mkdir()
            (place / name).touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def killed_half_way(path: Path) -> None:
    with written_whole(path) as place:
        place.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.processes
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "deltas.safetensors"
    writer = FORK.Process(target=killed_half_way, args=(path,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    write_tensors(path, {"x": torch.ones(2)})
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_file(path)["x"], torch.ones(2))


def test_what_others_are_writing_stays(tmp_path: Path) -> None:
    here, elsewhere = f".file.{socket.gethostname()}-{os.getppid()}", ".file.elsewhere-1"
    old = ".file.elsewhere-2"
    for name in (here, elsewhere, old):
        (tmp_path / name).mkdir()
    yesterday = time.time() - 2 * 86400
    os.utime(tmp_path / old, (yesterday, yesterday))
    with written_whole(tmp_path / "file") as place:
        place.touch()
    assert {path.name for path in tmp_path.iterdir()} == {here, elsewhere, "file"}


def fill(place: Path) -> None:
    place.symlink_to("/dev/full")
    place.write_text("content")


def test_a_device_that_is_full_is_named(tmp_path: Path) -> None:
    """``/dev/full`` takes no byte, as a full disk does."""
    with pytest.raises(WriteError) as refused, written_whole(tmp_path / "file") as place:
        fill(place)
    assert str(refused.value) == f"{tmp_path / 'file'} could not be written: No space left on device."
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["torch", "safetensors", "text", "matplotlib"])
def test_what_libraries_hide_is_found(tmp_path: Path, library: str) -> None:
    writers = {
        "torch": lambda place: torch.save({"x": torch.ones(9999)}, place),
        "safetensors": lambda place: save_file({"x": torch.ones(9999)}, place),
        "text": lambda place: place.write_text("x" * 9999),
        "matplotlib": lambda place: Figure().savefig(place, format="png"),
    }
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(WriteError) as refused, largest_file(500), written_whole(path) as place:
        writers[library](place)
    assert str(refused.value).startswith(f"{path} could not be written: ")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_about_other_things_stay_as_they_are(tmp_path: Path) -> None:
    for error in (ValueError("a mistake"), RuntimeError("a bug"), KeyError("a bug"), OSError("not the system's")):
        with pytest.raises(type(error)) as same, written_whole(tmp_path / "file"):
            raise error
        assert same.value is error
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "file"):
        (tmp_path / "another").read_text()


def test_a_folder_stays_where_a_file_would_replace_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    with pytest.raises(WriteError, match="taken could not be written: Is a directory"):
        write_tensors(tmp_path / "taken", {"x": torch.ones(2)})
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "something"]
