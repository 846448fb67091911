"""Configurations by name, wherever the command is run."""

from pathlib import Path

import pytest
import yaml

from lightning_drm.cli.config_files import own_configs, with_own_configs
from lightning_drm.cli.main import is_file_merge, main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("option", [["--config", "{}"], ["-c", "{}"], ["--config={}"]], ids=" ".join)
@pytest.mark.parametrize("name", ["quickstart.yaml", "configs/quickstart.yaml", "strategy/ddp.yaml"])
def test_a_configuration_of_the_package_needs_no_path(option: list[str], name: str):
    words = ["fit", *(word.format(name) for word in option), "--seed_everything", "1"]
    path = own_configs() / name.removeprefix("configs/")
    assert path.is_file()
    assert with_own_configs(words) == ["fit", *(word.format(path) for word in option), "--seed_everything", "1"]


def test_a_file_that_lies_here_counts_first(tmp_path: Path):
    Path("quickstart.yaml").write_text("seed_everything: 1\n")
    words = ["--config", "quickstart.yaml", "--config", "{seed_everything: 2}", "--config", "study.yaml"]
    assert with_own_configs(words) == [*words[:-1], str(own_configs() / "study.yaml")]


def test_the_commands_take_them(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "quickstart.yaml", "--config", "method/ties.yaml", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["drm"]["method"]["class_path"] == "lightning_drm.TIES"
    assert set(printed["data"]["tasks"]) == {"news_topic", "word_valence", "emoji_language", "part_of_speech"}


def test_a_merge_of_files_takes_them(capsys: pytest.CaptureFixture):
    words = ["merge", "--config", "method/ties.yaml", "--models.a", "nowhere", "--base", "nowhere", "--output", "out"]
    assert is_file_merge(words)
    with pytest.raises(SystemExit):
        main(words)
    assert "a: nowhere is no file or folder here" in capsys.readouterr().err


def test_a_name_that_is_neither(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "quickstrat.yaml"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("lightning-drm: There is no configuration quickstrat.yaml, here or among the package's own")
    assert "method/ties.yaml" in said
