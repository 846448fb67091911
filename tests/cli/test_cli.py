"""The command line on one small pretrained model and local text files: fit, merge, test, and what it refuses."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from helpers.run import Run
from helpers.tiny import KINDS
from lightning_drm.cli.main import main
from lightning_drm.training import settings


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def test_fit_leaves_the_run_folder_of_the_contract(finished: Run):
    run = finished.folder
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "tasks/color/deltas.safetensors",
        "tasks/color/head.safetensors",
        "tasks/color/metrics.json",
        "tasks/pet/deltas.safetensors",
        "merged/model.safetensors",
        "merged/config.json",
        "merged/tokenizer.json",
        "merged/heads/color.safetensors",
        "merged/heads/pet.safetensors",
        "merged/README.md",
        "report.json",
        "report.md",
        "report.png",
        "report.html",
    } <= files
    assert not [name for name in files if Path(name).name.startswith(".")], "temporary files stayed"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 40


def test_only_the_configuration_says_where_things_lie(finished: Run):
    """A run's tasks and its merged model may be handed on; the base and the data are found by config.yaml."""
    place = str(finished.config.parent).encode()
    holding = {
        str(path.relative_to(finished.folder))
        for path in finished.folder.rglob("*")
        if path.is_file() and place in path.read_bytes()
    }
    assert holding == {"config.yaml"}
    with safe_open(finished.folder / "tasks" / "pet" / "deltas.safetensors", framework="pt") as file:
        kept = json.loads(file.metadata()["settings"])
    assert re.fullmatch(r"base \([0-9a-f]{8}\)", kept["model.backbone"])
    assert re.fullmatch(r"pet\.csv \([0-9a-f]{8}\)", kept["data.dataset"])


def test_settings_of_older_versions_are_the_same():
    """They hold whole paths, and lack settings that there are now."""
    stored = {"model.backbone": "/models/base", "data.dataset": "/data/a/b.csv", "seed": 0}
    current = {name: settings._without_path(value) for name, value in stored.items()}
    assert current["model.backbone"].startswith("base (")
    assert settings.changed_settings(stored, current) == []
    assert settings.changed_settings(stored, {**current, "model.trust_remote_code": False}) == []
    told = settings.changed_settings(stored, {**current, "model.trust_remote_code": True})
    assert told == ["model.trust_remote_code: False → True"]
    (change,) = settings.changed_settings({**stored, "data.dataset": "/data/c/b.csv"}, current)
    assert re.fullmatch(r"data\.dataset: b\.csv \([0-9a-f]{8}\) → b\.csv \([0-9a-f]{8}\)", change)


def test_report_compares_base_individual_and_merged(finished: Run):
    content = report(finished.folder)
    assert content["schema"] == 2
    assert content["tasks"] == list(KINDS)
    assert content["method"]["class_path"] == "lightning_drm.DRM"
    assert content["method"]["init_args"]["density"] == 0.2
    for row in ("base", "individual", "merged"):
        values = content["accuracy"][row]
        assert values["average"] == pytest.approx((values["color"] + values["pet"]) / 2)
        assert all(0 <= value <= 1 for value in values.values())
    assert content["accuracy"]["individual"]["average"] > 0.9, "a telling word in each text is easily learned"
    assert content["metrics"] == {task: {"name": "accuracy", "higher_is_better": True} for task in KINDS}
    assert content["scores"] == content["accuracy"]
    low, high = content["intervals"]["merged"]["pet"]
    assert 0 <= low <= content["scores"]["merged"]["pet"] <= high <= 1
    ratio = content["accuracy"]["merged"]["pet"] / content["accuracy"]["individual"]["pet"]
    assert content["normalized"]["pet"] == pytest.approx(ratio)


def test_the_merged_folder_is_a_pretrained_model(finished: Run):
    merged = finished.folder / "merged"
    model = AutoModel.from_pretrained(merged)
    inputs = AutoTokenizer.from_pretrained(merged)("red cat", return_tensors="pt")
    assert torch.isfinite(model(**inputs).last_hidden_state).all()


def test_a_second_fit_trains_nothing_and_reports_the_same(copied: Run, capsys: pytest.CaptureFixture):
    run = copied.folder
    before, deltas = report(run), (run / "tasks/pet/deltas.safetensors").stat().st_mtime_ns
    main(["fit", *copied.words])
    assert (run / "tasks/pet/deltas.safetensors").stat().st_mtime_ns == deltas
    assert report(run) == before
    output = capsys.readouterr().out
    assert "pet: finetuned before" in output
    assert "normalized" in output


