"""The command line, ``lightning-drm``: which form of it is meant, and how mistakes are reported.

A merge of files needs neither Lightning nor data, so what the other commands need is imported for them only: that takes
as long as merging a small model. Imports are in functions here so that they run without the garbage collector.
"""

import atexit
import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from lightning_drm.cli.overview import MERGE_FORMS, OVERVIEW, SUBCOMMANDS

_OF_FILES = ("base", "models", "output")
_NOT_FOR_USERS = (
    ".*does not have many workers",
    ".*`tensorboardX` has been removed",
    ".*is smaller than the logging interval",
    ".*loftq_config",
    ".*isinstance.treespec, LeafSpec",
    ".*will save all targets and predictions in (the )?buffer",  # of torchmetrics; so it must be
    ".*Checkpoint directory .* exists and is not empty",  # a task that goes on
)
_LOUDEST = {
    "bitsandbytes": logging.ERROR,  # it warns of kernels that it could not load, which nobody asked it for
    "lightning.fabric.utilities.rank_zero": logging.WARNING,
    "lightning.fabric.utilities.seed": logging.WARNING,
    "lightning.pytorch.utilities.rank_zero": logging.WARNING,
}


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning-drm``.

    A mistake in the input ends with one message and exit code 2, a fault of the surroundings, such as a full disk, with
    exit code 1. Set ``LIGHTNING_DRM_TRACEBACK=1`` to see where.

    Args:
        args: Command-line arguments; those of the process if left out.
    """
    words = sys.argv[1:] if args is None else args
    if not words or words[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        return
    if words[0] == "--version":
        print(f"lightning-drm {version('lightning_drm')}")
        return
    try:
        _run(words, args)
    except KeyboardInterrupt:
        print("lightning-drm: Stopped by SIGINT; the same command continues.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # what is no mistake of the user's is raised again
        told = _sentence(error)
        if told is None or os.environ.get("LIGHTNING_DRM_TRACEBACK"):
            raise
        sentence, code = told
        print(f"lightning-drm: {sentence}", file=sys.stderr)
        sys.exit(code)


def is_file_merge(args: Sequence[str]) -> bool:
    """Whether a command line is a merge of files: it names a base or models, itself or in a configuration file.

    Args:
        args: Arguments after ``lightning-drm``.
    """
    from lightning_drm.cli.config_files import config_contents

    if not args or args[0] != "merge":
        return False
    names = [arg.removeprefix("--").partition("=")[0].split(".")[0] for arg in args if arg.startswith("--")]
    if any(name in _OF_FILES for name in names):
        return True
    return any(name in _OF_FILES for content in config_contents(args) for name in content)


def _sentence(error: Exception) -> tuple[str, int] | None:
    """What to say of an error, and the exit code: 2 for a mistake, 1 for the surroundings, nothing for a bug."""
    from lightning_drm.storage import WriteError, fault_behind

    if isinstance(error, ValueError | ImportError):
        return str(error), 2
    fault = fault_behind(error)
    if fault is None:
        return (str(error), 2) if isinstance(error, OSError) else None
    if isinstance(fault, WriteError):
        return f"{fault} What was finished before is kept, and the same command continues.", 1
    code = 2 if isinstance(fault, FileNotFoundError) else 1
    return f"{fault.filename}: {fault.strerror}." if fault.filename else f"{fault.strerror}.", code


def _run(words: Sequence[str], args: list[str] | None) -> None:
    if not words[0].startswith("-") and words[0] not in SUBCOMMANDS:
        raise ValueError(f"There is no subcommand {words[0]!r}; the subcommands are {', '.join(SUBCOMMANDS)}.")
    _keep_others_quiet()
    with _collector_paused():
        from lightning_drm.cli.arguments import file_merge_parser, refuse_lost_options
        from lightning_drm.cli.config_files import with_own_configs
    refuse_lost_options(words[1:])
    words = with_own_configs(words)
    if is_file_merge(words):
        with _collector_paused():
            from lightning_drm.cli import checkpoints
        _keep_imports(args)
        checkpoints.run(words[1:])
        return
    if words[0] == "merge" and not {"-h", "--help"}.isdisjoint(words):
        print(MERGE_FORMS)
        file_merge_parser().print_help()
        print()
    with _collector_paused():
        from lightning_drm.cli import trainer
    _keep_imports(args)
    trainer.run(args)


def _keep_imports(args: list[str] | None) -> None:
    """Spares a process of its own to look through all modules for garbage, in runs and as it ends."""
    if args is None:
        gc.freeze()
        atexit.register(_let_go)


def _let_go() -> None:
    """Closes what only garbage holds, such as a logger's file, and keeps the interpreter from looking at all else."""
    gc.collect()
    gc.freeze()


def _keep_others_quiet() -> None:
    """Keeps what other libraries say of their own affairs off the terminal."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not the user's
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn when data loaders fork
    if not sys.stderr.isatty():  # a file would get every state of a bar
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    for logger, level in _LOUDEST.items():
        logging.getLogger(logger).setLevel(level)
    with _collector_paused():
        from transformers.utils.logging import disable_progress_bar
    # transformers' own bars take longer to read than the small steps they show.
    disable_progress_bar()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """For imports: they make a million objects, none of which is garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
