"""Real signals at chosen moments of a fit, and pauses in which to send them."""

import os
import signal
import subprocess
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from helpers.warm import python, start


class SignalAt(Callback):
    """Sends this process signals, once, when a fit has come so far.

    Args:
        signals: Their names, such as ``SIGKILL``; several are sent one after the other.
        done: A file that says that they were sent.
        step: At the end of the batch with this step.
        hook: Or in this hook.
    """

    def __init__(self, signals: list[str], done: str, step: int = -1, hook: str = "on_train_batch_end") -> None:
        self.signals = [signal.Signals[name] for name in signals]
        self.done = Path(done)
        self.step = step
        self.hook = hook

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if self.hook == "on_train_batch_end" and trainer.global_step >= self.step:
            self._send()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.hook == "on_train_end":
            self._send()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.hook == "on_fit_end":
            self._send()

    def _send(self) -> None:
        if self.done.exists():
            return
        self.done.touch()
        for signum in self.signals:
            os.kill(os.getpid(), signum)


class SignalAll(Callback):
    """Rank 0 sends a signal to all processes of its session before a batch, when the others wait for its gradients.

    Args:
        name: The signal's name.
        step: The batch's step.
    """

    def __init__(self, name: str, step: int) -> None:
        self.signal, self.step = signal.Signals[name], step

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == self.step:
            time.sleep(2)
            os.killpg(0, self.signal)


def run_cli(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return python("-m", "lightning_drm", *words, environment=own_environment(**environment))


def start_cli(*words: str, folder: Path) -> ForkServerProcess:
    """Starts the command line in a process of its own; it prints to files in a folder."""
    return start(["-m", "lightning_drm", *words], own_environment(), folder / "out", folder / "err")


def own_environment(**more: str) -> dict[str, str]:
    """As many threads as this process has, on which the last bit of a sum depends."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **more}


class PauseOnce(Callback):
    """Stops in a fit's first step, until the process is killed; once it has been there, never again.

    Args:
        after: Only where this file exists, such as what an earlier fit leaves.
        reached: A file that says that it was there.
    """

    def __init__(self, after: str, reached: str) -> None:
        self.after, self.reached = Path(after), Path(reached)

    def on_train_batch_end(self, *arguments: Any) -> None:
        if self.after.exists() and not self.reached.exists():
            self.reached.touch()
            time.sleep(600)
