"""The command line's parsers, without running anything."""

from collections.abc import Sequence
from functools import cache

from jsonargparse import ArgumentParser, Namespace, capture_parser

from lightning_drm.cli.arguments import (
    file_merge_parser,
    lists_in_brackets,
    own_defaults,
    refuse_dotted_tasks,
    refuse_lost_options,
)
from lightning_drm.cli.main import is_file_merge
from lightning_drm.cli.trainer import MergeCLI


@cache
def run_parser() -> ArgumentParser:
    """The parser of the subcommands that work on one configuration: it takes longer to build than to use."""
    return capture_parser(lambda: MergeCLI(["merge"]))


def parse(words: Sequence[str]) -> Namespace:
    """What ``lightning-drm`` understands by some words, and refuses before it does anything."""
    refuse_lost_options(words[1:])
    if is_file_merge(words):
        refuse_dotted_tasks(words[1:])
        parser, words = file_merge_parser(), words[1:]
    else:
        parser, words = run_parser(), lists_in_brackets(words, "--methods")
    with own_defaults():  # which is left when run_parser is made: not inside of it
        return parser.parse_args(list(words))
