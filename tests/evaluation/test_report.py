"""The report's files, read back as their readers would."""

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from helpers.scores import scores
from lightning_drm.evaluation import (
    Comparison,
    MadeFrom,
    Score,
    logged_metrics,
    markdown,
    report_content,
    terminal_table,
    write_report,
)
from lightning_drm.kinds import MetricInfo

TASKS = ["topic", "valence"]
FILES = ["report.html", "report.json", "report.md", "report.png", "report.svg"]
ABOUT = MadeFrom({"topic": "1a", "valence": "2b"}, {"topic": "3c", "valence": "4d"})
ACCURACY = {
    "base": {"topic": 0.5, "valence": None, "average": None},
    "individual": {"topic": 0.8, "valence": 0.96, "average": pytest.approx(0.88)},
    "merged": {"topic": 0.6, "valence": 0.48, "average": pytest.approx(0.54)},
}


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        tasks=TASKS,
        base=scores({"topic": 0.5, "valence": None}),
        individual=scores({"topic": 0.8, "valence": 0.96}),
        merged=scores({"topic": 0.6, "valence": 0.48}),
        method={"class_path": "lightning_drm.DRM", "init_args": {"direction": "horizontal", "density": 0.2}},
    )


def test_json_has_the_documented_schema(comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path / "run", ABOUT)
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    assert content == {
        "schema": 2,
        "method": {"class_path": "lightning_drm.DRM", "init_args": {"direction": "horizontal", "density": 0.2}},
        "tasks": TASKS,
        "metrics": {task: {"name": "accuracy", "higher_is_better": True} for task in TASKS},
        "scores": ACCURACY,
        "accuracy": ACCURACY,
        "intervals": {row: dict.fromkeys([*TASKS, "average"]) for row in ACCURACY},
        "averaged": TASKS,
        "deltas": {"topic": "1a", "valence": "2b"},
        "measured_on": {"topic": "3c", "valence": "4d"},
        "title": "DRM",
        "fractions": TASKS,
        "normalized": {
            "topic": pytest.approx(0.75),
            "valence": pytest.approx(0.5),
            "average": pytest.approx(0.625),
        },
    }
    assert {**report_content(comparison), **ABOUT.note()} == content
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES


ROWS = [
    ["topic", "50.0", "80.0", "60.0", "75.0"],
    ["valence", "n/a", "96.0", "48.0", "50.0"],
    ["average", "n/a", "88.0", "54.0", "62.5"],
]


def test_markdown(comparison: Comparison) -> None:
    text = markdown(comparison)
    lines = text.splitlines()
    assert lines[0] == "# 2 tasks merged with DRM"
    assert "`direction=horizontal`" in text
    assert "`density=0.2`" in text
    assert "![Test accuracy](report.png)" in text
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["task", "base", "individual", "merged", "normalized"]
    assert table[2:] == ROWS


def test_terminal_table(comparison: Comparison) -> None:
    console = Console(width=100, record=True, force_terminal=False)
    console.print(terminal_table(comparison))
    lines = console.export_text().splitlines()
    assert "merged with DRM" in lines[0]
    cells = [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in lines]
    assert ["task", "base", "individual", "merged", "normalized"] in cells
    assert [row for row in cells if row[0] in (*TASKS, "average")] == ROWS


@pytest.mark.parametrize("count", [1, 8])
def test_picture(tmp_path: Path, count: int) -> None:
    names = [f"task {index}" for index in range(count)]
    accuracy = scores({name: (index + 1) / (count + 1) for index, name in enumerate(names)})
    method = {"class_path": "lightning_drm.TIES", "init_args": {}}
    without_base: dict[str, None] = {}
    write_report(Comparison(names, without_base, accuracy, accuracy, method), tmp_path, ABOUT)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.format == "PNG"
        picture.load()
        width, height = picture.size
        assert 800 <= width <= 3000
        assert 500 <= height <= 1000
        shades = picture.convert("RGB").getcolors(maxcolors=width * height)
    assert shades is not None
    # The picture's ground and two rows of bars: each a color over a visible share of the picture.
    assert sum(number > 0.005 * width * height for number, _ in shades) >= 3


def test_bars_are_as_high_as_the_accuracies(tmp_path: Path) -> None:
    """Counts the pixels of the merged row's color: three times the accuracy, three times the area."""

    def darkest(accuracy: float) -> int:
        row = scores({"a": accuracy})
        write_report(Comparison(["a"], {}, {}, row, {"class_path": "x.DRM", "init_args": {}}), tmp_path, ABOUT)
        with Image.open(tmp_path / "report.png") as picture:
            counted = picture.convert("RGB").getcolors(maxcolors=10**7)
        colored = [(number, color) for number, color in counted or [] if max(color) - min(color) > 40]
        return max(colored)[0]

    assert darkest(0.9) / darkest(0.3) == pytest.approx(3, rel=0.1)


