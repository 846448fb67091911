"""What the command line takes, beyond what jsonargparse does by itself.

A class has its own defaults: where another class replaces it, in a later file or option, its arguments go with it. Left
alone, jsonargparse hands those of the same name on, so that ``TaskArithmetic`` over a configuration with ``DRM`` would
get DRM's ``scale``, and ``SGD`` over ``AdamW`` its ``weight_decay``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser, Namespace, _typehints
from jsonargparse._util import import_object
from jsonargparse.typing import PositiveInt

from lightning_drm.checkpoints.planning import MismatchPolicy
from lightning_drm.cli.mistakes import OneSentence
from lightning_drm.fusion import Recipe

_hand_on_arguments: Callable[..., None] = _typehints.discard_init_args_on_class_path_change


@contextmanager
def own_defaults() -> Iterator[None]:
    """While it lasts, every parser drops the arguments of a class that another one replaces.

    jsonargparse asks one function what to do with them, whether classes come from files, from overlays or from options;
    there is no setting for it. Arguments that are given along with the new class are not touched, nor are those of the
    same class under another of its names.

    Example:
        >>> files = ["--base", "BASE", "--models.a", "PATH", "--output", "DIR"]
        >>> with own_defaults():
        ...     merge = file_merge_parser().parse_args([*files, "--drm.method", "TaskArithmetic"])
        >>> merge.drm.method.init_args.scale
        0.4
    """
    _typehints.discard_init_args_on_class_path_change = _drop_arguments
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = _hand_on_arguments


def _drop_arguments(parser_or_action: Any, previous: Namespace | None, value: Namespace) -> None:
    """Takes the place of jsonargparse's function of the same arguments."""
    if not previous or previous["class_path"] == value["class_path"]:
        return
    if previous["class_path"] is None:  # arguments alone, which are those of the annotated class
        _hand_on_arguments(parser_or_action, previous, value)
    elif import_object(previous["class_path"]) is not import_object(value["class_path"]):
        previous.pop("init_args", None)
        previous.pop("dict_kwargs", None)


def refuse_lost_options(args: Sequence[str]) -> None:
    """Refuses an option that a later one on the same command line would replace as a whole.

    Args:
        args: Arguments after the subcommand.

    Raises:
        ValueError: Naming both options.

    Example:
        >>> refuse_lost_options(["--drm.method.density", "0.3", "--drm.method", "TIES"])
        Traceback (most recent call last):
            ...
        ValueError: --drm.method.density comes before --drm.method, which replaces it; give --drm.method first.
    """
    options = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    for index, option in enumerate(options):
        for later in options[index + 1 :]:
            if option != later and option.startswith(f"{later.removesuffix('.class_path')}."):
                raise ValueError(f"{option} comes before {later}, which replaces it; give {later} first.")


def lists_in_brackets(args: Sequence[str], option: str) -> list[str]:
    """Puts several words after an option into the brackets of one list, as the parser reads it.

    Args:
        args: Arguments of a command line.
        option: The option.

    Example:
        >>> lists_in_brackets(["--methods", "DRM", "{class_path: TIES}", "--split", "test"], "--methods")
        ['--methods', '[DRM, {class_path: TIES}]', '--split', 'test']
        >>> lists_in_brackets(["--methods=[DRM, TIES]"], "--methods")
        ['--methods', '[DRM, TIES]']
    """
    found: list[str] = []
    words = iter(args)
    word = next(words, None)
    while word is not None:
        name, has_value, value = word.partition("=")
        following = next(words, None)
        if name != option:
            found.append(word)
            word = following
            continue
        values = [value] if has_value else []
        while following is not None and not following.startswith("-"):
            values.append(following)
            following = next(words, None)
        is_list = len(values) == 1 and values[0].startswith("[")
        found += [option, values[0] if is_list else f"[{', '.join(values)}]"]
        word = following
    return found


def refuse_dotted_tasks(args: Sequence[str]) -> None:
    """Refuses tasks with a dot in their name where an option's dots are steps into the configuration.

    Args:
        args: Arguments of a merge of files.

    Raises:
        ValueError: Naming the option, and what to write instead.
    """
    for arg in args:
        option, _, task = arg.removeprefix("--").partition("=")[0].partition(".")
        if arg.startswith("--") and option in ("models", "coefficients") and "." in task:
            raise ValueError(
                f"--{option}.{task}: on the command line a task's name cannot have a dot; write it in YAML, as in "
                f"--{option} '{{{task}: {'PATH' if option == 'models' else '1.0'}}}', or in a --config file."
            )


def file_merge_parser() -> ArgumentParser:
    """The parser of a merge of files."""
    parser = OneSentence(
        prog="lightning-drm merge", description="Merge finetuned models that are on disk or on the hub."
    )
    parser.add_argument("--config", action="config", help="The same options in a YAML file; later files win.")
    parser.add_argument("--base", type=str, required=True, help="The model that all were finetuned from.")
    parser.add_argument(
        "--models",
        type=dict[str, str],
        required=True,
        help="For each task, a model folder (of transformers or litgpt), a PEFT adapter, a checkpoint, a run folder, "
        "or a hub name, as in --models.sst2 PATH; org/name@revision names a revision of a hub's model.",
    )
    parser.add_argument("--output", type=str, required=True, help="The folder to write.")
    parser.add_argument(
        "--coefficients", type=dict[str, float], default={}, help="One for each task; 1.0 where none is given."
    )
    parser.add_class_arguments(Recipe, "drm", skip={"coefficients"}, sub_configs=True)
    parser.set_defaults({"drm.method": {"class_path": "lightning_drm.DRM"}})
    parser.add_class_arguments(MismatchPolicy, None)
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace the output if it exists.")
    parser.add_argument("--max_shard_size", type=str, default="5GB", help="Largest size of a written file.")
    parser.add_argument(
        "--device",
        type=str,
        default="cpu",
        help="Where to compute, such as cpu or cuda. With several GPUs, each process uses its own.",
    )
    parser.add_argument("--devices", type=PositiveInt | None, default=None, help="Processes that share the work.")
    parser.add_argument("--push_to_hub", type=str | None, default=None, help="A repository to upload the result to.")
    parser.add_argument(
        "--private",
        type=bool | None,
        default=None,
        help="Whether a repository that is made for it is private; as the hub has it for its owner if left out.",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Print the plan and every problem found, and write nothing."
    )
    return parser
