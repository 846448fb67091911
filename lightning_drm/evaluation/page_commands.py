"""The commands that make a run again, from the configuration that it was started with."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_FIT = "# lightning-drm fit --config config.yaml"


def commands(config: Path, report: Mapping[str, Any]) -> list[str]:
    """The commands, one a line; none for a run without a configuration that can be read.

    Args:
        config: The run's ``config.yaml``. A comment in it says what else `fit` was given.
        report: The content of ``report.json``.
    """
    try:
        text = config.read_text(encoding="utf-8")
        configured = dict(yaml.safe_load(text)["drm"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
    given = ["--config", "config.yaml"]  # no path: a page that is handed on says nothing of the machine
    options = next((line.removeprefix(_FIT) for line in text.splitlines() if line.startswith(_FIT)), "")
    found = [_line("fit", given) + options]
    if "method" in report:
        found.append(_line("merge", [*given, *_recipe(report["method"], configured)]))
    if methods := report.get("methods"):
        first, *others = methods.values()
        named = json.dumps([{name: entry[name] for name in ("class_path", "init_args")} for entry in others])
        words = [*given, *_recipe(first, configured), "--split", first["split"], "--methods", named]
        found.append(_line("compare", words))
    if "tuned" in report:
        asked = report["tuned"].get("options", {})
        words = [word for name, value in asked.items() for word in (f"--{name}", _word(value))]
        found.append(_line("tune", [*given, *words]))
    return found


def _recipe(description: Mapping[str, Any], configured: Mapping[str, Any]) -> list[str]:
    """A recipe as options: what of it is otherwise than the run's configuration has it."""
    coefficients = description["coefficients"]
    others = configured.get("coefficients") or {}
    asked = {
        **description,
        "method": {name: description[name] for name in ("class_path", "init_args")},
    }
    known = {**configured, "coefficients": {task: others.get(task, 1.0) for task in coefficients}}
    words = []
    for name in ("method", "coefficients", "convolutions", "non_matrix", "overrides"):
        if asked[name] != known.get(name):
            words += [f"--drm.{name}", _word(asked[name])]
    return words


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _line(subcommand: str, words: list[str]) -> str:
    return shlex.join(["lightning-drm", subcommand, *words])
