"""``lightning-drm merge`` without a model or data: options, YAML, overlays, the dry run and its refusals."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import models
from safetensors.torch import load_file

from lightning_drm import DRM, TIES, IsoC, TaskArithmetic, merge_checkpoints
from lightning_drm.cli.checkpoints import is_file_merge
from lightning_drm.cli.main import main
from lightning_drm.fusion import Override, Recipe

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    base = models.base_model("bert")
    base.save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for seed, task in enumerate(["sst2", "rte"], 1):
        models.finetune("bert", base, seed).save_pretrained(folder / task)
    return folder


def options(bench, output):
    return [
        *("merge", "--base", str(bench / "base"), "--models.sst2", str(bench / "sst2")),
        *("--models.rte", str(bench / "rte"), "--output", str(output)),
    ]


def expected(bench, folder, recipe):
    paths = {task: str(bench / task) for task in ("sst2", "rte")}
    merge_checkpoints(bench / "base", paths, folder, **vars(recipe))
    return load_file(folder / "model.safetensors")


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_options(bench, tmp_path, capsys):
    main(
        [
            *options(bench, tmp_path / "out"),
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
    same(load_file(tmp_path / "out" / "model.safetensors"), expected(bench, tmp_path / "own", recipe))
    shown = capsys.readouterr().out
    assert "Merged" in shown
    assert "Wrote" in shown


def test_yaml_with_an_overlay(bench, tmp_path):
    config = tmp_path / "merge.yaml"
    content = {
        "base": str(bench / "base"),
        "models": {task: str(bench / task) for task in ("sst2", "rte")},
        "output": str(tmp_path / "out"),
        "coefficients": {"rte": 0.5},
    }
    config.write_text(yaml.safe_dump(content))
    overlay = str(CONFIGS / "method" / "task_arithmetic.yaml")
    main(["merge", "--config", str(config), "--config", overlay, "--drm.method.scale", "0.3"])
    recipe = Recipe(TaskArithmetic(0.3), {"rte": 0.5})
    same(load_file(tmp_path / "out" / "model.safetensors"), expected(bench, tmp_path / "own", recipe))


@pytest.mark.parametrize("method", [TaskArithmetic(), DRM(), IsoC(), TIES()])
def test_a_method_has_its_own_defaults(method, bench, tmp_path):
    """Not those of the method that it replaces as the default."""
    main([*options(bench, tmp_path / "out"), "--drm.method", type(method).__name__])
    same(load_file(tmp_path / "out" / "model.safetensors"), expected(bench, tmp_path / "own", Recipe(method)))


def test_parameters_of_the_default_method(bench, tmp_path):
    main([*options(bench, tmp_path / "out"), "--drm.method.density", "0.6"])
    same(load_file(tmp_path / "out" / "model.safetensors"), expected(bench, tmp_path / "own", Recipe(DRM(density=0.6))))


@pytest.mark.parametrize("form", ["option", "file"])
def test_a_task_with_a_dot_in_its_name(form, bench, tmp_path):
    """As the refusal of `--models.glue.v2` says."""
    given = {"models": {"glue.v2": str(bench / "sst2"), "rte": str(bench / "rte")}, "coefficients": {"glue.v2": 0.5}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(given))
    inline = []
    for name, value in given.items():
        inline += [f"--{name}", yaml.safe_dump(value, default_flow_style=True)]
    words = inline if form == "option" else ["--config", str(tmp_path / "c.yaml")]
    main(["merge", "--base", str(bench / "base"), *words, "--output", str(tmp_path / "out")])
    assert "| glue.v2 | 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "heads" / "glue.v2.safetensors").is_file()


def test_model_card(bench, tmp_path):
    main(options(bench, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["license"] == "apache-2.0"
    assert "merge" in metadata["tags"]
    assert "| sst2 | 1 |" in card
    assert repr(DRM()) in card


def test_dry_run_writes_nothing(bench, tmp_path, capsys):
    main([*options(bench, tmp_path / "out"), "--dry_run"])
    shown = capsys.readouterr().out
    assert "average" in shown
    assert "DRM" in shown
    assert "GB of memory" in shown
    assert not any(tmp_path.iterdir())


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
        (["--device", "gpu"], "--device gpu is none that PyTorch knows, such as cpu, cuda or cuda:1."),
        (["--models.glue.v2", "x"], "--models.glue.v2: on the command line a task's name cannot have a dot; write it"),
        (["--coefficients.glue.v2=2"], "as in --coefficients '{glue.v2: 1.0}', or in a --config file"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_refusals(extra, message, dry, bench, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*options(bench, tmp_path / "out"), *extra, *dry])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


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
