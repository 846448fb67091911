"""One process at a time: held, freed, and freed by a kill."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from lightning_drm.storage import only_one

FORK = multiprocessing.get_context("fork")


def hold(path: Path, held: "multiprocessing.synchronize.Event", end: "multiprocessing.synchronize.Event") -> None:
    with only_one(path, "at it"):
        held.set()
        end.wait(60)


@pytest.mark.processes
@pytest.mark.parametrize("killed", [False, True])
def test_another_process_is_refused_until_the_holder_ends(tmp_path: Path, killed: bool) -> None:
    path, held, end = tmp_path / "new" / "out", FORK.Event(), FORK.Event()
    holder = FORK.Process(target=hold, args=(path, held, end))
    holder.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match="Another process is at it: wait until it has ended"), only_one(path, "at it"):
        pass
    if killed:
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
    else:
        end.set()
    holder.join()
    with only_one(path, "at it"):
        assert [entry.name for entry in path.parent.iterdir()] == [".out.lock"]
    assert not any(path.parent.iterdir())
