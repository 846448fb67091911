"""The commands that make a run again, from the configuration that it was started with."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FIT = "lightning-drm fit"


def commands(config: Path, report: Mapping[str, Any]) -> list[str]:
    """The commands, one a line; none for a run without a configuration that can be read.

    Args:
        config: The run's ``config.yaml``. A comment in it may say how it was fitted, beyond what the file says.
        report: The content of ``report.json``.
    """
    try:
        text = config.read_text(encoding="utf-8")
        file = f"{yaml.safe_load(text)['drm']['dirpath']}/config.yaml"
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
    given = ["--config", file]
    options = next((line.partition(FIT)[2] for line in text.splitlines() if line.startswith(f"# {FIT}")), "")
    found = [_line("fit", given) + options]
    if "method" in report:
        found.append(_line("merge", [*given, *_recipe(report["method"])]))
    if methods := report.get("methods"):
        recipes = [{name: entry[name] for name in ("class_path", "init_args")} for entry in methods.values()]
        first = next(iter(methods.values()))
        split = ["--split", first["split"]]
        found.append(_line("compare", [*given, *_recipe(first), *split, "--methods", json.dumps(recipes[1:])]))
    if "tuned" in report:
        found.append(_line("tune", given))
    return found


def _recipe(description: Mapping[str, Any]) -> list[str]:
    """A recipe as options: its method, and what of the rest is not as it is by default."""
    method = {name: description[name] for name in ("class_path", "init_args")}
    words = ["--drm.method", json.dumps(method)]
    coefficients = description.get("coefficients", {})
    if any(value != 1.0 for value in coefficients.values()):
        words += ["--drm.coefficients", json.dumps(coefficients)]
    for name in ("convolutions", "non_matrix"):
        if description.get(name, "average") != "average":
            words += [f"--drm.{name}", description[name]]
    if overrides := description.get("overrides"):
        words += ["--drm.overrides", json.dumps(overrides)]
    return words


def _line(subcommand: str, words: list[str]) -> str:
    return shlex.join(["lightning-drm", subcommand, *words])
