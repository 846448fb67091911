"""Merges from files on several real processes: the same bytes as one process writes, and what a kill leaves."""

import json
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import models
from safetensors.torch import load_file, save_file

from lightning_drm import DARETIES, DRM, TIES, TaskArithmetic
from lightning_drm.checkpoints.merge import merge_files
from lightning_drm.checkpoints.planning import MismatchPolicy
from lightning_drm.cli import checkpoints
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion import Override, Recipe

SCRIPT = Path(__file__).with_name("merge_on_ranks.py")
SRUN = Path(__file__).parents[2] / "examples" / "slurm" / "local" / "srun"  # a stand-in, which sets what SLURM sets
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PATIENCE = 300  # seconds for processes to import everything, on a machine that does more than this
SIZES = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Rounding depends on the number of threads; the processes that are started have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    base = models.save_llamas(path, **SIZES)
    for seed, task in enumerate("ab", 1):
        models.adapter("llama", base, seed).save_pretrained(path / f"adapter_{task}")
    return path


def contents(output):
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("*")) if file.is_file()}


def environment(**variables):
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def files_of(folder, prefix=""):
    return {"base": str(folder / "base"), "models": {task: str(folder / f"{prefix}{task}") for task in "ab"}}


def options(folder, output, direction="vertical"):
    files = files_of(folder)
    named = [word for task, path in files["models"].items() for word in (f"--models.{task}", path)]
    method = ["--drm.method", "DRM", "--drm.method.direction", direction]  # vertical takes seconds, time for a kill
    return ["merge", "--base", files["base"], *named, "--output", str(output), *method, "--max_shard_size", "8MB"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_processes", [2, 4])
def test_the_number_of_processes_changes_no_bit(num_processes, device, folder, tmp_path):
    overrides = [
        Override("*.0.*q_proj*", rule="base"),
        Override("*up_proj*", split=2),
        Override("*norm*", rule="elect"),
    ]
    recipes = {
        "drm": (Recipe(DRM(density=0.3), {"a": 0.7}, overrides=overrides), MismatchPolicy(dtype="bfloat16"), ""),
        "ties": (Recipe(TIES(0.3)), MismatchPolicy(), ""),
        "dare": (Recipe(DARETIES(0.4)), MismatchPolicy(), ""),
        "adapter": (Recipe(DRM(density=0.5)), MismatchPolicy(rank=4), "adapter_"),
        "from_adapters": (Recipe(TaskArithmetic()), MismatchPolicy(output_format="full"), "adapter_"),
    }
    cases = []
    for name, (recipe, mismatch, prefix) in recipes.items():
        case = {**files_of(folder, prefix), "max_shard_size": "4MB", "device": device}
        merge_files(**case, output=tmp_path / f"{name} alone", recipe=recipe, mismatch=mismatch)
        cases.append({**case, "output": str(tmp_path / name), "recipe": repr(recipe), "mismatch": repr(mismatch)})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [*TORCHRUN, "--nproc_per_node", str(num_processes), SCRIPT, tmp_path / "cases.json"]
    subprocess.run(command, check=True, env=environment(), timeout=PATIENCE)
    for name in recipes:
        assert contents(tmp_path / name) == contents(tmp_path / f"{name} alone"), name
    assert len(list((tmp_path / "ties").glob("*.safetensors"))) > 2
    assert {entry.name.removesuffix(" alone") for entry in tmp_path.iterdir()} == {*recipes, "cases.json"}


@pytest.fixture(scope="module")
def expected(folder):
    recipe = Recipe(DRM("vertical"))
    merge_files(**files_of(folder), output=folder / "expected", recipe=recipe, max_shard_size="8MB")
    return contents(folder / "expected")


@pytest.mark.parametrize("launcher", ["lightning", "srun"])
def test_other_launchers(launcher, folder, expected, tmp_path):
    command = [sys.executable, "-m", "lightning_drm", *options(folder, tmp_path / "out")]
    variables = {}
    if launcher == "lightning":
        command += ["--devices", "2"]
    else:
        command = [SRUN, *command]
        job = {"JOB_ID": str(os.getpid()), "JOB_NAME": "merge", "NODELIST": "localhost", "NODEID": "0"}
        variables = {f"SLURM_{name}": value for name, value in {**job, "NTASKS": "2", "NTASKS_PER_NODE": "2"}.items()}
    own = environment(**variables)
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert contents(tmp_path / "out") == expected
    assert done.stdout.count("Wrote") == 1, "only the first process prints"


def test_an_error_of_one_process_is_said_once_and_ends_all(folder, start_by_hand, tmp_path):
    """The NaN is in one parameter, so one process alone finds it."""
    broken = load_file(folder / "a" / "model.safetensors")
    broken["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(broken, tmp_path / "a.safetensors", {"format": "pt"})
    words = options(folder, tmp_path / "out")
    words[words.index(str(folder / "a"))] = str(tmp_path / "a.safetensors")
    processes = start_by_hand(words, 2)
    assert [process.wait(PATIENCE) for process in processes] == [2, 2]
    lines = "".join((tmp_path / f"{rank}.err").read_text() for rank in range(2)).splitlines()
    said = [line for line in lines if line.startswith("lightning-drm: ")]
    assert len(said) == 1
    assert "NaN" in said[0]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_shares(folder, tmp_path, capsys):
    checkpoints._run([*options(folder, tmp_path / "out")[1:], "--dry_run"], Ranks(0, 2))
    assert "Of 2 shares of the work the largest is 1.0" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_another_number_of_devices_than_processes_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="devices is 3, but 2 processes were started"):
        checkpoints._run([*options(folder, tmp_path / "out")[1:], "--devices", "3"], Ranks(0, 2))


@pytest.fixture
def start_by_hand(tmp_path):
    """Starts with nothing but the variables that PyTorch asks for: nobody ends the others when one is killed."""
    processes = []

    def start(words, size):
        processes.extend(_start(words, size, tmp_path))
        return processes

    yield start
    for process in processes:
        process.kill()
        process.wait()


def _start(words, size, tmp_path):
    with multiprocessing.connection.Listener(("127.0.0.1", 0)) as free:
        port = free.address[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(size):
        with (tmp_path / f"{rank}.err").open("w") as errors:
            command = [sys.executable, "-m", "lightning_drm", *words]
            own = environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared)
            processes.append(subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=errors))
    return processes


