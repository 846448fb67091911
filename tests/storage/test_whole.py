"""Files and folders that are whole or not there, with writers that are killed or work at the same time."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_drm.storage import write_tensors, written_whole

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