def test_merge_tries_another_method_without_training(copied: Run):
    run = copied.folder
    deltas = (run / "tasks/pet/deltas.safetensors").stat().st_mtime_ns
    individual = report(run)["accuracy"]["individual"]
    main(["merge", *copied.words, "--drm.method", "TIES", "--drm.method.density", "0.3"])
    assert report(run)["method"] == {
        "class_path": "lightning_drm.TIES",
        "init_args": {"density": 0.3, "scope": "global", "scale": 1.0, "space": "entries"},
        "coefficients": {"color": 1.0, "pet": 1.0},
        "convolutions": "average",
        "non_matrix": "average",
        "overrides": [],
    }
    assert report(run)["accuracy"]["individual"] == individual
    assert (run / "tasks/pet/deltas.safetensors").stat().st_mtime_ns == deltas
    main(["merge", *copied.words])
    assert report(run)["method"]["class_path"] == "lightning_drm.DRM"


def test_a_users_own_method_is_called_by_its_module(copied: Run):
    main(["merge", *copied.words, "--drm.method", "helpers.own_method.Largest"])
    assert report(copied.folder)["method"]["class_path"] == "helpers.own_method.Largest"
    assert "`helpers.own_method.Largest`: `density=0.75`" in (copied.folder / "report.md").read_text()
    assert "class is `helpers.own_method.Largest`" in (copied.folder / "merged" / "README.md").read_text()


def test_test_measures_the_same_again(copied: Run):
    before = report(copied.folder)
    (copied.folder / "report.json").unlink()
    main(["test", *copied.words])
    assert report(copied.folder) == before


def test_loggers_get_the_comparison(finished: Run):
    logged = "".join(path.read_text() for path in finished.config.parent.rglob("metrics.csv"))
    assert "merge/merged/color" in logged
    assert "merge/normalized/average" in logged


def test_only_trains_one_task_and_then_merge_completes(unfinished: Run, finished: Run, capsys: pytest.CaptureFixture):
    command = unfinished.words
    main(["fit", *command, "--only", "pet"])
    assert "color still to be finetuned" in capsys.readouterr().out
    assert not (unfinished.folder / "merged").exists()
    with pytest.raises(SystemExit):
        main(["merge", *command])
    assert "has no finetune of color: run `fit` first" in capsys.readouterr().err
    main(["fit", *command, "--only", "[color]"])
    assert "`merge` comes next" in capsys.readouterr().out
    main(["merge", *command])
    assert report(unfinished.folder) == report(finished.folder), "each task is seeded on its own"


def test_lora_goes_the_same_way(unfinished: Run, tmp_path: Path):
    lora = tmp_path / "lora.yaml"
    adapters = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "dense"]}
    lora.write_text(yaml.safe_dump({"model": {"init_args": {"lora": adapters}}}))
    command = [*unfinished.words, "--config", str(lora)]
    main(["fit", *command])
    before = report(unfinished.folder)
    assert before["accuracy"]["individual"]["average"] > 0.9
    stored = load_file(unfinished.folder / "tasks/pet/deltas.safetensors")
    assert stored
    assert all(name.endswith(("::up", "::down")) for name in stored)
    main(["test", *command])
    assert report(unfinished.folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.optimizer.init_args.lr", "0.1"], r"model.optimizer.init_args.lr: 0.005 → 0.1"),
        (["--seed_everything", "1"], r"seed: 0 → 1"),
        (["--trainer.max_steps", "5"], r"trainer.max_steps: 40 → 5"),
        (["--only", "[bird]"], r"No task 'bird' to finetune; tasks: color, pet"),
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
    finished: Run, capsys: pytest.CaptureFixture, arguments: list[str], message: str
):
    before = (finished.folder / "config.yaml").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *finished.words, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert (finished.folder / "config.yaml").read_text() == before


def test_values_of_all_kinds_are_told_apart():
    class Data(LightningDataModule):
        def __init__(self, value: object) -> None:
            super().__init__()
            self.save_hyperparameters()

    def of(value: object) -> settings.Settings:
        return settings.finetune_settings(LightningModule(), Data(value), {}, 0)

    pairs = [
        (Path("/data/a"), Path("/data/b")), (np.int64(3), np.int64(5)), (torch.float32, torch.bfloat16),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 9.0])), (np.zeros(2), np.ones(2)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
    ]  # fmt: skip
    for one, other in pairs:
        assert settings.changed_settings(of(one), of(copy.deepcopy(one))) == []
        assert len(settings.changed_settings(of(one), of(other))) == 1
    assert of("")["data.value"] == "", "it is no name of the folder in which the command is given"
    before = {**of(Path("/data/a")), "data.value": "pathlib.PosixPath"}  # what older versions kept
    assert settings.changed_settings(before, of(Path("/data/a"))) == []


