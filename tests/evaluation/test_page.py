"""``report.html`` as a browser would read it: whole, self-contained, small, with all tasks and numbers."""

import base64
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from helpers.scores import scores
from lightning_drm.evaluation import (
    Comparison,
    Finding,
    MadeFrom,
    Score,
    add_section,
    page,
    read_findings,
    write_finding,
    write_page,
    write_report,
)
from lightning_drm.evaluation.figures import new_figure
from lightning_drm.kinds import MetricInfo

TASKS = ["topic", "<b>&rated"]
ABOUT = MadeFrom(dict.fromkeys(TASKS, "1a"), dict.fromkeys(TASKS, "0b"))
METRICS = {"topic": MetricInfo("accuracy", is_fraction=True), "<b>&rated": MetricInfo("spearman", is_fraction=True)}


class Page(HTMLParser):
    """A page's elements and texts; what is opened must be closed."""

    VOID = ("meta", "img", "link", "br", "wbr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.size = len(text.encode())
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data.strip("\n")

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def finding(name: str, rows: int = 3) -> Finding:
    figure, (axes,) = new_figure()
    axes.plot([0, 1, 2])
    table = pd.DataFrame({"place": range(rows), "score (%)": [66.6666] * rows, "cosine": [0.123456] * rows})
    return Finding(name, f"Title of {name} <i>", f"Sentence of {name} & more", table, figure)


def comparison() -> Comparison:
    def row(*values: float) -> dict[str, Score]:
        return {t: Score(v, METRICS[t], (v - 0.0123, v + 0.0123)) for t, v in zip(TASKS, values, strict=True)}

    method = {
        "class_path": "lightning_drm.DRM",
        "init_args": {"density": 0.35},
        "coefficients": {TASKS[0]: 0.75, TASKS[1]: 1.0},
        "convolutions": "average",
        "non_matrix": "elect",
        "overrides": [{"match": "*.first.*", "rule": "base", "density": None, "coefficients": {}, "split": None}],
    }
    base, individual, merged = row(0.5012, 0.4021), row(0.8333, 0.9012), row(0.7456, 0.8567)
    return Comparison(TASKS, base, individual, merged, method, "DRM, horizontal, density 0.35")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything in it; only read."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(
        "# lightning-drm fit --config config.yaml --base_batches 7\n"
        "drm: {dirpath: runs/a, method: {class_path: lightning_drm.TIES, init_args: {}}, convolutions: average}\n"
    )
    write_report(comparison(), folder, ABOUT)
    for study in ("compare", "tune", "analysis"):
        write_finding(finding(f"{study}_1"), folder / study, ABOUT)
    write_finding(finding("outdated"), folder / "analysis", replace(ABOUT, deltas={**ABOUT.deltas, "topic": "0"}))
    entry = {
        **comparison().method,
        "split": "validation",
        "scores": {"topic": 0.6111, "<b>&rated": 0.7222, "average": 0.66665},
        "intervals": {"topic": [0.6, 0.62], "<b>&rated": None, "average": None},
        "normalized": {"topic": 0.9, "<b>&rated": 0.8, "average": 0.8512},
    }
    better = {**entry, "scores": {**entry["scores"], "topic": 0.6333}}
    add_section("compare", {"First": entry, "Second": better}, folder, metrics=METRICS, made_from=ABOUT)
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def references(shown: Page) -> Iterator[str]:
    for _, attributes in shown.elements:
        yield from (
            attributes[name] for name in ("href", "src", "srcset", "action", "data", "poster") if name in attributes
        )


def test_it_needs_no_other_file_and_no_network(run: Path):
    shown, text = read(run), (run / "report.html").read_text()
    names = {attributes["id"] for _, attributes in shown.elements if "id" in attributes}
    for reference in references(shown):
        assert reference.startswith("data:image/svg+xml;base64,") or reference.removeprefix("#") in names
    assert not shown.all("link")
    assert "@import" not in text
    assert "url(" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert shown.size <= page.MAX_BYTES


def test_every_picture_is_whole_and_has_words(run: Path):
    pictures = read(run).all("img")
    assert len(pictures) == 4, "the scores, and a finding of each study"
    for picture in pictures:
        content = base64.b64decode(picture["src"].partition(",")[2], validate=True)
        assert ElementTree.fromstring(content).tag.endswith("svg")
        assert picture["alt"]
    assert "Title of tune_1 <i>: Sentence of tune_1 & more" in [picture["alt"] for picture in pictures]


def test_all_tasks_and_numbers_are_there(run: Path):
    shown = read(run)
    places = [place for place, cell in enumerate(shown.cells) if cell == "task"]
    table = [shown.cells[places[0] + 5 * line : places[0] + 5 * line + 5] for line in range(4)]
    assert table == [
        ["task", "base", "individual", "merged", "normalized"],
        ["topic", "50.1 ±1.2", "83.3 ±1.2", "74.6 ±1.2", f"{100 * 0.7456 / 0.8333:.1f}"],
        ["<b>&rated (spearman)", "40.2 ±1.2", "90.1 ±1.2", "85.7 ±1.2", f"{100 * 0.8567 / 0.9012:.1f}"],
        ["average", "45.2 ±0.9", "86.7 ±0.9", "80.1 ±0.9", f"{50 * (0.7456 / 0.8333 + 0.8567 / 0.9012):.1f}"],
    ]
    place = shown.cells.index("First")
    assert shown.cells[place : place + 5] == ["First", "61.1 ±1.0", "72.2", "66.7", "85.1"]
    assert "80.1\u00a0% merged, 86.7\u00a0% individual, 45.2\u00a0% base" in shown.text
    assert "DRM, horizontal, density 0.35" in shown.text
    assert "*.first.*" in shown.text
    assert "66.7" in shown.cells, "of a finding's table: percent with one decimal"
    assert "0.1235" in shown.cells
    assert "outdated" not in shown.text


