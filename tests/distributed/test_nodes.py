"""Two nodes of two processes each give what one process gives, and the end of a node ends the other one.

The nodes are network namespaces: a loopback reaches no other node, and no name server knows the hostnames. All that the
processes know of the network is ``NCCL_SOCKET_IFNAME``, and where torchrun meets.
"""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from distributed.compared import largest_difference, require_average_of_stored
from helpers import models
from helpers.nodes import CABLE, PROCESSES, Node, NoNodesError, torchrun, two_nodes
from helpers.tiny import save_run_config
from lightning_drm.distributed import watch

pytestmark = pytest.mark.processes

HERE = Path(__file__).parent
TASKS = ("texts", "tokens")
PATIENCE = 300  # seconds for four processes to import everything and do their work
MINUTE = 60
Nodes = tuple[Node, Node]
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_nodes())
        except NoNodesError as error:
            pytest.skip(f"This machine makes no network namespaces. {error}")
        yield made


@pytest.fixture(scope="module")
def settings(environment: dict[str, str]) -> dict[str, str]:
    known = {name: value for name, value in environment.items() if name != "GLOO_SOCKET_IFNAME"}
    return {**known, "NCCL_SOCKET_IFNAME": CABLE, "BACKEND": "gloo"}


def end_code(started: ForkServerProcess, patience: float = PATIENCE) -> int | None:
    started.join(patience)
    return started.exitcode


def printed_by(prints: Path, *nodes: Node) -> str:
    """What nodes printed."""
    return "\n".join((prints / f"{node.name}.{stream}").read_text() for node in nodes for stream in ("out", "err"))


def require_success(started: list[ForkServerProcess], prints: Path, nodes: Nodes) -> str:
    """Waits for all nodes; returns what they printed."""
    codes = [end_code(each) for each in started]
    printed = printed_by(prints, *nodes)
    assert codes == [0, 0], printed[-6000:]
    return printed


def require_named(survivor: Node, victim: Node, prints: Path, advice: str) -> None:
    """A process that survived names one on the node that did not."""
    ranks = "".join(str(victim.number * PROCESSES + each) for each in range(PROCESSES))
    sentence = (
        rf"^lightning-drm: Rank [{ranks}] \(process \d+ on {victim.name}\) died without an error message, so the other "
        rf"ranks ended too\. {advice}$"
    )
    printed = printed_by(prints, survivor)
    assert re.search(sentence, printed, re.MULTILINE), printed[-6000:]


