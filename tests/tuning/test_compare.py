"""Methods side by side in a real run: the scores of merges, of plain loops, and what is refused or left out."""

import io
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from torch.utils.data import Subset

from helpers.own_method import Largest
from helpers.vectors_run import TASKS, ValidatedTask, VectorsRun
from lightning_drm import DARETIES, DRM, TIES, Average, IsoC, LiNeS, TaskArithmetic
from lightning_drm.evaluation import read_findings
from lightning_drm.fusion import Override
from lightning_drm.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("few_resampled_sets")

METHODS = [
    "DRM, horizontal, density 0.2",
    "DRM, vertical, density 0.2",
    "TIES, density 0.2",
    "DARETIES, density 0.2",
    "TaskArithmetic",
    "Average",
    "IsoC",
    "IsoCTS",
    "TSVM",
    "WUDI",
    "DCMerge, density 0.001",
    "STAR",
    "KnOTS, density 0.2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> VectorsRun:
    """After ``fit``; only read."""
    run = VectorsRun(tmp_path_factory.mktemp("vectors") / "run")
    run.fit()
    assert run.report()["tasks"] == TASKS
    return run


@pytest.fixture
def copied(finished: VectorsRun, tmp_path: Path) -> VectorsRun:
    """The same, to write into."""
    return VectorsRun(shutil.copytree(finished.folder, tmp_path / "run"))


def test_scores_are_those_of_merge_and_test(copied: VectorsRun):
    others = [TIES(density=0.5), IsoC(), LiNeS(IsoC(), beta=0.3)]
    found = copied.compare(*others, configured=DRM("vertical"), split="test")
    assert list(found) == ["DRM, vertical, density 0.2", "TIES, density 0.5", "IsoC", "LiNeS of IsoC, beta 0.3"]
    for method, entry in zip([DRM("vertical"), *others], found.values(), strict=True):
        copied.merge(method)
        copied.test(method)
        report = copied.report()
        assert entry["scores"] == report["scores"]["merged"]
        assert entry["intervals"] == report["intervals"]["merged"]
        assert entry["normalized"] == report["normalized"]
        assert entry["split"] == "test"
        assert {name: entry[name] for name in report["method"]} == report["method"]


def plain_accuracy(run: VectorsRun, task: str, deltas: dict[str, torch.Tensor]) -> float:
    """The share of right answers on a task's validation set, of the base plus some deltas under the task's head."""
    module = ValidatedTask()
    state = {name: value + deltas.get(name, 0) for name, value in module.state_dict().items()}
    state |= load_file(run.folder / "tasks" / task / "head.safetensors")
    module.load_state_dict(state)
    x, y = run.data.tasks[task].validation.tensors
    with torch.no_grad():
        return float((module(x).argmax(1) == y).double().mean())


def test_on_the_validation_sets_it_is_a_plain_loop(copied: VectorsRun):
    found = copied.compare(Average(), TaskArithmetic(0.7))
    assert {entry["split"] for entry in found.values()} == {"validation"}
    deltas = {task: load_file(copied.folder / "tasks" / task / "deltas.safetensors") for task in TASKS}
    total = {name: sum(deltas[task][name].double() for task in TASKS).float() for name in deltas["a"]}
    individual = {task: plain_accuracy(copied, task, deltas[task]) for task in TASKS}
    for title, factor in (("Average", 1 / 3), ("TaskArithmetic, scale 0.7", 0.7)):
        merged = {name: factor * delta for name, delta in total.items()}
        expected = {task: plain_accuracy(copied, task, merged) for task in TASKS}
        assert len(set(expected.values())) == 3, "no two tasks could be mixed up"
        scores, normalized = found[title]["scores"], found[title]["normalized"]
        assert scores == pytest.approx({**expected, "average": sum(expected.values()) / 3}, abs=1e-6)
        ratios = {task: expected[task] / individual[task] for task in TASKS}
        assert normalized == pytest.approx({**ratios, "average": sum(ratios.values()) / 3}, abs=1e-6)


def test_all_methods_by_default_the_configured_one_first(copied: VectorsRun, capsys: pytest.CaptureFixture):
    assert list(copied.compare(configured=DRM(density=0.4))) == ["DRM, horizontal, density 0.4", *METHODS]
    printed = capsys.readouterr().out
    assert "Validation accuracy, 14 methods" in printed
    assert "14 of 14 · KnOTS, density 0.2: average" in printed
    folder = RunFolder(copied.folder)
    (finding,) = read_findings(copied.folder / "compare", folder.made_from(TASKS))
    assert finding.title == "Validation accuracy of 3 tasks, 14 methods"


def test_methods_that_an_override_does_not_fit_are_left_out(copied: VectorsRun, capsys: pytest.CaptureFixture):
    overrides = [Override("backbone.0.weight", density=0.5)]
    assert list(copied.compare(overrides=overrides)) == [title for title in METHODS if "density" in title]
    printed = capsys.readouterr().out
    assert "Average is left out: The override 'backbone.0.weight': Average has no density." in printed


def test_methods_that_do_not_fit_are_refused_by_name(copied: VectorsRun):
    overrides = [Override("backbone.0.weight", density=0.5)]
    with pytest.raises(ValueError, match=r"methods: TIES, density 0\.2 is given twice; IsoC cannot be compared: The o"):
        copied.compare(TIES(), IsoC(), TIES(), overrides=overrides)
    with pytest.raises(ValueError, match=r"methods: expected at least one to compare with .* DRM, horizontal"):
        copied.compare(DRM())
    assert "methods" not in copied.report()


def test_methods_of_one_name_are_told_apart(copied: VectorsRun):
    mine = type("TIES", (Largest,), {"__module__": "mine"})
    found = copied.compare(TIES(), DARETIES(), configured=mine(density=0.2))
    assert list(found) == [
        "TIES, density 0.2 (mine.TIES)",
        "TIES, density 0.2 (lightning_drm.TIES)",
        "DARETIES, density 0.2",
    ]
    assert found["TIES, density 0.2 (mine.TIES)"]["class_path"] == "mine.TIES"


def test_the_report_keeps_them_until_a_task_is_finetuned_again(copied: VectorsRun):
    found = copied.compare(TIES())
    copied.merge(IsoC())
    assert copied.report()["methods"] == found
    copied.test(IsoC())
    assert copied.report()["methods"] == found
    (copied.folder / "report.json").unlink()
    assert copied.compare(Average()) != found
    assert set(copied.report()) == {"schema", "tasks", "metrics", "fractions", "deltas", "measured_on", "methods"}
    copied.fit(lr=0.01, only="b", retrain=True)
    copied.merge(IsoC())
    assert "methods" not in copied.report(), "they are about other deltas"


def test_the_report_keeps_them_until_other_samples_are_tested(copied: VectorsRun):
    copied.compare(TIES())
    data = copied.data
    data.tasks["b"].test = Subset(data.tasks["b"].test, range(20))
    copied.trainer(IsoC()).merge(ValidatedTask(), data)
    assert "methods" not in copied.report()
    copied.merge(IsoC())
    assert "methods" in copied.report(), "the samples are those again"


def test_figures_are_logged_to_tensorboard(copied: VectorsRun, tmp_path: Path):
    copied.compare(TIES(), logger=TensorBoardLogger(tmp_path / "logs"))
    (file,) = (tmp_path / "logs").rglob("events.out.tfevents.*")
    images = {value.tag: value.image for event in events(file) for value in event.summary.value if value.image.width}
    assert list(images) == ["compare/methods"]
    with Image.open(io.BytesIO(images["compare/methods"].encoded_image_string)) as picture:
        assert picture.size == (images["compare/methods"].width, images["compare/methods"].height)
        shades = picture.convert("RGB").getcolors(maxcolors=10**7)
    assert len(shades) > 50, "axes, points and letters"


def events(file: Path) -> Iterator[Event]:
    """What TensorBoard would read: records of a length, its checksum, the event, and its checksum."""
    content = file.read_bytes()
    place = 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        yield Event.FromString(content[place + 12 : place + 12 + length])
        place += length + 16
