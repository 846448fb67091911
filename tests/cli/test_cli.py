"""The command line on one small pretrained model and local text files: fit, merge, test, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny import KINDS, save_run_config
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from lightning_drm.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of two tasks, finetuned in a few steps each."""
    return save_run_config(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """The run folder after ``fit``."""
    main(["fit", "--config", str(config)])
    return config.parent / "run"


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def test_fit_leaves_the_run_folder_of_the_contract(run: Path):
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "tasks/colour/deltas.safetensors",
        "tasks/colour/head.safetensors",
        "tasks/colour/metrics.json",
        "tasks/pet/deltas.safetensors",
        "merged/model.safetensors",
        "merged/config.json",
        "merged/tokenizer.json",
        "merged/heads/colour.safetensors",
        "merged/heads/pet.safetensors",
        "merged/README.md",
        "report.json",
        "report.md",
        "report.png",
    } <= files
    assert not [name for name in files if Path(name).name.startswith(".")], "temporary files stayed"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 40


def test_report_compares_base_individual_and_merged(run: Path):
    content = report(run)
    assert content["schema"] == 1
    assert content["tasks"] == list(KINDS)
    assert content["method"]["class_path"] == "lightning_drm.DRM"
    assert content["method"]["init_args"]["density"] == 0.2
    for row in ("base", "individual", "merged"):
        values = content["accuracy"][row]
        assert values["average"] == pytest.approx((values["colour"] + values["pet"]) / 2)
        assert all(0 <= value <= 1 for value in values.values())
    assert content["accuracy"]["individual"]["average"] > 0.9, "a telling word in each text is easily learned"
    ratio = content["accuracy"]["merged"]["pet"] / content["accuracy"]["individual"]["pet"]
    assert content["normalized"]["pet"] == pytest.approx(ratio)


def test_the_merged_folder_is_a_pretrained_model(run: Path):
    model = AutoModel.from_pretrained(run / "merged")
    inputs = AutoTokenizer.from_pretrained(run / "merged")("red cat", return_tensors="pt")
    assert torch.isfinite(model(**inputs).last_hidden_state).all()


def test_a_second_fit_trains_nothing_and_reports_the_same(run: Path, config: Path, capsys: pytest.CaptureFixture):
    before, deltas = report(run), (run / "tasks/pet/deltas.safetensors").stat().st_mtime_ns
    main(["fit", "--config", str(config)])
    assert (run / "tasks/pet/deltas.safetensors").stat().st_mtime_ns == deltas
    assert report(run) == before
    output = capsys.readouterr().out
    assert "pet: finetuned before" in output
    assert "normalized" in output


def test_merge_tries_another_method_without_training(run: Path, config: Path):
    deltas = (run / "tasks/pet/deltas.safetensors").stat().st_mtime_ns
    individual = report(run)["accuracy"]["individual"]
    main(["merge", "--config", str(config), "--drm.method", "TIES", "--drm.method.density", "0.3"])
    assert report(run)["method"] == {
        "class_path": "lightning_drm.TIES",
        "init_args": {"density": 0.3, "scope": "global", "scale": 1.0},
        "coefficients": {"colour": 1.0, "pet": 1.0},
        "convolutions": "average",
        "non_matrix": "average",
        "overrides": [],
    }
    assert report(run)["accuracy"]["individual"] == individual
    assert (run / "tasks/pet/deltas.safetensors").stat().st_mtime_ns == deltas
    main(["merge", "--config", str(config)])
    assert report(run)["method"]["class_path"] == "lightning_drm.DRM"


@pytest.mark.parametrize("option", [["--drm.method", "TaskArithmetic"], ["--drm.method=lightning_drm.TaskArithmetic"]])
def test_a_method_named_on_the_command_line_has_its_own_defaults(option: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["merge", "--config", str(CONFIGS / "quickstart.yaml"), *option, "--print_config"])
    method = yaml.safe_load(capsys.readouterr().out)["drm"]["method"]
    assert method == {"class_path": "lightning_drm.TaskArithmetic", "init_args": {"scale": 0.4}}


def test_an_optimizer_has_its_own_defaults(capsys: pytest.CaptureFixture):
    """AdamW, which is used where none is named, decays weights by 0.01; SGD does not."""
    words = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", "0.1"]
    with pytest.raises(SystemExit):
        main(["fit", "--model", "lightning_drm.TransformerTask", "--model.backbone", "base", *words, "--print_config"])
    chosen = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert chosen["class_path"] == "torch.optim.SGD"
    assert chosen["init_args"]["weight_decay"] == 0


def test_test_measures_the_same_again(run: Path, config: Path):
    before = report(run)
    (run / "report.json").unlink()
    main(["test", "--config", str(config)])
    assert report(run) == before


def test_loggers_get_the_comparison(run: Path):
    logged = "".join(path.read_text() for path in run.parent.rglob("metrics.csv"))
    assert "merge/merged/colour" in logged
    assert "merge/normalized/average" in logged


def test_only_trains_one_task_and_then_merge_completes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    command = ["--config", str(config), "--drm.dirpath", str(tmp_path / "run")]
    main(["fit", *command, "--only", "pet"])
    assert "colour still to be finetuned" in capsys.readouterr().out
    assert not (tmp_path / "run/merged").exists()
    with pytest.raises(SystemExit):
        main(["merge", *command])
    assert "has no finetune of colour: run `fit` first" in capsys.readouterr().err
    main(["fit", *command, "--only", "[colour]"])
    assert "`merge` comes next" in capsys.readouterr().out
    main(["merge", *command])
    assert report(tmp_path / "run") == report(config.parent / "run"), "each task is seeded on its own"


