"""README's code is the code that runs."""

import re
from pathlib import Path

import pytest

from helpers.pages import ROOT, blocks, named_files
from lightning_drm.cli.trainer import MergeCLI

README = ROOT / "README.md"


def test_the_first_two_commands_are_one_line_each():
    fit, test = blocks(README, "bash")[:2]
    assert fit.text == "pip install -e '.[quickstart]' && lightning-drm fit --config configs/quickstart.yaml\n"
    assert test.text == "pip install -e '.[test]' && pytest -n 2\n"


def test_every_configuration_and_example_named_exists():
    named = named_files(README)
    assert {"configs/quickstart.yaml", "configs/quickstart_lora.yaml"} <= named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_subcommand_named_exists():
    named = set(re.findall(r"lightning-drm (\w+)", README.read_text()))
    assert named <= set(MergeCLI.subcommands())


@pytest.mark.slow
def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(README, "python")
    example = block.text
    assert len([line for line in example.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    for said, shorter in (("max_steps=100", "max_steps=2"), ("Task(name)", "Task(name, max_eval_samples=100)")):
        assert said in example
        example = example.replace(said, shorter)
    exec(example, {})
    output = capsys.readouterr().out
    assert "accuracy/news_topic" in output
    assert "accuracy/word_valence" in output
