"""``lightning-drm merge`` without a model or data: options, YAML, overlays, the dry run and its refusals."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.own_method import Largest
from lightning_drm import DRM, IsoC, LiNeS, TaskArithmetic, merge_checkpoints
from lightning_drm.cli.main import main
from lightning_drm.fusion import Override, Recipe
from lightning_drm.fusion.recipe import class_path

CONFIGS = Path(__file__).parents[2] / "configs"


def options(files, output):
    return [
        *("merge", "--base", str(files / "base"), "--models.sst2", str(files / "sst2")),
        *("--models.rte", str(files / "rte"), "--output", str(output)),
    ]


def expected(files, folder, recipe):
    paths = {task: str(files / task) for task in ("sst2", "rte")}
    merge_checkpoints(files / "base", paths, folder, **vars(recipe))
    return load_file(folder / "model.safetensors")


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_options(files, tmp_path, capsys):
    main(
        [
            *options(files, tmp_path / "out"),
            *("--drm.method", "DRM", "--drm.method.density", "0.5", "--coefficients.rte", "0.7"),
            *(
                "--drm.overrides",
                '[{"match": "*.layer.0.*", "coefficients": {"sst2": 2}}]',
                "--drm.non_matrix",
                "elect",
            ),
        ]
    )
    overrides = [Override("*.layer.0.*", coefficients={"sst2": 2.0})]
    recipe = Recipe(DRM(density=0.5), {"rte": 0.7}, non_matrix="elect", overrides=overrides)
    same(load_file(tmp_path / "out" / "model.safetensors"), expected(files, tmp_path / "own", recipe))
    shown = capsys.readouterr().out
    assert "Merged" in shown
    assert "Wrote" in shown


def test_yaml_with_an_overlay(files, tmp_path):
    config = tmp_path / "merge.yaml"
    content = {
        "base": str(files / "base"),
        "models": {task: str(files / task) for task in ("sst2", "rte")},
        "output": str(tmp_path / "out"),
        "coefficients": {"rte": 0.5},
    }
    config.write_text(yaml.safe_dump(content))
    overlay = str(CONFIGS / "method" / "task_arithmetic.yaml")
    main(["merge", "--config", str(config), "--config", overlay, "--drm.method.scale", "0.3"])
    recipe = Recipe(TaskArithmetic(0.3), {"rte": 0.5})
    same(load_file(tmp_path / "out" / "model.safetensors"), expected(files, tmp_path / "own", recipe))


@pytest.mark.parametrize("method", [TaskArithmetic(), IsoC(), Largest()])
def test_a_method_is_named(method, files, tmp_path):
    main([*options(files, tmp_path / "out"), "--drm.method", class_path(method)])
    same(load_file(tmp_path / "out" / "model.safetensors"), expected(files, tmp_path / "own", Recipe(method)))


def test_parameters_of_the_default_method(files, tmp_path):
    main([*options(files, tmp_path / "out"), "--drm.method.density", "0.6"])
    same(load_file(tmp_path / "out" / "model.safetensors"), expected(files, tmp_path / "own", Recipe(DRM(density=0.6))))


def test_private_needs_a_repository(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*options(files, tmp_path / "out"), "--private", "true"])
    assert end.value.code == 2
    assert "private is for the repository that push_to_hub names, but none is named." in capsys.readouterr().err


@pytest.mark.parametrize("form", ["option", "file"])
def test_a_task_with_a_dot_in_its_name(form, files, tmp_path):
    """As the refusal of `--models.glue.v2` says."""
    given = {"models": {"glue.v2": str(files / "sst2"), "rte": str(files / "rte")}, "coefficients": {"glue.v2": 0.5}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(given))
    inline = []
    for name, value in given.items():
        inline += [f"--{name}", yaml.safe_dump(value, default_flow_style=True)]
    words = inline if form == "option" else ["--config", str(tmp_path / "c.yaml")]
    main(["merge", "--base", str(files / "base"), *words, "--output", str(tmp_path / "out")])
    assert "| glue.v2 | 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "heads" / "glue.v2.safetensors").is_file()


def test_model_card(files, tmp_path):
    main(options(files, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["license"] == "apache-2.0"
    assert "merge" in metadata["tags"]
    assert "| sst2 | 1 |" in card
    assert repr(DRM()) in card


def test_dry_run_writes_nothing(files, tmp_path, capsys):
    main([*options(files, tmp_path / "out"), "--dry_run"])
    shown = capsys.readouterr().out
    assert "average" in shown
    assert "DRM" in shown
    assert "GB of memory" in shown
    assert not any(tmp_path.iterdir())


def test_a_dry_run_says_what_lines_takes_for_depth(files, tmp_path, capsys):
    words = ["--config", str(tmp_path / "lines.yaml"), "--drm.method.beta", "0.4"]
    (tmp_path / "lines.yaml").write_text((CONFIGS / "method" / "lines.yaml").read_text())
    main([*options(files, tmp_path / "out"), *words, "--dry_run"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "Note: LiNeS: the depth goes from encoder.layer.0 to encoder.layer.1 (2 blocks); 7 parameters are in no"
        in shown
    )
    main([*options(files, tmp_path / "out"), *words])
    method = LiNeS(TaskArithmetic(1.0), "auto", 0.4)
    assert f"method: `{method!r}`" in (tmp_path / "out" / "README.md").read_text()
    same(load_file(tmp_path / "out" / "model.safetensors"), expected(files, tmp_path / "again", Recipe(method)))


def test_lines_needs_blocks(tmp_path, capsys):
    names = ["embed.weight", "fc.weight"]
    for number, name in enumerate(["base", "a"]):
        save_file({n: torch.full((2, 3), float(number)) for n in names}, tmp_path / f"{name}.safetensors")
    words = ["merge", "--base", str(tmp_path / "base.safetensors"), "--models.a", str(tmp_path / "a.safetensors")]
    words += ["--output", str(tmp_path / "out"), "--drm.method", "LiNeS", "--drm.method.method", "DRM"]
    for dry in ([], ["--dry_run"]):
        with pytest.raises(SystemExit) as end:
            main([*words, *dry])
        assert end.value.code == 2
        assert "this model has none: its parameters are embed.weight, fc.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--drm.metod", "DRM"], "--drm.metod"),
        (["--basse", "x"], "--basse"),
        (["--drm.method.densty", "0.3"], "densty"),
        (["--policy", "lenient"], "policy"),
        (["--coefficients.mnli", "2"], "unknown tasks mnli"),
        (["--drm.overrides", '[{"macth": "*"}]'], "macth"),
        (["--models.gone", "/nowhere/at/all"], "gone: There is no file or folder /nowhere/at/all"),
        (["--drm.method.density", "3"], "density must be in"),
        (
            ["--drm.method", "LiNeS", "--drm.method.method", "DRM", "--drm.method.alpha", "best"],
            "drm.method.alpha: expected a number or auto, got 'best'.",
        ),
        (
            ["--drm.method", "LiNeS", "--drm.method.method", "DRM", "--drm.method.beta", "x"],
            "beta: expected a number, g",
        ),
        (
            ["--drm.method", "LiNeS", "--drm.method.method", "DRM", "--drm.method.beta", "-1"],
            "beta must be a number of",
        ),
        (["--device", "gpu"], "--device gpu is not a device that PyTorch knows, such as cpu, cuda or cuda:1."),
        (["--models.glue.v2", "x"], "--models.glue.v2: on the command line a task's name cannot have a dot; write it"),
        (["--coefficients.glue.v2=2"], "as in --coefficients '{glue.v2: 1.0}', or in a --config file"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_refusals(extra, message, dry, files, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*options(files, tmp_path / "out"), *extra, *dry])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