def test_lora_goes_the_same_way(config: Path, tmp_path: Path):
    lora = tmp_path / "lora.yaml"
    adapters = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "dense"]}
    lora.write_text(yaml.safe_dump({"model": {"init_args": {"lora": adapters}}}))
    command = ["--config", str(config), "--config", str(lora), "--drm.dirpath", str(tmp_path / "run")]
    main(["fit", *command])
    before = report(tmp_path / "run")
    assert before["accuracy"]["individual"]["average"] > 0.9
    stored = load_file(tmp_path / "run/tasks/pet/deltas.safetensors")
    assert stored
    assert all(name.endswith(("::up", "::down")) for name in stored)
    main(["test", *command])
    assert report(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.optimizer.init_args.lr", "0.1"], r"model.optimizer.init_args.lr: 0.005 → 0.1"),
        (["--seed_everything", "1"], r"seed: 0 → 1"),
        (["--trainer.max_steps", "5"], r"trainer.max_steps: 40 → 5"),
        (["--only", "[bird]"], r"No task 'bird' to finetune; tasks: colour, pet"),
        (["--drm.coefficients", "{bird: 1.0}"], r"unknown tasks bird"),
        (["--drm.method.density", "2"], r"density"),
        (["--drm.method.densty", "0.3"], r"densty"),
        (["--drm.method", "DMR"], r"DMR"),
        (["--trainer.max_stps", "3"], r"max_stps"),
        (["--ckpt_path", "x"], r"ckpt_path"),
        (["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], r"starts its processes by spawn"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    run: Path, config: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_retrain_makes_changed_settings_possible(config: Path, tmp_path: Path):
    command = ["fit", "--config", str(config), "--drm.dirpath", str(tmp_path / "run"), "--only", "pet"]
    main([*command, "--trainer.max_steps", "1"])
    main([*command, "--trainer.max_steps", "2", "--retrain", "true"])
    vector = (tmp_path / "run/tasks/pet/deltas.safetensors").read_bytes()
    assert b'trainer.max_steps\\": 2' in vector or b'trainer.max_steps\\\\\\": 2' in vector


@pytest.mark.parametrize("subcommand", ["fit", "merge", "test"])
def test_every_shipped_configuration_is_accepted_with_every_subcommand(subcommand: str, capsys: pytest.CaptureFixture):
    quickstarts = sorted(CONFIGS.glob("quickstart*.yaml"))
    overlays = [None, *sorted(CONFIGS.glob("method/*.yaml")), *sorted(CONFIGS.glob("strategy/*.yaml"))]
    assert len(quickstarts) == 2
    for quickstart in quickstarts:
        for overlay in overlays:
            arguments = ["--config", str(quickstart), *(["--config", str(overlay)] if overlay else [])]
            with pytest.raises(SystemExit) as stopped:
                main([subcommand, *arguments, "--print_config"])
            assert stopped.value.code == 0
            assert yaml.safe_load(capsys.readouterr().out)["drm"]["method"]["class_path"].startswith("lightning_drm.")


STRATEGIES = {
    "single_gpu": {"accelerator": "gpu", "devices": 1, "strategy": "auto"},
    "ddp": {"accelerator": "gpu", "devices": "auto", "strategy": "ddp"},
    "fsdp": {"accelerator": "gpu", "devices": "auto", "strategy": "fsdp"},
    "fsdp2": {"accelerator": "gpu", "inference_mode": False},
    "slurm": {"accelerator": "gpu", "devices": "auto", "strategy": "ddp", "enable_progress_bar": False},
}


@pytest.mark.parametrize("subcommand", ["fit", "merge", "test"])
@pytest.mark.parametrize("overlay", STRATEGIES)
def test_strategies_lie_over_any_configuration(overlay: str, subcommand: str, capsys: pytest.CaptureFixture):
    files = ["--config", str(CONFIGS / "quickstart.yaml"), "--config", str(CONFIGS / "strategy" / f"{overlay}.yaml")]
    with pytest.raises(SystemExit):
        main([subcommand, *files, "--print_config"])
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert {name: parsed["trainer"][name] for name in STRATEGIES[overlay]} == STRATEGIES[overlay]
    assert parsed["trainer"]["max_steps"] == 100, "the rest stays"
    if overlay == "fsdp2":
        strategy = parsed["trainer"]["strategy"]
        assert strategy["class_path"] == "lightning.pytorch.strategies.ModelParallelStrategy"
        assert strategy["init_args"]["data_parallel_size"] == parsed["trainer"]["devices"]
        assert strategy["init_args"]["tensor_parallel_size"] == 1
    assert parsed["drm"]["store"] == ("disk" if overlay == "slurm" else "auto")


def test_what_lightning_refuses_is_told_in_a_sentence(config: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(config), "--trainer.accelerator", "tpu"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1].startswith("lightning-drm: ")
    assert "Traceback" not in said


def test_a_merge_of_files_does_not_wait_for_lightning():
    program = (
        "import sys, lightning_drm.cli.checkpoints; print({'lightning', 'datasets', 'torchmetrics'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_it_runs_as_a_module_and_as_a_script():
    environment = {**os.environ, "COLUMNS": "100"}
    module = subprocess.run(
        [sys.executable, "-m", "lightning_drm", "fit", "--help"], capture_output=True, text=True, env=environment
    )
    assert module.returncode == 0
    assert "--only" in module.stdout
    assert "Finetune this task, or these" in module.stdout
    script = Path(sys.executable).with_name("lightning-drm")
    assert "fit,merge,test" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
