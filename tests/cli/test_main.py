"""Which form of the command line is meant, its help, how soon it starts, and what it lets other libraries say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_drm
from helpers.run import Run
from lightning_drm.cli.main import is_file_merge, main
from lightning_drm.cli.overview import OVERVIEW, SUBCOMMANDS
from lightning_drm.cli.trainer import MergeCLI

ROOT = Path(__file__).parents[2]


def test_which_form_a_command_line_has(tmp_path):
    bare, full = tmp_path / "bare.yaml", tmp_path / "full.yaml"
    bare.write_text("base: x\nmodels: {a: y}\n")
    full.write_text("model: {class_path: X}\n")
    assert is_file_merge(["merge", "--models.a", "x"])
    assert is_file_merge(["merge", "--base=x"])
    assert is_file_merge(["merge", f"--config={bare}"])
    assert is_file_merge(["merge", "--config", str(full), "--config", str(bare)])
    assert not is_file_merge(["merge", "--config", str(full)])
    assert not is_file_merge(["fit", "--config", str(bare)])
    assert not is_file_merge(["merge", "--model.backbone", "x"])
    assert not is_file_merge([])


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_the_overview_is_shown(words: list[str], capsys: pytest.CaptureFixture):
    main(words)
    assert capsys.readouterr() == (OVERVIEW, "")


def test_the_overview_tells_of_every_subcommand():
    assert set(SUBCOMMANDS) == set(MergeCLI.subcommands())
    assert f"{{{','.join(SUBCOMMANDS)}}}" in OVERVIEW
    for subcommand in SUBCOMMANDS:
        assert f"\n  {subcommand} " in OVERVIEW
        assert f"lightning-drm {subcommand} --" in OVERVIEW
    named = re.findall(r"configs/[\w/*]+\.yaml", OVERVIEW)
    assert named
    assert all(list(ROOT.glob(name)) for name in named)
    assert max(map(len, OVERVIEW.splitlines())) <= 120


def test_version(capsys: pytest.CaptureFixture):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-drm {lightning_drm.__version__}\n"


def test_an_unknown_subcommand_is_refused_by_name(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["fitt", "--config", "x"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == f"lightning-drm: There is no subcommand 'fitt'; the subcommands are {', '.join(SUBCOMMANDS)}.\n"


def shown_help(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_of_fit_lists_its_options(capsys: pytest.CaptureFixture):
    shown = shown_help(capsys, "fit")
    assert "Finetune this task, or these" in shown
    for option in ("--only", "--retrain", "--trainer.max_steps", "--drm.method", "--data.tasks", "--model"):
        assert f"{option} " in shown


def test_help_of_merge_shows_both_forms(capsys: pytest.CaptureFixture):
    shown = shown_help(capsys, "merge")
    forms, of_files, of_a_run = shown.split("usage: ")
    assert "from files: " in forms
    assert "from a run: " in forms
    for option in ("--base", "--models", "--output", "--dry_run", "--drm.method"):
        assert f"{option} " in of_files
    for option in ("--trainer.max_steps", "--drm.method", "--drm.dirpath", "--data.tasks"):
        assert f"{option} " in of_a_run
    assert "--base " not in of_a_run


def test_help_of_a_merge_of_files_shows_that_form_alone(capsys: pytest.CaptureFixture):
    shown = shown_help(capsys, "merge", "--base", "x")
    assert "--dry_run " in shown
    assert "--trainer" not in shown


LIST = "import sys; from lightning_drm.cli.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"


def imported(*words: str) -> tuple[str, set[str]]:
    """What a command prints, and the modules that it imports."""
    done = subprocess.run([sys.executable, "-c", LIST, *words], capture_output=True, text=True, check=True)
    return done.stdout, set(done.stderr.split())


@pytest.mark.processes
@pytest.mark.parametrize("words", [[], ["--help"], ["--version"]])
def test_help_waits_for_nothing(words: list[str]):
    shown, modules = imported(*words)
    assert shown.startswith("lightning-drm " if words == ["--version"] else "usage: lightning-drm")
    assert "lightning_drm.cli.main" in modules
    assert not modules & {"torch", "lightning", "transformers", "jsonargparse", "yaml", "rich", "numpy"}


KEEPS_OPEN = """
import sys
from lightning_drm.cli import main
class Logger:
    def __del__(self):
        self.file.close()
def run():
    logger = Logger()
    logger.itself, logger.file = logger, open(sys.argv[1], "w")
    logger.file.write("last words")
main._keep_imports(None)  # as a command does, before it runs
run()
"""


@pytest.mark.processes
def test_files_that_only_garbage_holds_are_closed_in_the_end(tmp_path: Path):
    subprocess.run([sys.executable, "-c", KEEPS_OPEN, tmp_path / "log"], check=True)
    assert (tmp_path / "log").read_text() == "last words"


@pytest.mark.processes
def test_a_dry_run_of_files_imports_only_what_it_needs(files: Path, tmp_path: Path):
    base, tuned = str(files / "base"), str(files / "sst2")
    shown, modules = imported(
        "merge", "--base", base, "--models.a", tuned, "--output", str(tmp_path / "o"), "--dry_run"
    )
    assert "GB of memory" in shown
    for package in ("lightning", "datasets", "torchmetrics", "peft", "bitsandbytes", "sklearn", "matplotlib"):
        assert package not in modules
    families = {module for module in modules if re.fullmatch(r"transformers\.models\.\w+\.modeling_\w+", module)}
    only_names = {"transformers.models.auto.modeling_auto"}
    assert families - only_names == {"transformers.models.bert.modeling_bert"}


@pytest.mark.processes
def test_nothing_of_other_libraries_is_printed(finished: Run, files: Path, tmp_path: Path):
    """With what makes them talk: Lightning's default logger, LoRA, few workers, few batches, progress bars."""
    content = yaml.safe_load(finished.config.read_text())
    del content["trainer"]["logger"]
    content["trainer"] |= {"max_steps": 2, "limit_val_batches": 1, "default_root_dir": str(tmp_path)}
    content["drm"]["dirpath"] = str(tmp_path / "run")
    content["model"]["init_args"]["lora"] = {"r": 2, "lora_alpha": 4, "target_modules": ["query"]}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(content))
    script = str(Path(sys.executable).with_name("lightning-drm"))
    fit = [script, "fit", "--config", str(tmp_path / "lora.yaml")]
    adapter = ["--base", str(files / "base"), "--models.a", str(files / "adapter")]
    merge = [sys.executable, "-m", "lightning_drm", "merge", *adapter, "--output", str(tmp_path / "out")]
    captured = {"capture_output": True, "text": True, "cwd": tmp_path}
    for command in (fit, merge):
        done = subprocess.run(command, check=True, **captured)
        assert [line for line in done.stderr.splitlines() if not line.startswith("merging with ")] == []
        assert not re.search(r"Warning|site-packages|INFO|DEBUG", done.stdout)
    refused = subprocess.run([*merge, "--overwrite", "true", "--drm.method.density", "2"], **captured)
    assert refused.returncode == 2
    (said,) = refused.stderr.splitlines()
    assert said.startswith("lightning-drm: ")
    assert "density must be in" in said