def in_the_middle(output, rank):
    """Waits until a process has written some of its parameters."""
    journal = output.with_name(f".{output.name}.partial") / f".journal.jsonl.{rank}"
    deadline = time.monotonic() + PATIENCE
    while not journal.is_file() or journal.read_text().count("\n") < 4:
        assert time.monotonic() < deadline, "it has not started to write"
        time.sleep(0.01)


@pytest.mark.parametrize(("victim", "size"), [(0, 2), (1, 3)])
def test_a_killed_process_is_named_by_the_others(victim, size, folder, expected, start_by_hand, tmp_path):
    processes = start_by_hand(options(folder, tmp_path / "out"), size)
    in_the_middle(tmp_path / "out", victim)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    others = [process for process in processes if process is not processes[victim]]
    assert [process.wait(60) for process in others] == [2] * (size - 1)
    assert time.monotonic() - killed < 60
    said = "".join((tmp_path / f"{rank}.err").read_text() for rank in range(size))
    assert f"lightning-drm: Rank {victim} (process {processes[victim].pid} on " in said
    assert "Traceback" not in said
    result = merge_files(
        **files_of(folder), output=tmp_path / "out", recipe=Recipe(DRM("vertical")), max_shard_size="8MB"
    )
    assert result.num_resumed >= 4, "another number of processes takes up what all of them wrote"
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*")), "locks and partial folders are gone"


def test_torchrun_ends_all_when_one_is_killed(folder, expected, tmp_path):
    command = [*TORCHRUN, "--nproc_per_node", "2", "-m", "lightning_drm", *options(folder, tmp_path / "out")]
    started = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    in_the_middle(tmp_path / "out", 1)
    children = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, errors = started.communicate(timeout=60)
    assert started.returncode
    assert "Signal 9 (SIGKILL)" in errors
    again = subprocess.run(command, env=environment(), timeout=PATIENCE, capture_output=True, text=True, check=True)
    assert again.stdout.count("Took up an interrupted merge") == 1
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*"))


def test_two_merges_into_one_folder(folder, expected, tmp_path):
    merge = {**files_of(folder), "output": tmp_path / "out", "recipe": Recipe(DRM("vertical")), "max_shard_size": "8MB"}
    first = multiprocessing.get_context("fork").Process(target=merge_files, kwargs=merge)
    first.start()
    in_the_middle(tmp_path / "out", 0)
    with pytest.raises(ValueError, match=r"Another process is merging into .*out: wait until"):
        merge_files(**merge, overwrite=True)
    first.join()
    assert first.exitcode == 0
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".*"))
