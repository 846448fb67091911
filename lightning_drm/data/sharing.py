"""Data sets that several processes share: training in one order, evaluation without counting a sample twice.

A `DistributedSampler` gives every process the same number of samples, which it reaches by repeating some: scores come
out wrong. Repeated samples are recognized by their place in the sampler's order, which says how many of a batch's
samples are new: see `Share`.
"""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, cast

from lightning import Trainer
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler


def taking_turns(order: Sampler[int], trainer: Trainer | None) -> Sampler[int]:
    """A training order that the trainer's processes go through in turns, while it trains.

    Process r of W gets the samples r, r + W, …, so batches of size b/W on W processes are together the batches of size
    b on one. Left alone, Lightning would shuffle in another way for each number of processes.

    Args:
        order: The order, which every process draws alike.
        trainer: The trainer, if there is one.
    """
    if trainer is None or not trainer.training:
        return order
    # Also for one process: the wrapper draws a whole epoch at once, which leaves generators in another state.
    turns = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    return DistributedSamplerWrapper(order, shuffle=False, **turns)


def num_replicas(trainer: Trainer | None) -> int:
    """How many processes share one data set: the world size, less what tensor parallelism uses; 1 without a trainer."""
    sampler_kwargs = trainer.distributed_sampler_kwargs if trainer is not None else None
    return sampler_kwargs["num_replicas"] if sampler_kwargs else 1


@dataclass(frozen=True)
class Share:
    """The samples of one evaluation batch of this process.

    Attributes:
        size: How many the batch has; ``None`` if the loader does not say.
        new: How many of them count, the first ones; the others repeat samples for other processes to have as many.
        places: Where the first one stands in the data set, and the step from one to the next.
    """

    size: int | None
    new: int | None
    places: tuple[int, int]

    @classmethod
    def of(cls, loader: Any, batch_idx: int) -> "Share":
        """The samples of a batch.

        Args:
            loader: What this process iterates over. Without a `DistributedSampler` nothing is repeated, or the user
                decided what each process sees.
            batch_idx: The batch's number.

        Example:
            >>> loader = DataLoader(range(5), 2, sampler=DistributedSampler(range(5), 2, 1, shuffle=False))
            >>> [list(batch) for batch in loader], Share.of(loader, 1)
            ([[tensor(1), tensor(3)], [tensor(0)]], Share(size=1, new=0, places=(5, 2)))
        """
        size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
        if size is None or not hasattr(sampler, "__len__"):
            return cls(None, None, (batch_idx, 1))
        first = batch_idx * size
        count = min(size, len(cast(Sized, sampler)) - first)
        if not isinstance(sampler, DistributedSampler):
            return cls(count, count, (first, 1))
        # A process's n-th sample stands at n · num_replicas + rank of the order that all share; repeats follow its end.
        place = first * sampler.num_replicas + sampler.rank
        left = -(-(len(cast(Sized, sampler.dataset)) - place) // sampler.num_replicas)
        return cls(count, max(0, min(count, left)), (place, sampler.num_replicas))


def exactness_problem(loader: Any) -> str | None:
    """Why an evaluation loader cannot be shared by several processes so that every sample counts once, if so.

    Args:
        loader: The loader, before or after Lightning gave it a sampler.
    """
    if not isinstance(loader, DataLoader):
        return None
    if loader.drop_last or getattr(loader.sampler, "drop_last", False):
        return "drops samples (drop_last=True), other ones for each number of processes; use drop_last=False"
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return (
            f"draws batches by {type(loader.batch_sampler).__name__}, whose order hides which samples are repeated for "
            "other processes; use batch_size"
        )
    return None
