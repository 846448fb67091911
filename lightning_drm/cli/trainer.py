"""The subcommands on one YAML file (``fit``, ``merge``, ``compare``, …): a LightningCLI around `MergeTrainer`."""

import sys
from functools import partial
from typing import cast

from lightning import LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_drm.cli.arguments import lists_in_brackets, own_defaults
from lightning_drm.cli.config_files import with_own_configs
from lightning_drm.cli.mistakes import UNION, OneSentence, sentence
from lightning_drm.data import MultiTaskDataModule
from lightning_drm.storage import write_text
from lightning_drm.training.callback import DRMMergeCallback
from lightning_drm.training.interruption import Interrupted
from lightning_drm.training.run import is_writer
from lightning_drm.training.trainer import MergeTrainer

# Arguments of Lightning's fit and test that have no meaning for several tasks at once.
_LIGHTNINGS_OWN = {"model", "datamodule", "ckpt_path", "weights_only"}

# Those of this package's fit: how one call goes, and, in the last one's case, what the base's score is.
_OF_FIT = ("only", "retrain", "resume", "keep_going", "base_batches")


class _Parser(OneSentence, LightningArgumentParser):
    """Lightning's parser, which says what is wrong in one sentence."""


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
            parser_class=_Parser,
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
            "collect": {"model", "datamodule"},
            "merge": {"model", "datamodule"},
            "test": {*_LIGHTNINGS_OWN, "dataloaders", "verbose"},
            "compare": {"model", "datamodule"},
            "tune": {"model", "datamodule"},
            "analyze": {"model", "datamodule"},
        }

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with own_defaults():
            if args is None:
                self.config = parser.parse_args(_words(sys.argv[1:]))
            else:
                super().parse_arguments(parser, _words(args) if isinstance(args, list) else args)

    def before_fit(self) -> None:
        """Lets a fit that is not refused keep its configuration, without the options that only `fit` takes."""
        config = self.config["fit"]
        shared = config.clone()
        for name in _OF_FIT:
            shared.pop(name)
        text = self._parser("fit").dump(shared, skip_none=False)
        command = f"# lightning-drm fit --config config.yaml --base_batches {config.base_batches}"
        folder = self._get(self.config_init, "drm").run_folder
        if folder is not None:
            trainer = cast(MergeTrainer, self.trainer)
            trainer.on_accepted = partial(write_text, folder.config, f"{command}\n{text}")


def _words(args: list[str]) -> list[str]:
    """A command line as the parser takes it."""
    return lists_in_brackets(with_own_configs(args), "--methods")


def _cli_of(args: ArgsType) -> type[MergeCLI]:
    """The command line with the subcommand that is named first, if one is: parsers of all seven take half a second."""
    words, known = sys.argv[1:] if args is None else args, MergeCLI.subcommands()
    if not isinstance(words, list) or not words or words[0] not in known:
        return MergeCLI
    named = {words[0]: known[words[0]]}

    class OneSubcommand(MergeCLI):
        @staticmethod
        @override
        def subcommands() -> dict[str, set[str]]:
            return named

    return OneSubcommand


def run(args: ArgsType = None) -> None:
    """Runs the subcommand.

    Args:
        args: Command-line arguments, or a configuration; those of the process if left out.

    Raises:
        ValueError: If something does not fit together, for Lightning or for this package.
    """
    try:
        _cli_of(args)(args)
    except Interrupted as ended:
        if is_writer():
            print(f"lightning-drm: {ended}", file=sys.stderr)
        raise
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        if str(error).startswith(UNION):  # a class in a list refused its arguments, which all types of the list tell
            raise ValueError(sentence(str(error))) from error
        raise
