"""What an interruptible run makes of a signal, in this process."""

import os
import signal
import sys
import time

import pytest

from lightning_drm.training.interruption import Interrupted, Interruptible


class SignalsWhenDeleted:
    """Gets a signal while it is being deleted, when Python drops what a handler raises."""

    def __init__(self, signum: signal.Signals) -> None:
        self.signum = signum

    def __del__(self) -> None:
        os.kill(os.getpid(), self.signum)
        time.sleep(0.01)


class FailsWhenDeleted:
    def __del__(self) -> None:
        raise ValueError("of the object's own")


def delete(signum: signal.Signals) -> None:
    with Interruptible("the run was"):
        deleted = SignalsWhenDeleted(signum)
        del deleted
        time.sleep(10)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_an_object_is_deleted_is_not_lost(signum: signal.Signals):
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs behind
    hook = sys.unraisablehook
    try:
        with pytest.raises(Interrupted, match=f"Stopped by {signum.name}: the run was not finished") as stopped:
            delete(signum)
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, interrupt)
    assert stopped.value.code == 128 + signum
    assert sys.unraisablehook is hook


def test_other_errors_of_a_deletion_are_reported_as_before(monkeypatch: pytest.MonkeyPatch):
    reported: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: reported.append(str(dropped.exc_value)))
    with Interruptible("the run was"):
        FailsWhenDeleted()
    assert reported == ["of the object's own"]
