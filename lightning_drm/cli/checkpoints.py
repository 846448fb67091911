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
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_drm.checkpoints.merge import MergeResult, merge_files, output_problems
from lightning_drm.checkpoints.planning import (
    Plan,
    Rules,
    make_plan,
    memory_bytes,
    plan_costs,
    read_bytes,
    refuse,
    table,
    written_bytes,
)
from lightning_drm.distributed.launch import are_several, run_processes, started_together
from lightning_drm.distributed.ranks import Ranks
from lightning_drm.fusion import Recipe
from lightning_drm.fusion.share_out import balance

_OWN = ("base", "models", "output")


def is_file_merge(args: Sequence[str]) -> bool:
    """Whether a command line is a merge from files: it names a base or models, itself or in a configuration file.

    Args:
        args: Arguments after ``lightning-drm``.
    """
    if not args or args[0] != "merge":
        return False
    names = [arg.removeprefix("--").partition("=")[0].split(".")[0] for arg in args if arg.startswith("--")]
    if any(name in _OWN for name in names):
        return True
    return any(name in _OWN for file in _config_files(args) for name in file)


def with_method(args: Sequence[str]) -> list[str]:
    """The arguments, with the default method named where only its parameters are given.

    A default in the parser would serve too, but jsonargparse hands its parameters on to whatever method replaces it:
    ``--drm.method TaskArithmetic`` would silently get DRM's ``scale``.

    Args:
        args: Arguments after the subcommand.
    """
    named = any(arg.partition("=")[0] in ("--drm.method", "--drm.method.class_path", "--drm") for arg in args)
    in_file = any("method" in (content.get("drm") or {}) for content in _config_files(args))
    has_parameters = any(arg.startswith("--drm.method.") for arg in args)
    return [*(["--drm.method", "DRM"] if has_parameters and not named and not in_file else []), *args]


def parser() -> ArgumentParser:
    """The parser of a merge from files."""
    built = ArgumentParser(
        prog="lightning-drm merge", description="Merge finetuned models that are on disk or on the hub."
    )
    built.add_argument("--config", action="config", help="The same options in a YAML file; later files win.")
    built.add_argument("--base", type=str, required=True, help="The model that all were finetuned from.")
    built.add_argument(
        "--models",
        type=dict[str, str],
        required=True,
        help="By task, a model folder, a PEFT adapter, a checkpoint, a run folder, or a hub name: --models.sst2 PATH.",
    )
    built.add_argument("--output", type=str, required=True, help="The folder to write.")
    built.add_argument("--coefficients", type=dict[str, float], default={}, help="By task; 1.0 if left out.")
    built.add_class_arguments(Recipe, "drm", skip={"coefficients"})
    built.add_class_arguments(Rules, None)
    built.add_argument("--overwrite", type=bool, default=False, help="Replace the output if it exists.")
    built.add_argument("--max_shard_size", type=str, default="5GB", help="Largest size of a written file.")
    built.add_argument("--device", type=str, default="cpu", help="Where to compute; of several GPUs, each process its.")
    built.add_argument("--devices", type=PositiveInt | None, default=None, help="Processes that share the work.")
    built.add_argument("--push_to_hub", type=str | None, default=None, help="A repository to upload the result to.")
    built.add_argument("--dry_run", action="store_true", help="Print the plan and every problem, and write nothing.")
    return built


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
        devices = _parsed(parser(), args).devices
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
    """Lets what one piece of a parameter has left serve the next one.

    glibc hands large blocks back to the kernel, which clears every page of them before it gives them out again; that
    takes longer than adding up what is in them. Other systems' allocators know nothing of this.
    """
    if sys.platform == "linux" and "glibc" in platform.libc_ver():
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the largest that it takes
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