@pytest.fixture(scope="module")
def folder(inputs: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves."""
    path = tmp_path_factory.mktemp("nodes")
    shutil.copytree(inputs / "base", path / "base")
    shutil.copy(inputs / "texts.csv", path)
    launch([HERE / "on_nodes.py", path], BACKEND="gloo")
    return path


def test_fit_merge_and_test_give_what_one_process_gives(
    folder: Path, nodes: Nodes, settings: dict[str, str], tmp_path: Path
):
    require_success(torchrun(nodes, "c10d", [HERE / "on_nodes.py", folder], settings, tmp_path), tmp_path, nodes)
    for strategy in ("ddp", "fsdp2"):
        ours, theirs = folder / f"gloo4/{strategy}_full", folder / "gloo1/alone_full"
        for file in (*(f"tasks/{task}/{part}" for task in TASKS for part in ("deltas", "head")), "merged/model"):
            tensors = [load_file(run / f"{file}.safetensors") for run in (ours, theirs)]
            assert largest_difference(*tensors) < 2e-6, file  # batches are divided in another way
        require_average_of_stored(ours, folder / "base", TASKS)
        again = [folder / f"gloo{size}/{name}_again" for size, name in ((4, strategy), (1, "alone"))]
        assert largest_difference(*(load_file(run / "merged/model.safetensors") for run in again)) == 0
        for pair in ((ours, theirs), again):
            scores, expected = (json.loads((run / "report.json").read_text())["scores"] for run in pair)
            assert scores == expected


def save_nodes_config(folder: Path) -> Path:
    """A fit on both nodes that pauses, the first time, in the training of the second task."""
    path = save_run_config(folder)
    content = yaml.safe_load(path.read_text())
    done = folder / "run/tasks/color/metrics.json"
    pause = {"after": str(done), "reached": str(folder / "reached")}
    content["trainer"] |= {
        "devices": PROCESSES,
        "num_nodes": 2,
        "strategy": "ddp",
        "logger": False,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "helpers.signals.PauseOnce", "init_args": pause}],
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def wait_for(file: Path, prints: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < deadline, [each.read_text()[-3000:] for each in prints.glob("*.err")]
        time.sleep(0.1)


def test_a_node_that_dies_in_training_ends_the_other_and_the_run_goes_on(
    nodes: Nodes, settings: dict[str, str], tmp_path: Path
):
    """The node of rank 0, where the others look for each other."""
    fit = ["-m", "lightning_drm", "fit", "--config", save_nodes_config(tmp_path)]
    started = torchrun(nodes, "c10d", fit, settings, tmp_path)
    wait_for(tmp_path / "reached", tmp_path)
    victim, survivor = nodes
    victim.kill()
    assert (end_code(started[1], MINUTE) or 0) > 0
    assert end_code(started[0], MINUTE) == -signal.SIGKILL
    require_named(survivor, victim, tmp_path, r"What was finished is kept: the same command continues\.")
    before = (tmp_path / "run/tasks/color/deltas.safetensors").stat()
    printed = require_success(torchrun(nodes, "c10d", fit, settings, tmp_path), tmp_path, nodes)
    assert "color: finetuned before" in printed
    assert (tmp_path / "run/tasks/color/deltas.safetensors").stat() == before
    assert (tmp_path / "run/merged/model.safetensors").exists()
    assert json.loads((tmp_path / "run/report.json").read_text())["scores"]["merged"].keys() == {
        "color",
        "pet",
        "average",
    }


def merge_of(files: Path, output: Path) -> list[object]:
    named = [word for task in "ab" for word in (f"--models.{task}", files / task)]
    method = ["--drm.method", "DRM", "--drm.method.direction", "vertical", "--max_shard_size", "8MB"]
    return ["-m", "lightning_drm", "merge", "--base", files / "base", *named, "--output", output, *method]


@pytest.fixture(scope="module")
def files(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models on disk that take seconds to merge, and what one process makes of them."""
    path = tmp_path_factory.mktemp("files")
    models.save_llamas(path, hidden_size=384, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4)
    launch(merge_of(path, path / "alone"))
    return path


def contents(output: Path) -> dict[str, bytes]:
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_merge_of_files_writes_what_one_process_writes(
    rendezvous: str, nodes: Nodes, settings: dict[str, str], files: Path, tmp_path: Path
):
    merge = merge_of(files, tmp_path / "out")
    printed = require_success(torchrun(nodes, rendezvous, merge, settings, tmp_path), tmp_path, nodes)
    assert printed.count("Wrote") == 1, "one process speaks"
    assert contents(tmp_path / "out") == contents(files / "alone")


def test_a_users_own_interface_is_taken_and_one_that_leads_nowhere_is_named(
    nodes: Nodes, settings: dict[str, str], files: Path, tmp_path: Path
):
    loopback = {**settings, "GLOO_SOCKET_IFNAME": "lo"}
    started = torchrun(nodes, "static", merge_of(files, tmp_path / "out"), loopback, tmp_path)
    deadline = time.monotonic() + PATIENCE
    while all(each.exitcode is None for each in started):
        assert time.monotonic() < deadline, "the loopback leads nowhere"
        time.sleep(0.1)
    for node in nodes:  # the other one would wait for ten minutes to be called
        node.kill()
    printed = printed_by(tmp_path, *nodes)
    sentence = (
        rf"^lightning-drm: Rank \d of 4 did not find all others at {nodes[0].address}:29500: Gloo .+127\.0\.0\.1.+\. "
        r"GLOO_SOCKET_IFNAME names the interface between the nodes\.$"
    )
    assert re.search(sentence, printed, re.MULTILINE), printed[-6000:]
    assert not (tmp_path / "out").exists()


def test_a_node_without_network_ends_the_other_and_the_merge_goes_on(
    nodes: Nodes, settings: dict[str, str], files: Path, tmp_path: Path
):
    """Unlike a kill, it closes no connection."""
    probes = watch._PROBES
    assert probes["TCP_KEEPIDLE"] + probes["TCP_KEEPINTVL"] * probes["TCP_KEEPCNT"] < MINUTE, "for users"
    merge = merge_of(files, tmp_path / "out")
    started = torchrun(nodes, "static", [HERE / "short_probes.py", *merge[2:]], settings, tmp_path)
    wait_for(tmp_path / ".out.partial/.journal.jsonl.0", tmp_path)
    survivor, victim = nodes
    victim.pull_cable()
    assert (end_code(started[0], MINUTE) or 0) > 0
    advice = r"What they wrote is kept: give the same command again, with any number of processes\."
    require_named(survivor, victim, tmp_path, advice)
    assert (end_code(started[1], MINUTE) or 0) > 0, "the node itself misses the other one, too"
    victim.do("ip", "link", "set", victim.interface, "up")
    require_success(torchrun(nodes, "static", merge, settings, tmp_path), tmp_path, nodes)
    assert contents(tmp_path / "out") == contents(files / "alone")
