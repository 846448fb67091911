"""The ``analyze`` command: what it runs, writes, keeps and refuses."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from helpers.run import Run
from lightning_drm.analysis import STANDARD, chosen_analyses
from lightning_drm.cli.main import main
from lightning_drm.evaluation import read_findings
from lightning_drm.training.run_folder import RunFolder

OWN = "helpers.own_analysis"


def found(run: Run) -> set[str]:
    """The findings of a run folder."""
    folder = RunFolder(run.folder)
    return {stored.name for stored in read_findings(folder.analysis, folder.made_from(["color", "pet"]))}


def analyze(run: Run, *words: str) -> None:
    main(["analyze", *run.words, *words])


def test_all_analyses_are_run_by_default():
    assert [type(analysis) for analysis in chosen_analyses(None, [])] == list(STANDARD)


def test_each_leaves_files_and_one_that_lacks_its_data_is_left_out(analyzed: Run):
    names = found(analyzed)
    assert {name.split("_")[0] for name in names} == {"pruning", "sign", "spectrum", "alignment"}
    for name in names:
        about = json.loads((analyzed.folder / "analysis" / f"{name}.json").read_text())
        assert about["sentence"].endswith(".")
        assert "<svg" in (analyzed.folder / "analysis" / f"{name}.svg").read_text()


def test_some_are_run_by_name(finetuned: Run, capsys: pytest.CaptureFixture):
    analyze(finetuned, "--only", "[pruning_profile,spectrum]")
    assert found(finetuned) == {"pruning_profile", "spectrum", "spectrum_ranks"}
    said = capsys.readouterr().out
    assert "Appendix D's bounds hold in all 12 matrices" in said
    assert str(finetuned.folder / "analysis") in said


def test_options_are_given_with_the_class(finetuned: Run, tmp_path: Path):
    settings = {"class_path": "PruningProfile", "init_args": {"layer": "*.layer.0.*.query.weight", "dropped": 0.3}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"analyses": [settings], "only": "pruning_profile"}))
    analyze(finetuned, "--config", str(tmp_path / "own.yaml"))
    content = (finetuned.folder / "analysis" / "pruning_profile.csv").read_text()
    assert "layer.0.attention.self.query.weight,0.3," in content


def test_deltas_are_studied_without_data(finetuned: Run, tmp_path: Path):
    folder = shutil.copytree(finetuned.config.parent, tmp_path / "moved", ignore=shutil.ignore_patterns("run", "*.csv"))
    text = finetuned.config.read_text().replace(str(finetuned.config.parent), str(folder))
    (folder / finetuned.config.name).write_text(text)
    assert not list(folder.glob("*.csv"))
    analyze(Run(folder / finetuned.config.name, finetuned.folder), "--only", "[spectrum,sign_agreement]")
    assert found(finetuned) == {"sign_agreement", "spectrum", "spectrum_ranks"}


@pytest.mark.parametrize("by_bug", [True, False])
def test_one_that_fails_costs_no_other(finetuned: Run, capsys: pytest.CaptureFixture, by_bug: bool):
    own = json.dumps([{"class_path": f"{OWN}.Failing", "init_args": {"by_bug": by_bug}}, {"class_path": "Spectrum"}])
    words = ["--analyses", own, "--only", "[spectrum,failing]" if by_bug else "[failing,spectrum]"]
    if by_bug:
        with pytest.raises(ZeroDivisionError):
            analyze(finetuned, *words)
    else:
        with pytest.raises(SystemExit) as ended:
            analyze(finetuned, *words)
        assert ended.value.code == 2
        assert "failing: nothing to say of color, pet" in capsys.readouterr().err
    assert found(finetuned) == {"spectrum", "spectrum_ranks"}


def test_a_signal_keeps_what_is_finished(finetuned: Run, capsys: pytest.CaptureFixture):
    own = json.dumps([{"class_path": f"{OWN}.Stopped"}])
    with pytest.raises(SystemExit) as ended:
        analyze(finetuned, "--analyses", own, "--only", "[pruning_profile,stopped]")
    assert ended.value.code == 128 + 15
    assert "the analysis stopped was not finished" in capsys.readouterr().err
    assert found(finetuned) == {"pruning_profile"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "spectra"], "No analysis is called 'spectra'; there are: ablation, "),
        (
            ["--analyses", '[{"class_path": "Spectrum"}, {"class_path": "Spectrum"}]'],
            "spectrum is given more than once",
        ),
        (
            ["--analyses", '[{"class_path": "PruningProfile", "init_args": {"layer": "nothing"}}]'],
            "pruning_profile: no matrix that is merged matches 'nothing'",
        ),
        (
            ["--analyses", '[{"class_path": "Spectrum", "init_args": {"layers": "*"}}]'],
            "'*' matches 12 matrices, and a figure shows 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_first(
    finetuned: Run, capsys: pytest.CaptureFixture, words: list[str], message: str
):
    with pytest.raises(SystemExit) as ended:
        analyze(finetuned, *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert found(finetuned) == set()
