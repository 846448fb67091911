"""A run on all processes of a strategy: started, joined to each other, and watched."""

from collections.abc import Callable
from signal import SIGTERM
from typing import TypeVar, cast

from lightning import LightningModule, Trainer

from lightning_drm.distributed.interfaces import follow_nccl
from lightning_drm.distributed.watch import watched
from lightning_drm.training.letting_go import cheap_collections
from lightning_drm.training.session import MergeSession

T = TypeVar("T")

_ADVICE = "What was finished is kept: the same command continues."


def on_all_ranks(trainer: Trainer, session: MergeSession, function: Callable[[], T]) -> T:
    """Calls a function on all processes of a Trainer's strategy, which start here unless something else started them.

    Args:
        trainer: The Trainer.
        session: What the processes share.
        function: What each of them does.

    Returns:
        What the function returned here.
    """

    def joined() -> T:
        trainer.strategy.connect(LightningModule())  # a strategy that shards hands its mesh to a module
        if trainer.world_size > 1:
            follow_nccl()  # on CPUs, the training's process group is gloo, too
        trainer.strategy.setup_environment()
        with watched(session.join(trainer.world_size), _ADVICE), cheap_collections():
            return function()

    launcher = trainer.strategy.launcher
    if launcher is None:
        return joined()
    try:
        return cast(T, launcher.launch(joined, trainer=trainer))
    except BaseException:
        launcher.kill(SIGTERM)
        raise
