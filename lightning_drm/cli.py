"""The command line: ``lightning-drm fit | merge | test``, a LightningCLI on one YAML file."""

import inspect
import json
import logging
import os
import sys
import warnings
from itertools import pairwise

from lightning import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from transformers.utils.logging import disable_progress_bar
from typing_extensions import override

from lightning_drm import merging
from lightning_drm.callback import DRMMergeCallback
from lightning_drm.cli_files import is_file_merge, run
from lightning_drm.data import MultiTaskDataModule
from lightning_drm.engine import write_text
from lightning_drm.trainer import MergeTrainer, is_writer

# Arguments of Lightning's fit and test that have no meaning for several tasks at once.
_LIGHTNINGS_OWN = {"model", "datamodule", "ckpt_path", "weights_only"}


class MergeCLI(LightningCLI):
    """Reads ``model`` (a task's module), ``data`` (the tasks), ``drm`` (the merge) and ``trainer`` from one YAML file.

    Args:
        args: Command-line arguments, or a configuration; those of the process if left out.
    """

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            model_class=LightningModule,
            datamodule_class=MultiTaskDataModule,
            trainer_class=MergeTrainer,
            subclass_mode_model=True,
            save_config_callback=None,  # one configuration per run, not one per fit: see before_fit
            seed_everything_default=0,
            auto_configure_optimizers=False,  # optimizers are the task module's, since each task needs its own
            parser_kwargs={"prog": "lightning-drm"},
            args=args,
        )

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(DRMMergeCallback, "drm")
        super().add_core_arguments_to_parser(parser)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"drm.method": {"class_path": "lightning_drm.DRM"}, "drm.dirpath": "runs/drm"})
        parser.link_arguments("data.tasks", "drm.tasks", compute_fn=list)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {*_LIGHTNINGS_OWN, "train_dataloaders", "val_dataloaders"},
            "merge": {"model", "datamodule"},
            "test": {*_LIGHTNINGS_OWN, "dataloaders", "verbose"},
        }

    def before_fit(self) -> None:
        """Keeps the configuration with the run."""
        config = self.config["fit"]
        text = self._parser("fit").dump(config, skip_none=False)
        folder = self._get(self.config_init, "drm").run_folder
        if folder is not None and is_writer():
            write_text(folder.config, text)


def with_own_defaults(words: list[str]) -> list[str]:
    """Gives a method named on the command line its own defaults.

    Left alone, jsonargparse hands it the parameters of the same name of the method that it replaces, so that
    ``--drm.method TaskArithmetic`` would get DRM's ``scale``.

    Args:
        words: The command line.
    """
    methods = {method.__name__: method for method in vars(merging).values() if isinstance(method, type)}
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--drm.method=") else [word])]
    for index, (option, name) in enumerate(pairwise(words)):
        method = methods.get(name.removeprefix("lightning_drm."))
        if option == "--drm.method" and method is not None:
            parameters = inspect.signature(method).parameters.values()
            defaults = {parameter.name: parameter.default for parameter in parameters}
            words[index + 1] = json.dumps({"class_path": f"lightning_drm.{method.__name__}", "init_args": defaults})
    return words


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning-drm``.

    A mistake in the input ends with one message and exit code 2. Set ``LIGHTNING_DRM_TRACEBACK=1`` to see where.

    Args:
        args: Command-line arguments; those of the process if left out.
    """
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not the user's
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn when data loaders fork
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*loftq_config.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # transformers' own bars take longer to read than the small steps they show.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    if args is None:
        sys.argv[1:] = with_own_defaults(sys.argv[1:])
    else:
        args = with_own_defaults(args)
    words = sys.argv[1:] if args is None else args
    try:
        if is_file_merge(words):
            run(words[1:])
        else:
            MergeCLI(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if os.environ.get("LIGHTNING_DRM_TRACEBACK"):
            raise
        print(f"lightning-drm: {error}", file=sys.stderr)
        sys.exit(2)
