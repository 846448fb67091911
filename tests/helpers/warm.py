"""Real processes that need not import anything: a server has imported all that tests take, and forks one when asked.

Importing takes an interpreter seconds, and the work of a test often a part of one. What is about starting processes
uses `subprocess`; all else may start here, and ends, is killed and prints like any other process.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "helpers.models",
        "lightning_drm.cli.checkpoints",
        "lightning_drm.cli.trainer",
        "torch.distributed.run",
        "transformers.models.bert.modeling_bert",
        "datasets",
    ]
)


def python(
    *words: object, environment: Mapping[str, str] = os.environ, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run`` gives of ``python`` with these words, a script or ``-m`` and a module, and its output."""
    command = [sys.executable, *map(str, words)]
    (read_out, out), (read_err, err) = CONTEXT.Pipe(duplex=False), CONTEXT.Pipe(duplex=False)
    process = start(words, environment, out, err)
    for end in (out, err):
        end.close()
    with ThreadPoolExecutor(2) as threads:
        texts = [threads.submit(_read, end) for end in (read_out, read_err)]
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(command, timeout, *(text.result() for text in texts))
        return subprocess.CompletedProcess(command, process.exitcode, *(text.result() for text in texts))


def _read(end: Connection) -> str:
    """All that is written to a pipe until the last process that holds it has ended."""
    with open(end.fileno(), encoding="utf-8", closefd=False) as stream:
        return stream.read()


def torchrun(options: Sequence[object], command: Sequence[object]) -> list[object]:
    """Words for `python` that run a command on several ranks, which torchrun forks.

    Args:
        options: Those of torchrun.
        command: What ``python`` would take: a script or ``-m`` and a module, and what follows.
    """
    return ["-m", "torch.distributed.run", "--run-path", "--start-method", "fork", *options, __file__, *command]


def start(
    words: Sequence[object], environment: Mapping[str, str], out: Path | Connection, err: Path | Connection
) -> ForkServerProcess:
    """Starts ``python`` with these words, in a session of its own, as whose leader it can be killed with all below."""
    return fork(interpret, [str(word) for word in words], environment=environment, out=out, err=err)


def fork(
    work: Callable[..., object],
    *arguments: object,
    environment: Mapping[str, str],
    out: Path | Connection,
    err: Path | Connection,
) -> ForkServerProcess:
    """Starts work in a process with these environment variables, whose output goes to two files or pipes."""
    _import_everything()
    process = CONTEXT.Process(target=_work, args=(dict(environment), out, err, work, *arguments))  # may have children
    process.start()
    atexit.register(process.kill)  # or it would be waited for, if a test fails
    return process


@cache
def _import_everything() -> None:
    """Starts the server, so that no test has to be patient with it.

    It sees no GPU: where a process has looked at GPUs, what is forked from it cannot use them.
    """
    first = CONTEXT.Process(target=int)
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):
        first.start()
    first.join()


def _work(
    environment: Mapping[str, str],
    out: Path | Connection,
    err: Path | Connection,
    work: Callable[..., object],
    *arguments: object,
) -> None:
    import datasets
    import torch

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    # What an interpreter reads from its environment as it imports.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if "HF_DATASETS_CACHE" in environment:
        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    for stream, end in ((sys.stdout, out), (sys.stderr, err)):
        own = os.open(end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) if isinstance(end, Path) else end.fileno()
        os.dup2(own, stream.fileno())
        stream.reconfigure(line_buffering=True)
        os.close(own)
    _forget_handlers()
    work(*arguments)


def _forget_handlers() -> None:
    """Signals do what they do in a new interpreter. A shell lets what it runs in the background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interpret(words: Sequence[str]) -> None:
    """Does what ``python`` does with these words."""
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":  # in a rank, which has what it took from torchrun
    _forget_handlers()
    interpret(sys.argv[1:])
