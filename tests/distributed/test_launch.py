"""However processes are started, the death of one ends all within a minute, and somebody names it.

`tests/checkpoints/test_several_processes.py` kills the first process that srun starts, and test_ranks the last one that
torchrun starts.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.ranks import SRUN, slurm_job

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).with_name("launched.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
COMMANDS = {
    "devices": [sys.executable, SCRIPT],
    "torchrun": [sys.executable, *TORCHRUN, SCRIPT],
    "srun": [SRUN, sys.executable, SCRIPT],
}
NAMED = {
    "devices": r"lightning-drm: Rank {victim} \(process {pid}\) was ended by SIGKILL, so the other ranks ended too\. "
    r"What they wrote is kept: give the same command again, with any number of processes\.\n",
    "torchrun": r"(?s).*rank +: {victim} .*exitcode +: -9 \(pid: {pid}\).*Signal 9 \(SIGKILL\).*",
    "srun": r"lightning-drm: Rank {victim} \(process {pid} on .+\) died without an error message, so the other ranks "
    r"ended too\. What they wrote is kept: .+\n",
}


def end_of(launcher: str, folder: Path, deed: str, victim: str) -> tuple[int, str]:
    """The exit code of two processes, and what they printed as errors."""
    variables = slurm_job(2) if launcher == "srun" else {}
    command = [*COMMANDS[launcher], folder, deed, victim, *(["2"] if launcher == "devices" else [])]
    own = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=300)
    assert time.time() - max(file.stat().st_mtime for file in folder.glob("*.pid")) < 60
    return done.returncode, done.stderr


@pytest.mark.parametrize(("launcher", "victim"), [("devices", "0"), ("devices", "1"), ("torchrun", "0"), ("srun", "1")])
def test_a_killed_process_ends_the_others_and_is_named(launcher: str, victim: str, tmp_path: Path):
    code, said = end_of(launcher, tmp_path, "dies", victim)
    assert code == {"devices": 2, "torchrun": 1, "srun": 9}[launcher]
    pid = (tmp_path / f"{victim}.pid").read_text()
    assert re.fullmatch(NAMED[launcher].format(victim=victim, pid=pid), said), said


def test_an_error_of_all_processes_is_said_once(tmp_path: Path):
    code, said = end_of("devices", tmp_path, "fails", "all")
    assert re.fullmatch(r"lightning-drm: NaN on rank \d\.\n", said), said
    assert code == 2
