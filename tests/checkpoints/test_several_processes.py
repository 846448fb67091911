"""Merges from files on several real processes: the same bytes as one process writes, and what a kill leaves."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.merge_on_ranks import merge_all
from helpers import models
from helpers.devices import needs_gpu
from helpers.ranks import SRUN, end_codes, slurm_job, start_ranks
from lightning_drm import DARETIES, DRM, TIES, KnOTS, LiNeS, TaskArithmetic, merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy
from lightning_drm.cli import checkpoints
from lightning_drm.cli.main import main
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion import Override, Recipe

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

PATIENCE = 300  # seconds for processes to import everything, on a machine that does more than this
SIZES = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    base = models.save_llamas(path, **SIZES)
    for seed, task in enumerate("ab", 1):
        models.adapter("llama", base, seed).save_pretrained(path / f"adapter_{task}")
    return path


def contents(output):
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("*")) if file.is_file()}


def files_of(folder, prefix=""):
    return {"base": str(folder / "base"), "models": {task: str(folder / f"{prefix}{task}") for task in "ab"}}


def options(folder, output, direction="vertical"):
    files = files_of(folder)
    named = [word for task, path in files["models"].items() for word in (f"--models.{task}", path)]
    method = ["--drm.method", "DRM", "--drm.method.direction", direction]  # vertical takes seconds, time for a kill
    return ["merge", "--base", files["base"], *named, "--output", str(output), *method, "--max_shard_size", "8MB"]


RECIPES = {
    "drm": (
        Recipe(
            DRM(density=0.3),
            {"a": 0.7},
            overrides=[
                Override("*.0.*q_proj*", rule="base"),
                Override("*up_proj*", split=2),
                Override("*norm*", rule="elect"),
            ],
        ),
        MismatchPolicy(dtype="bfloat16"),
        "",
    ),
    "ties": (Recipe(TIES(0.3)), MismatchPolicy(), ""),
    "dare": (Recipe(DARETIES(0.4)), MismatchPolicy(), ""),
    "adapter": (Recipe(DRM(density=0.5)), MismatchPolicy(rank=4), "adapter_"),
    "knots": (Recipe(KnOTS(0.3), overrides=[Override("*up_proj*", split=2)]), MismatchPolicy(), ""),
    "knots_adapter": (Recipe(KnOTS(0.3), {"a": 0.7}), MismatchPolicy(), "adapter_"),
    "core_ties": (Recipe(TIES(0.3, space="core")), MismatchPolicy(), "adapter_"),
    "core_dare": (Recipe(DARETIES(0.6, space="core")), MismatchPolicy(), "adapter_"),
    "lines": (Recipe(LiNeS(TIES(0.3)), {"a": 0.7}), MismatchPolicy(), ""),
    "lines_of_matrices": (Recipe(LiNeS(DRM(density=0.3), beta=0.8)), MismatchPolicy(dtype="bfloat16"), ""),
    "lines_of_adapters": (Recipe(LiNeS(DRM(density=0.5))), MismatchPolicy(rank=4), "adapter_"),
    "from_adapters": (Recipe(TaskArithmetic()), MismatchPolicy(output_format="full"), "adapter_"),
}


def merges(folder, output, device):
    """The arguments of one merge per recipe."""
    return [
        {
            **files_of(folder, prefix),
            "output": str(output / name),
            **vars(recipe),
            **vars(mismatch),
            "max_shard_size": "4MB",
            "device": device,
        }
        for name, (recipe, mismatch, prefix) in RECIPES.items()
    ]


@pytest.fixture(scope="module", params=DEVICES)
def alone(request, folder):
    """What one process writes, and where it computes."""
    output = folder / f"alone on {request.param}"
    output.mkdir()
    for merge in merges(folder, output, request.param):
        merge_checkpoints(**merge)
    return output, request.param


@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_processes_changes_no_bit(size, alone, folder, tmp_path):
    written, device = alone
    (output := tmp_path / "out").mkdir()
    assert end_codes(start_ranks(merge_all, size, tmp_path, merges(folder, output, device)), PATIENCE) == [0] * size
    for name in RECIPES:
        assert contents(output / name) == contents(written / name), name
    assert len(list((output / "ties").glob("*.safetensors"))) > 2
    assert {entry.name for entry in output.iterdir()} == set(RECIPES)


@pytest.fixture(scope="module")
def expected(folder):
    merge_checkpoints(**files_of(folder), output=folder / "expected", method=DRM("vertical"), max_shard_size="8MB")
    return contents(folder / "expected")


def test_an_error_of_one_process_is_said_once_and_ends_all(folder, tmp_path):
    """The NaN is in one parameter, so one process alone finds it."""
    broken = load_file(folder / "a" / "model.safetensors")
    broken["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(broken, tmp_path / "a.safetensors", {"format": "pt"})
    words = options(folder, tmp_path / "out")
    words[words.index(str(folder / "a"))] = str(tmp_path / "a.safetensors")
    assert end_codes(start_ranks(main, 2, tmp_path, words), PATIENCE) == [2, 2]
    lines = "".join((tmp_path / f"{rank}.err").read_text() for rank in range(2)).splitlines()
    said = [line for line in lines if line.startswith("lightning-drm: ")]
    assert len(said) == 1
    assert "NaN" in said[0]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_shares(folder, tmp_path, capsys):
    checkpoints._run([*options(folder, tmp_path / "out")[1:], "--dry_run"], Ranks(0, 2))
    assert "The largest of 2 shares of the work is 1.0" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_another_number_of_devices_than_processes_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="devices is 3, but 2 processes were started"):
        checkpoints._run([*options(folder, tmp_path / "out")[1:], "--devices", "3"], Ranks(0, 2))


def in_the_middle(output, rank):
    """Waits until a process has written some of its parameters."""
    journal = output.with_name(f".{output.name}.partial") / f".journal.jsonl.{rank}"
    deadline = time.monotonic() + PATIENCE
    while not journal.is_file() or journal.read_text().count("\n") < 4:
        assert time.monotonic() < deadline, "it has not started to write"
        time.sleep(0.01)


@pytest.mark.parametrize(("victim", "size"), [(0, 2), (2, 3)])
def test_a_killed_process_is_named_by_the_others(victim, size, folder, expected, tmp_path):
    ranks = start_ranks(main, size, tmp_path, options(folder, tmp_path / "out"))
    in_the_middle(tmp_path / "out", victim)
    ranks[victim].kill()
    assert end_codes(ranks, 60) == [-9 if rank == victim else 2 for rank in range(size)]
    said = "".join((tmp_path / f"{rank}.err").read_text() for rank in range(size))
    assert said.count(f"lightning-drm: Rank {victim} (process {ranks[victim].pid} on ") == 1
    assert "Traceback" not in said
    result = merge_checkpoints(
        **files_of(folder), output=tmp_path / "out", method=DRM("vertical"), max_shard_size="8MB"
    )
    assert result.num_resumed >= 4, "another number of processes takes up what all of them wrote"
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*")), "locks and partial folders are gone"


def test_what_srun_left_is_finished_by_devices(folder, expected, tmp_path):
    """Both of them start the whole command line."""
    merge = [sys.executable, "-m", "lightning_drm", *options(folder, tmp_path / "out")]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([SRUN, *merge], env={**own, **slurm_job(2)}, stderr=subprocess.PIPE, text=True) as srun:
        in_the_middle(tmp_path / "out", 0)
        children = subprocess.run(["pgrep", "-P", str(srun.pid)], capture_output=True, text=True, check=True)
        first = children.stdout.split()[0]
        os.kill(int(first), signal.SIGKILL)
        _, said = srun.communicate(timeout=60)
    assert said.count(f"lightning-drm: Rank 0 (process {first} on ") == 1
    devices = [*merge, "--devices", "2"]
    done = subprocess.run(devices, env=own, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.count("Resumed an interrupted merge") == 1
    assert done.stdout.count("Wrote") == 1, "only the first process prints"
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*"))


def test_two_merges_into_one_folder(folder, expected, tmp_path):
    merge = {**files_of(folder), "output": tmp_path / "out", "method": DRM("vertical"), "max_shard_size": "8MB"}
    first = multiprocessing.get_context("fork").Process(target=merge_checkpoints, kwargs=merge)
    first.start()
    in_the_middle(tmp_path / "out", 0)
    with pytest.raises(ValueError, match=r"Another process is merging into .*out: wait until"):
        merge_checkpoints(**merge, overwrite=True)
    first.join()
    assert first.exitcode == 0
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*"))
