"""What ends a run from outside, SIGTERM and Ctrl-C: one sentence, and the exit code by which shells and SLURM know it.

Lightning ends a fit gracefully on SIGTERM, after the batch, but with exit code 0, and on Ctrl-C with 1. A signal that
comes between two of its loops, or in the last batch of one, is lost. Python itself loses one that comes while an object
is being deleted: what is raised there is printed and dropped. And since 2.6, Lightning broadcasts in its handler of
SIGTERM: if another rank waits for this one's gradients at that moment, both wait until their process group times out.
"""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_drm.distributed.watch import is_interruption

AGAIN = 0.05
"""After so many seconds a signal is sent again that was lost in a deletion, which has ended by then."""


ALONE = 5.0
"""After so many seconds without rank 0's word, a rank that was stopped takes itself to be the only one."""

# Its method is replaced while a run lasts, as fits, tests and learned coefficients have Trainers of their own, and
# Lightning has no hook before the broadcast.
_CONNECTOR: Any = _SignalConnector


def _note_sigterm(connector: _SignalConnector, signum: int, frame: FrameType | None) -> None:
    """Lightning's handler without its broadcast, as rank 0 tells all ranks before each batch, too.

    The others wait for that: one that left before would keep rank 0 waiting. One that was stopped alone leaves later.
    """
    trainer = connector.trainer
    if trainer.strategy.launcher is not None and not connector.received_sigterm:
        trainer.strategy.launcher.kill(signal.Signals(signum))
    if trainer.is_global_zero:
        connector.received_sigterm = True
        return
    later = threading.Timer(ALONE, setattr, (connector, "received_sigterm", True))
    later.daemon = True
    later.start()


class Interrupted(SystemExit):
    """A signal ended the run: its exit code is the one that a shell gives, 128 and the signal's number.

    Args:
        signum: The signal.
        sentence: What was not finished, and what to do.
    """

    def __init__(self, signum: signal.Signals, sentence: str) -> None:
        super().__init__(128 + signum)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class Interruptible:
    """While it lasts, signals that end the run end it as `Interrupted`, and no rank waits for another in a handler.

    Args:
        unfinished: What is not finished until it says otherwise, to complete "Stopped by SIGTERM: … not finished".

    Attributes:
        unfinished: The same, to be kept up to date.
        requeued: Whether Lightning has already put the job back into SLURM's queue, which is then left to it.
    """

    def __init__(self, unfinished: str) -> None:
        self.unfinished = unfinished
        self.requeued = False
        self._received = False
        self._installed = False
        self._unraisable = sys.unraisablehook
        self._notifier = _CONNECTOR._sigterm_notifier_fn

    def __enter__(self) -> Self:
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable
        self._notifier = _CONNECTOR._sigterm_notifier_fn
        _CONNECTOR._sigterm_notifier_fn = _note_sigterm
        free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a handler of the user's own is left alone
        if free and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.unraisablehook = self._unraisable
        _CONNECTOR._sigterm_notifier_fn = self._notifier
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if isinstance(error, SIGTERMException) and not self.requeued:
            raise self._ended(signal.SIGTERM) from error
        if is_interruption(error):
            raise self._ended(signal.SIGINT) from error

    def check(self) -> None:
        """Ends the run now if a signal came while a loop of Lightning's held it back.

        Raises:
            SIGTERMException: If one came.
        """
        if self._received:
            raise SIGTERMException

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._received = True
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            raise SIGTERMException
        # Else one of Lightning's loops runs, and has put its own handler before this one: it ends after the batch.

    def _on_unraisable(self, dropped: "sys.UnraisableHookArgs") -> None:
        for kind, signum in ((SIGTERMException, signal.SIGTERM), (KeyboardInterrupt, signal.SIGINT)):
            if issubclass(dropped.exc_type, kind):
                threading.Timer(AGAIN, os.kill, (os.getpid(), signum)).start()
                return
        self._unraisable(dropped)

    def _ended(self, signum: signal.Signals) -> Interrupted:
        return Interrupted(
            signum, f"Stopped by {signum.name}: {self.unfinished} not finished; the same command continues."
        )
