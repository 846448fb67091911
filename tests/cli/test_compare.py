"""`compare` on the command line: how methods are given, and what is said of wrong ones."""

import json
from pathlib import Path

import pytest
import yaml

from helpers.mistakes import METHODS, said
from helpers.run import Run
from lightning_drm.cli.main import main

CONFIGURED, TIES = "DRM, horizontal, density 0.2", "TIES, density 0.2"


def methods(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())["methods"]


def test_names_files_and_settings(copied: Run, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["compare", *copied.words]
    main([*words, "--methods", "DRM", "TIES", "helpers.own_method.Largest", "--split", "test"])
    found = methods(copied.folder)
    assert list(found) == [CONFIGURED, TIES, "Largest, density 0.75"]
    assert {entry["split"] for entry in found.values()} == {"test"}
    printed = capsys.readouterr().out
    assert "Test accuracy, 3 methods" in printed
    assert "\nTIES, density 0.2 ━" in printed, "a bar says which method is measured"
    main([*words, "--methods", "[{class_path: DRM, init_args: {density: 0.3}}, TIES]"])
    assert list(methods(copied.folder)) == [CONFIGURED, "DRM, horizontal, density 0.3", TIES]
    (tmp_path / "methods.yaml").write_text(
        yaml.safe_dump({"methods": [{"class_path": "lightning_drm.TIES", "init_args": {"density": 0.9}}]})
    )
    main([*words, "--config", str(tmp_path / "methods.yaml")])
    assert list(methods(copied.folder)) == [CONFIGURED, "TIES, density 0.9"]
    out = capsys.readouterr()
    assert "\nTIES, density 0.9 ━" in out.out, "on validation sets too"
    assert "GPU available" not in out.out + out.err
    assert "Tip" not in out.out + out.err


def test_the_runs_own_configuration_serves_every_subcommand(copied: Run):
    """As the commands on the report's page have it."""
    config = ["--config", str(copied.folder / "config.yaml"), "--drm.dirpath", str(copied.folder)]
    main(["compare", *config, "--methods", "TIES"])
    main(["test", *config])
    assert list(methods(copied.folder)) == [CONFIGURED, TIES]
    page = (copied.folder / "report.html").read_text()
    assert "lightning-drm fit --config config.yaml --base_batches 40" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DMR", "TIES"], f"methods: There is no method 'DMR'; the methods are {METHODS}, and one of your own"),
        (["torch.nn.Linear"], f"methods: torch.nn.Linear is not a method; the methods are {METHODS}"),
        (["TIES", "TIES"], "methods: TIES, density 0.2 is given twice."),
        (["DRM"], f"methods: expected at least one to compare with the configured one, which is {CONFIGURED}."),
        (["[{class_path: DRM, init_args: {density: 3}}]"], "DRM: density must be in (0, 1], got 3.0."),
        (["[{class_path: DRM, init_args: {densty: 1}}]"], "methods: lightning_drm.DRM has no argument 'densty'."),
        (["TIES", "--split", "train"], "split: expected one of validation, test, got 'train'."),
    ],
)
def test_mistakes(words: list[str], message: str, finished: Run, capsys: pytest.CaptureFixture):
    assert said(["compare", *finished.words, "--methods", *words], capsys).startswith(message)