def test_callbacks_count_that_change_what_is_trained():
    def of(*callbacks: Callback, averaged: bool = False) -> settings.Settings:
        return settings.callback_settings(callbacks, averaged=averaged)

    monitors, none = LearningRateMonitor(), of()
    assert of(monitors) == none
    pairs = [
        (EarlyStopping("a", patience=3), EarlyStopping("a", patience=5), "callbacks.EarlyStopping.patience: 3 → 5"),
        (EarlyStopping("loss"), EarlyStopping("loss", check_on_train_epoch_end=True),
         "callbacks.EarlyStopping.check_on_train_epoch_end: None → True"),
        (GradientAccumulationScheduler({0: 2}), GradientAccumulationScheduler({0: 4}),
         "callbacks.GradientAccumulationScheduler.scheduling.0: 2 → 4"),
        (StochasticWeightAveraging(0.1), StochasticWeightAveraging(0.2),
         "callbacks.StochasticWeightAveraging.swa_lrs: 0.1 → 0.2"),
    ]  # fmt: skip
    for one, other, line in pairs:
        assert settings.changed_settings(of(one), of(monitors, copy.deepcopy(one))) == []
        assert settings.changed_settings(of(one), of(other)) == [line]
        assert settings.changed_settings(of(one), none) == [f"callbacks: {type(one).__name__} → none"]
        assert settings.changed_settings({}, of(one)) == [], "older versions did not keep them"
    like_a_path = of(EarlyStopping("score/pet/f1"))
    assert settings.changed_settings(like_a_path, like_a_path) == []
    monitored = {"weights.monitor": "score/pet/f1 (max)"}
    assert settings.changed_settings(monitored, monitored) == []
    two = [EarlyStopping("a"), EarlyStopping("b")]
    assert settings.changed_settings(of(*two), of(EarlyStopping("c"), two[1])) == [
        "callbacks.EarlyStopping.monitor: a → c"
    ]
    assert settings.changed_settings(of(*two), of(two[0], EarlyStopping("c"))) == [
        "callbacks.EarlyStopping_1.monitor: b → c"
    ]
    slow, fast = (EMAWeightAveraging(decay=decay) for decay in (0.99, 0.9))
    assert of(slow) == none, "the last step's weights do not depend on it"
    lines = settings.changed_settings(of(slow, averaged=True), of(fast, averaged=True))
    assert lines == ["callbacks.EMAWeightAveraging.avg_fn.decay: 0.99 → 0.9"]


def test_a_finished_task_is_kept_from_another_early_stopping(unfinished: Run, capsys: pytest.CaptureFixture):
    def fit(patience: int) -> None:
        stopping = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "train_loss"]
        words = [*stopping, "--trainer.callbacks.patience", str(patience), "--trainer.callbacks.strict", "false"]
        main(["fit", *unfinished.words, "--only", "pet", "--trainer.max_steps", "1", *words])

    fit(3)
    with pytest.raises(SystemExit):
        fit(4)
    assert "pet: callbacks.EarlyStopping.patience: 3 → 4" in capsys.readouterr().err


def test_all_rows_are_of_one_module(copied: Run, capsys: pytest.CaptureFixture):
    """A setting that changes what the module computes changes the finetunes' scores, too."""
    before = report(copied.folder)["scores"]
    for pooling, scores_are_equal in (("first", False), ("mean", True)):
        main(["merge", *copied.words, "--model.pooling", pooling])
        assert capsys.readouterr().out.count("so it is measured again") == 2
        after = report(copied.folder)["scores"]
        assert (after["individual"] == before["individual"]) is scores_are_equal
        assert (after == before) is scores_are_equal
    main(["merge", *copied.words])
    assert "measured again" not in capsys.readouterr().out


def test_retrain_makes_changed_settings_possible(unfinished: Run):
    command = ["fit", *unfinished.words, "--only", "pet"]
    main([*command, "--trainer.max_steps", "1"])
    main([*command, "--trainer.max_steps", "2", "--retrain", "true"])
    vector = (unfinished.folder / "tasks/pet/deltas.safetensors").read_bytes()
    assert b'trainer.max_steps\\": 2' in vector or b'trainer.max_steps\\\\\\": 2' in vector


def test_what_lightning_refuses_is_said_in_a_sentence(finished: Run, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *finished.words, "--trainer.accelerator", "tpu"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1].startswith("lightning-drm: ")
    assert "Traceback" not in said
