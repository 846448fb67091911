"""The site's code is the code that runs: Python is executed, and commands and configurations are parsed."""

import importlib
import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml

import lightning_drm
from helpers.pages import ROOT, blocks, commands, named_files
from helpers.parsers import parse
from helpers.tiny import save_run_config
from lightning_drm import DRMMergeCallback
from lightning_drm.analysis import STANDARD
from lightning_drm.cli.main import main
from lightning_drm.merging import METHODS, Method

DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS).with_suffix("")): page for page in sorted(DOCS.rglob("*.md"))}
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SUBCOMMAND_OF = {"analyses": "analyze", "models": "merge"}  # by an option that others do not have


def pages_with(*languages: str) -> list[str]:
    return [name for name, page in PAGES.items() if blocks(page, *languages)]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run that pages speak of after the quickstart: two of its tasks, on a tiny model; only read."""
    folder = tmp_path_factory.mktemp("quickstart")
    config = save_run_config(folder)
    content = yaml.safe_load(config.read_text())
    content["data"]["tasks"] = dict(zip(("news_topic", "word_valence"), content["data"]["tasks"].values(), strict=True))
    content["drm"]["dirpath"] = str(folder / "runs" / "quickstart")
    content["trainer"] |= {"max_steps": 5, "logger": False}
    config.write_text(yaml.safe_dump(content))
    main(["fit", "--config", str(config)])
    main(["tune", "--config", str(config), "--grid", "{TaskArithmetic: {scale: [0.3, 0.5]}}", "--num_samples", "8"])
    return folder


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's working folder: the repository's configurations, and whatever a page has saved under a name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    known = set(sys.modules)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        if path.stem not in known:
            sys.modules.pop(path.stem, None)


def save(page: Path, folder: Path) -> None:
    """Saves the page's blocks that are files."""
    for block in blocks(page, "python", "yaml"):
        if block.title is not None and not (folder / block.title).exists():
            (folder / block.title).write_text(block.text)


@pytest.mark.parametrize("name", pages_with("python"))
def test_python_runs(name: str, reader: Path, quickstart: Path):
    page = PAGES[name]
    save(page, reader)
    (reader / "runs").symlink_to(quickstart / "runs")
    namespace: dict[str, object] = {"__name__": name}
    for block in blocks(page, "python"):
        if block.title is not None:
            importlib.import_module(Path(block.title).stem)
        else:
            exec(compile(block.text, f"{name}.md", "exec"), namespace)


@pytest.mark.parametrize("name", pages_with("bash"))
def test_commands_are_understood(name: str, reader: Path, quickstart: Path):
    page = PAGES[name]
    save(page, reader)
    (reader / "runs").symlink_to(quickstart / "runs")
    for block in blocks(page, "bash"):
        for words in commands(block.text):
            parse([word for word in words if word != "--print_config"])  # which would end before anything is checked


@pytest.mark.parametrize("name", pages_with("yaml"))
def test_configurations_are_understood(name: str, reader: Path):
    page = PAGES[name]
    save(page, reader)
    for index, block in enumerate(blocks(page, "yaml")):
        content = yaml.safe_load(block.text)
        if "command" in content:
            words = sweep_words(content)
        else:
            file = reader / f"block_{index}.yaml"
            file.write_text(block.text)
            subcommand = next((value for key, value in SUBCOMMAND_OF.items() if key in content), "fit")
            first = [] if "models" in content else ["--config", QUICKSTART]
            words = [subcommand, *first, "--config", str(file)]
        parse(words)


def sweep_words(content: dict) -> list[str]:
    """What a W&B agent would start, with the first choice of each parameter."""
    options = [
        f"--{name}={space.get('min', space.get('values', [0])[0])}" for name, space in content["parameters"].items()
    ]
    *_, script, _, arguments = content["command"]
    assert arguments == "${args}"
    (words,) = commands(script)
    return [*words[: words.index("$@")], *options]


def test_the_analysis_of_a_page_runs(reader: Path, quickstart: Path):
    save(PAGES["guides/analyses"], reader)
    shutil.copytree(quickstart / "runs", reader / "runs")
    options = ["--drm.dirpath", "runs/quickstart", "--analyses", "[my_analyses.Norms]", "--only", "norms"]
    main(["analyze", "--config", str(quickstart / "config.yaml"), *options])
    table = pd.read_csv("runs/quickstart/analysis/norms.csv")
    assert table["task"].tolist() == ["news_topic", "word_valence"]
    assert (table["norm"] > 0).all()


def test_every_file_named_exists():
    missing = {
        name: [file for file in named_files(page) if not (ROOT / file).is_file()] for name, page in PAGES.items()
    }
    assert not {name: files for name, files in missing.items() if files}


def test_every_method_has_its_section_and_its_facts():
    exported = {name for name in lightning_drm.__all__ if is_method(getattr(lightning_drm, name))}
    page = PAGES["methods"].read_text()
    rows = {
        row.split("`")[1]: [cell.strip() for cell in row.split("|")]
        for row in page.splitlines()
        if row.startswith("| [`")
    }
    assert rows.keys() == exported
    for kind in METHODS:
        _, _, _, merges, needs, adapter, learnable, _ = rows[kind.__name__]
        method = kind()
        assert f"\n## {kind.__name__}\n" in page
        assert merges == ("all" if method.elementwise else "matrices")
        assert (needs not in ("–", "Gram matrices, with `input_weight`")) == (method.needs is not None)
        assert (adapter == "yes") == method.supports_low_rank
        assert (learnable == "yes") == method.linear


def test_every_option_of_the_merge_has_its_row():
    rows = [line.split("`")[1] for line in PAGES["concepts"].read_text().splitlines() if line.startswith("| `")]
    options = list(inspect.signature(DRMMergeCallback).parameters)[1:]  # but the tasks
    assert not set(options) - set(rows)


def is_method(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Method)


def test_the_reference_has_every_public_name():
    reference = "".join(page.read_text() for name, page in PAGES.items() if name.startswith("reference/"))
    names = [*lightning_drm.__all__, *(f"analysis.{kind.__name__}" for kind in STANDARD)]
    assert not [name for name in names if f"\n::: lightning_drm.{name}\n" not in reference]


def test_the_guide_to_the_analyses_has_all_of_them():
    guide = PAGES["guides/analyses"].read_text()
    assert not [kind.name for kind in STANDARD if f"| `{kind.name}` |" not in guide]