def _run(args: Sequence[str], ranks: Ranks) -> None:
    built = parser()
    built.exit_on_error = ranks.size == 1  # among several, one says what is wrong
    try:
        config = _parsed(built, args)
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    if config.devices not in (None, ranks.size):
        raise ValueError(f"devices is {config.devices}, but {ranks.size} processes were started.")
    names = list(Rules.__dataclass_fields__)
    rules = Rules(**{name: config[name] for name in names})
    drm = built.instantiate_classes(config).drm
    recipe = Recipe(drm.method, config.coefficients, drm.convolutions, drm.vectors, tuple(drm.overrides))
    device = _own_device(config.device, ranks)
    console = Console(highlight=False)
    if config.dry_run:
        plan = make_plan(config.base, config.models, recipe, rules)
        _print_plan(console, plan, ranks, memory_bytes(plan, torch.device(device)))
        refuse([*plan.problems, *output_problems(plan, Path(config.output), config.overwrite)])
        return
    with Progress(transient=True) as bar:
        row = bar.add_task(f"merging with {type(recipe.method).__name__}", total=None)
        result = merge_files(
            config.base,
            config.models,
            config.output,
            recipe,
            rules,
            overwrite=config.overwrite,
            max_shard_size=config.max_shard_size,
            device=device,
            push_to_hub=config.push_to_hub,
            progress=lambda done, total: bar.update(row, completed=done, total=total),
            ranks=ranks,
        )
    _print_result(console, result)


def _parsed(built: ArgumentParser, args: Sequence[str]) -> Namespace:
    _refuse_dotted_tasks(args)
    return built.parse_args(with_method(args))


def _own_device(device: str, ranks: Ranks) -> str:
    """Where this process computes: of several GPUs, the one that its place on its node gives it."""
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device} is none that PyTorch knows, such as cpu, cuda or cuda:1.") from error
    if ranks.size == 1 or device == "cpu" or ":" in device:
        return device
    return f"{device}:{int(os.environ.get('LOCAL_RANK', ranks.rank)) % max(1, torch.accelerator.device_count())}"


def _refuse_dotted_tasks(args: Sequence[str]) -> None:
    """An option's dots are steps into the configuration, so a task's dot would be lost."""
    for arg in args:
        option, _, task = arg.removeprefix("--").partition("=")[0].partition(".")
        if arg.startswith("--") and option in ("models", "coefficients") and "." in task:
            raise ValueError(
                f"--{option}.{task}: on the command line a task's name cannot have a dot; write it in YAML, as in "
                f"--{option} '{{{task}: {'PATH' if option == 'models' else '1.0'}}}', or in a --config file."
            )


def _print_plan(console: Console, plan: Plan, ranks: Ranks, memory: int) -> None:
    rules = Table("rule", "method", "parameters", "values", "such as")
    for rule, method, count, values, example in table(plan):
        rules.add_row(rule, method, str(count), f"{values:,}", example)
    console.print(rules)
    tasks = Table("task", "format", "parameters", "head", "source")
    for task in plan.tasks:
        tasks.add_row(task.name, task.input.format, str(len(task.names)), str(len(task.head)), str(task.input.path))
    console.print(tasks)
    size = f"writes {written_bytes(plan) / 1e9:.2f} GB" if plan.output_format == "full" else "writes an adapter"
    console.print(f"Reads {read_bytes(plan) / 1e9:.2f} GB, {size}, needs about {memory / 1e9:.2f} GB of memory.")
    if ranks.size > 1 and not plan.problems:
        reached = balance(plan_costs(plan), ranks.size)
        console.print(
            f"Of {ranks.size} shares of the work the largest is {reached.largest:.2f} × the mean; "
            f"whole parameters allow no less than {reached.possible:.2f} ×."
        )
    for note in plan.notes:
        console.print(f"Note: {note}")


def _print_result(console: Console, result: MergeResult) -> None:
    for note in result.notes:
        console.print(f"Note: {note}")
    if result.num_resumed:
        console.print(f"Took up an interrupted merge: {result.num_resumed} parameters were there.")
    shares = ", ".join(f"{task} {100 * share:.0f} %" for task, share in result.kept_shares.items())
    console.print(
        f"Merged {result.num_merged} parameters, {result.num_kept} are the base's." + f" Kept: {shares}." * bool(shares)
    )
    if result.rounding:
        console.print(f"Rounding took {result.rounding:.1e} of the merged delta.")
    if result.rank_errors:
        console.print(f"The rank's limit took at most {max(result.rank_errors.values()):.1e} of a parameter's delta.")
    console.print(f"Wrote {result.folder} ({result.output_format}).")


def _config_files(args: Sequence[str]) -> list[dict[str, Any]]:
    """What the configuration files on a command line hold, as far as they can be read."""
    files = [value for name, value in pairwise(args) if name in ("--config", "-c")]
    files += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    contents = []
    for file in files:
        try:
            with open(file) as stream:  # noqa: PTH123 - the path is as the user wrote it
                content = yaml.safe_load(stream)
        except (OSError, yaml.YAMLError):  # the parser reports it
            continue
        if isinstance(content, dict):
            contents.append(content)
    return contents
