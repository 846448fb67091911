"""Figures in the loggers that take pictures: TensorBoard and Weights & Biases."""

import io
from collections.abc import Mapping, Sequence

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image


def log_figures(figures: Mapping[str, Figure], loggers: Sequence[Logger]) -> None:
    """Logs figures where a logger takes them; other loggers get none.

    Args:
        figures: By name, the figure.
        loggers: The Trainer's loggers.
    """
    for logger in loggers:
        for name, figure in figures.items():
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure)
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [_pixels(figure)])
        if isinstance(logger, TensorBoardLogger):
            logger.finalize("success")  # tensorboardX writes in a thread, for which only closing a file waits
        elif isinstance(logger, WandbLogger):
            logger.save()


def _pixels(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    return Image.open(file)
