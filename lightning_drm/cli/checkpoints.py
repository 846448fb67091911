"""``lightning-drm merge --base …``: merging what is on disk, with no model, data or Trainer in the configuration.

The same options, on the command line or in YAML: ``base:``, ``models:``, ``output:``, ``coefficients:``, and the
``drm:`` group with the method and its exceptions, so that the overlays in ``configs/method`` serve here too.
"""

import ctypes
import io
import os
import platform
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import Progress

from lightning_drm.checkpoints.merge import merge_checkpoints
from lightning_drm.checkpoints.planning import MismatchPolicy, make_plan, memory_bytes, refuse
from lightning_drm.checkpoints.writing.output_folder import OutputFolder
from lightning_drm.cli.arguments import file_merge_parser, own_defaults, refuse_dotted_tasks
from lightning_drm.cli.tables import print_plan, print_result
from lightning_drm.distributed.launch import are_several, run_processes, started_together
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion import Recipe


def run(args: Sequence[str]) -> None:
    """Merges files as the command line says, together with the processes that were started with this one.

    With ``--devices N``, a process that was started alone starts N others, which merge, and waits for them.

    Args:
        args: Arguments after ``lightning-drm merge``.

    Raises:
        ValueError: With every problem that was found.
    """
    _keep_freed_memory()
    if not are_several():
        devices = _parsed(file_merge_parser(), args).devices
        if devices is not None and devices > 1:
            run_processes(["-m", "lightning_drm", "merge", *args], devices)
            return
    with started_together() as ranks:
        if ranks.is_first:
            _run(args, ranks)
        else:
            with redirect_stdout(io.StringIO()):
                _run(args, ranks)


def _keep_freed_memory() -> None:
    """Lets the memory that one piece of a parameter has freed serve the next one.

    glibc hands large blocks back to the kernel, which clears every page of them before it gives them out again; that
    takes longer than adding up what is in them. Other systems' allocators do not have these settings.
    """
    if sys.platform == "linux" and "glibc" in platform.libc_ver():
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the largest that it takes
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


def _run(args: Sequence[str], ranks: Ranks) -> None:
    parser = file_merge_parser()
    parser.exit_on_error = ranks.size == 1  # among several, one says what is wrong
    try:
        config = _parsed(parser, args)
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    if config.devices not in (None, ranks.size):
        raise ValueError(f"devices is {config.devices}, but {ranks.size} processes were started.")
    mismatch = MismatchPolicy(**{name: config[name] for name in MismatchPolicy.__dataclass_fields__})
    drm = parser.instantiate_classes(config).drm
    recipe = Recipe(drm.method, config.coefficients, drm.convolutions, drm.non_matrix, tuple(drm.overrides))
    device = _own_device(config.device, ranks)
    console = Console(highlight=False)
    if config.dry_run:
        plan = make_plan(config.base, config.models, recipe, mismatch)
        print_plan(console, plan, ranks, memory_bytes(plan, torch.device(device)))
        refuse([*plan.problems, *OutputFolder(Path(config.output)).problems(plan, config.overwrite)])
        return
    aside = Console(stderr=True)
    with Progress(console=aside, transient=True, disable=not aside.is_terminal) as bar:
        row = bar.add_task(f"merging with {type(recipe.method).__name__}", total=None)
        result = merge_checkpoints(
            config.base,
            config.models,
            config.output,
            **vars(recipe),
            **vars(mismatch),
            overwrite=config.overwrite,
            max_shard_size=config.max_shard_size,
            device=device,
            push_to_hub=config.push_to_hub,
            private=config.private,
            progress=lambda done, total: bar.update(row, completed=done, total=total),
            ranks=ranks,
        )
    print_result(console, result)


def _parsed(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    refuse_dotted_tasks(args)
    with own_defaults():
        return parser.parse_args(args)


def _own_device(device: str, ranks: Ranks) -> str:
    """Where this process computes: with several GPUs, on the one of its place on its node."""
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"--device {device} is not a device that PyTorch knows, such as cpu, cuda or cuda:1."
        ) from error
    if ranks.size == 1 or device == "cpu" or ":" in device:
        return device
    return f"{device}:{int(os.environ.get('LOCAL_RANK', ranks.rank)) % max(1, torch.accelerator.device_count())}"
