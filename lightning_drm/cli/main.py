"""The command line, ``lightning-drm``: which of its two forms is meant, and how mistakes are told.

A merge of files needs neither Lightning nor data, so what the other commands need is imported for them only: that takes
as long as merging a small model. Imports are in functions here so that they run without the garbage collector.
"""

import atexit
import gc
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

atexit.register(gc.freeze)  # or an interpreter that ends would look through a million objects once more


def with_own_defaults(words: list[str]) -> list[str]:
    """Gives a method named on the command line its own defaults.

    Left alone, jsonargparse hands it the parameters of the same name of the method that it replaces, so that
    ``--drm.method TaskArithmetic`` would get DRM's ``scale``.

    Args:
        words: The command line.
    """
    from lightning_drm import merging

    methods = {method.__name__: method for method in vars(merging).values() if isinstance(method, type)}
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--drm.method=") else [word])]
    for index, (option, name) in enumerate(pairwise(words)):
        method = methods.get(name.removeprefix("lightning_drm."))
        if option == "--drm.method" and method is not None:
            parameters = inspect.signature(method).parameters.values()
            defaults = {parameter.name: parameter.default for parameter in parameters}
            words[index + 1] = json.dumps({"class_path": f"lightning_drm.{method.__name__}", "init_args": defaults})
    return words


@contextmanager
def _collector_paused() -> Iterator[None]:
    """For imports: they make a million objects, none of which is garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning-drm``.

    A mistake in the input ends with one message and exit code 2. Set ``LIGHTNING_DRM_TRACEBACK=1`` to see where.

    Args:
        args: Command-line arguments; those of the process if left out.
    """
    with _collector_paused():
        from transformers.utils.logging import disable_progress_bar

        from lightning_drm.cli import checkpoints
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not the user's
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn when data loaders fork
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*loftq_config.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # transformers' own bars take longer to read than the small steps they show.
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no types here
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    if args is None:
        sys.argv[1:] = with_own_defaults(sys.argv[1:])
    else:
        args = with_own_defaults(args)
    words = sys.argv[1:] if args is None else args
    try:
        if checkpoints.is_file_merge(words):
            checkpoints.run(words[1:])
        else:
            with _collector_paused():
                from lightning_drm.cli import trainer
            trainer.run(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if os.environ.get("LIGHTNING_DRM_TRACEBACK"):
            raise
        print(f"lightning-drm: {error}", file=sys.stderr)
        sys.exit(2)
