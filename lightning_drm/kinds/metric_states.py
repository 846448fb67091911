"""What torchmetrics does not say of a metric's states: how they add up, and which ones several processes can gather.

It has no public names for a metric's reductions and defaults, so their private ones stand here, and nowhere else.
"""

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_sum


def alone(metric: Metric) -> Metric:
    """An empty copy of a metric that asks no other process, and computes anew each time it is asked.

    Args:
        metric: The metric.
    """
    copy = metric.clone()
    copy.reset()
    for one in copy.modules():  # some metrics have others inside
        if isinstance(one, Metric):
            one.distributed_available_fn = _nobody
            one.compute_with_cache = False
    return copy


def adds_up(metric: Metric) -> bool:
    """Whether a metric has states, and all of them are sums over samples, or lists of what samples gave.

    Args:
        metric: The metric.

    Example:
        >>> from torchmetrics import MeanSquaredError, PearsonCorrCoef
        >>> adds_up(MeanSquaredError()), adds_up(PearsonCorrCoef())
        (True, False)
    """
    return bool(metric._reductions) and all(
        isinstance(metric._defaults[name], list) or reduction is dim_zero_sum
        for name, reduction in metric._reductions.items()
    )


def hangs(metric: Metric) -> bool:
    """Whether processes with different numbers of samples gather different numbers of entries, and so wait for ever.

    Args:
        metric: The metric.

    Example:
        >>> from torchmetrics import AUROC
        >>> from torchmetrics.text import ROUGEScore
        >>> hangs(ROUGEScore(rouge_keys="rougeL")), hangs(AUROC(task="binary"))
        (True, False)
    """
    return any(
        metric._reductions[name] is None and isinstance(default, list) for name, default in metric._defaults.items()
    )


def keep_precision(module: nn.Module, device: torch.device) -> None:
    """Lets metrics add up in double precision where a strategy has made half-precision numbers of their states.

    Args:
        module: The module that has them.
        device: Where they are.
    """
    for metric in module.modules():
        if isinstance(metric, Metric):
            states = [default for default in metric._defaults.values() if isinstance(default, Tensor)]
            if any(state.dtype in (torch.float16, torch.bfloat16) for state in states):
                metric.set_dtype(torch.float32 if device.type == "mps" else torch.float64)


def _nobody() -> bool:
    return False