def test_the_best_of_each_column_is_marked(run: Path):
    best = [a["data-value"] for tag, a in read(run).elements if tag == "td" and "best" in a.get("class", "")]
    assert best == ["0.7222", "0.66665", "0.8512", "0.6333", "0.7222", "0.66665", "0.8512"]


def test_the_commands_say_what_differs_from_the_configuration(run: Path):
    lines = read(run).text.splitlines()
    commands = [line for line in lines if line.startswith("lightning-drm ")]
    assert commands[0] == "lightning-drm fit --config config.yaml --base_batches 7"
    assert commands[1].startswith(
        'lightning-drm merge --config config.yaml --drm.method \'{"class_path": "lightning_drm.DRM"'
    )
    assert '"density": 0.35' in commands[1]
    assert "--drm.non_matrix elect" in commands[1]
    assert "--drm.convolutions" not in commands[1]
    assert commands[2].startswith("lightning-drm compare --config config.yaml")
    assert "--split validation" in commands[2]


def test_tuned_scores_stand_beside_the_untuned_ones(copied: Path):
    tuned = {
        **comparison().method,
        "title": "DRM, vertical, density 0.15",
        "scores": {"topic": 0.8123, "<b>&rated": 0.8789, "average": 0.8456},
        "intervals": {"topic": [0.80, 0.82], "<b>&rated": None, "average": None},
        "normalized": {"topic": 0.9748, "<b>&rated": 0.9753, "average": 0.9750},
    }
    add_section("tune", tuned, copied, metrics=METRICS, made_from=ABOUT)
    shown = read(copied)
    start = shown.cells.index("untuned") - 2
    assert [shown.cells[start + 5 * line : start + 5 * line + 5] for line in range(4)] == [
        ["task", "individual", "untuned", "tuned", "tuned, normalized"],
        ["topic", "83.3 ±1.2", "74.6 ±1.2", "81.2 ±1.0", "97.5"],
        ["<b>&rated (spearman)", "90.1 ±1.2", "85.7 ±1.2", "87.9", "97.5"],
        ["average", "86.7 ±0.9", "80.1 ±0.9", "84.6", "97.5"],
    ]
    assert "Tuned: DRM, vertical, density 0.15" in shown.text


def test_a_page_of_methods_alone(tmp_path: Path):
    entry = {
        **comparison().method,
        "split": "test",
        "scores": {"topic": 0.6111, "<b>&rated": None, "average": None},
        "intervals": {"topic": None, "<b>&rated": None, "average": None},
        "normalized": {"topic": None, "<b>&rated": None, "average": None},
    }
    add_section("compare", {"Only": entry}, tmp_path, metrics=METRICS, made_from=ABOUT)
    shown = read(tmp_path)
    assert "No merged model was tested yet" in shown.text
    assert "Only" in shown.cells
    assert "n/a" in shown.cells
    assert "no configuration from which commands could be made" in shown.text


def test_a_page_of_an_empty_run_folder(tmp_path: Path):
    write_page(tmp_path, ABOUT)
    assert "2 tasks, merged in several ways" in read(tmp_path).text


def test_too_large_a_page_leaves_out_the_largest_tables_first(copied: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "MAX_BYTES", 150_000)
    write_finding(finding("large", 2000), copied / "analysis", ABOUT)
    write_page(copied, ABOUT)
    shown = read(copied)
    assert shown.size <= 150_000
    assert "All numbers are in analysis/large.csv: they would make this page too large." in shown.text
    assert "analysis/analysis_1.csv" not in shown.text, "smaller ones stay"
    assert len(shown.all("img")) == 5
    monkeypatch.setattr(page, "MAX_BYTES", 60_000)
    write_page(copied, ABOUT)
    shown = read(copied)
    assert shown.size <= 60_000
    assert "too large" in shown.text
    assert 0 < len(shown.all("img")) < 5


@pytest.mark.parametrize("with_scores", [False, True])
def test_findings_without_scores_stay_when_others_are_measured(with_scores: bool, tmp_path: Path):
    write_finding(finding("first"), tmp_path, ABOUT, with_scores=with_scores)
    remeasured = replace(ABOUT, measured_on=dict.fromkeys(TASKS, "9z"))
    assert [stored.name for stored in read_findings(tmp_path, ABOUT)] == ["first"]
    assert [stored.name for stored in read_findings(tmp_path, remeasured)] == ([] if with_scores else ["first"])
    assert not read_findings(tmp_path, replace(ABOUT, deltas=dict.fromkeys(TASKS, "9z")))


def test_a_report_of_an_older_version(tmp_path: Path):
    """It has neither a title, nor what its scores are, nor the deltas that it is about."""
    row = scores({"topic": 0.5})
    write_report(Comparison(["topic"], row, row, row, comparison().method), tmp_path, ABOUT)
    text = (tmp_path / "report.json").read_text()
    for name in ("title", "fractions", "deltas"):
        text = text.replace(f'"{name}"', f'"{name}_"')
    (tmp_path / "report.json").write_text(text)
    write_page(tmp_path, ABOUT)
    shown = read(tmp_path)
    assert "1 tasks merged with DRM" in shown.text
    assert "50.0" in shown.cells