def test_logged_metrics(comparison: Comparison) -> None:
    assert logged_metrics(comparison) == {
        "merge/base/topic": 0.5,
        "merge/individual/topic": 0.8,
        "merge/individual/valence": 0.96,
        "merge/individual/average": pytest.approx(0.88),
        "merge/merged/topic": 0.6,
        "merge/merged/valence": 0.48,
        "merge/merged/average": pytest.approx(0.54),
        "merge/normalized/topic": pytest.approx(0.75),
        "merge/normalized/valence": pytest.approx(0.5),
        "merge/normalized/average": pytest.approx(0.625),
    }


def test_report_is_replaced(comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path, ABOUT)
    other = Comparison(["only"], {}, {}, scores({"only": 1.0}), {"class_path": "x.TSVM", "init_args": {"scale": 1.0}})
    write_report(other, tmp_path, ABOUT)
    assert json.loads((tmp_path / "report.json").read_text())["tasks"] == ["only"]
    assert "TSVM" in (tmp_path / "report.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Brackets are no markup, and a bar is no column."""
    name = "[red] a|b"
    row = scores({name: 0.5})
    comparison = Comparison([name], row, row, row, {"class_path": "x.DRM", "init_args": {}})
    console = Console(width=100, record=True, force_terminal=False)
    console.print(terminal_table(comparison))
    assert name in console.export_text()
    line = next(line for line in markdown(comparison).splitlines() if "red" in line)
    assert line.replace(r"\|", "").count("|") == 6


@pytest.fixture
def mixed() -> Comparison:
    """Tasks of several kinds, with intervals."""
    metrics = {
        "topic": MetricInfo("accuracy", is_fraction=True),
        "cola": MetricInfo("matthews_corr_coef", is_fraction=True),
        "lm": MetricInfo("perplexity", higher_is_better=False),
    }

    def row(**values: float) -> dict[str, Score]:
        return {task: Score(value, metrics[task], (value - 0.04, value + 0.06)) for task, value in values.items()}

    method = {"class_path": "lightning_drm.DRM", "init_args": {}}
    base, individual = row(topic=0.5, cola=-0.1, lm=30.0), row(topic=0.8, cola=0.6, lm=12.0)
    return Comparison(list(metrics), base, individual, row(topic=0.6, cola=0.3, lm=16.0), method)


def test_tasks_of_several_kinds(mixed: Comparison, tmp_path: Path) -> None:
    write_report(mixed, tmp_path, ABOUT)
    content = json.loads((tmp_path / "report.json").read_text())
    assert "accuracy" not in content
    assert content["metrics"]["lm"] == {"name": "perplexity", "higher_is_better": False}
    assert content["intervals"]["merged"]["topic"] == pytest.approx([0.56, 0.66])
    assert content["averaged"] == ["topic", "cola"]
    text = (tmp_path / "report.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert table[0] == ["task", "metric", "base", "individual", "merged", "normalized"]
    assert table[3] == ["cola", "matthews_corr_coef", "-10.0 ±5.0", "60.0 ±5.0", "30.0 ±5.0", "50.0"]
    assert table[4] == ["lm", "perplexity", "30 ±0.05", "12 ±0.05", "16 ±0.05", "75.0"]
    assert table[5][:5] == ["average", "", "20.0 ±3.5", "70.0 ±3.5", "45.0 ±3.5"]
    assert "merged / individual, or individual / merged where lower is better" in text
    assert "Scores are averaged over topic, cola, whose scores are percentages." in text
    assert "Lower is better for lm." in text
    assert "±: half of the 95 % interval over test samples." in text
    console = Console(width=100, record=True, force_terminal=False)
    console.print(terminal_table(mixed))
    printed = console.export_text()
    assert "Test scores, merged with DRM" in printed
    assert "matthews_corr_coef" in printed
    with Image.open(tmp_path / "report.png") as picture:
        picture.load()
        assert picture.size[0] > 1000, "two panels: fractions, and the perplexity"


def test_a_run_without_fractions_has_a_picture_too(tmp_path: Path) -> None:
    row = scores({"a": 3.0, "b": 5.0}, MetricInfo("perplexity", higher_is_better=False))
    write_report(Comparison(["a", "b"], {}, row, row, {"class_path": "x.DRM", "init_args": {}}), tmp_path, ABOUT)
    assert "normalized*: individual / merged, as lower is better" in (tmp_path / "report.md").read_text()
    with Image.open(tmp_path / "report.png") as picture:
        picture.load()
