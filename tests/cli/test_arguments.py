"""What the parsers take: a class that replaces another one has its own defaults, wherever both of them are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.parsers import run_parser
from lightning_drm.cli.arguments import file_merge_parser, own_defaults, refuse_lost_options
from lightning_drm.cli.main import main
from lightning_drm.cli.overview import SUBCOMMANDS

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
FILES = ["--base", "BASE", "--models.a", "PATH", "--output", "DIR"]

Parse = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def parse_run() -> Parse:
    parser = run_parser()

    def parse(*words: str, subcommand: str = "merge") -> dict[str, Any]:
        with own_defaults():
            return parser.parse_args([subcommand, *words])[subcommand].as_dict()

    return parse


@pytest.fixture(params=["run", "files"])
def parse(request: pytest.FixtureRequest, parse_run: Parse) -> Parse:
    """Either parser, with a configuration in which the method is DRM by default."""
    if request.param == "run":
        return lambda *words: parse_run("--config", QUICKSTART, *words)
    parser = file_merge_parser()

    def parse_files(*words: str) -> dict[str, Any]:
        with own_defaults():
            return parser.parse_args([*FILES, *words]).as_dict()

    return parse_files


@pytest.fixture
def overlay(tmp_path: Path) -> Callable[..., list[str]]:
    """Words that lay some content, as a file, over what comes before."""

    def write(content: object) -> list[str]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(content))
        return ["--config", str(path)]

    return write


def method(class_path: str, **init_args: object) -> dict[str, Any]:
    return {"drm": {"method": {"class_path": class_path, **({"init_args": init_args} if init_args else {})}}}


ARITHMETIC = {"class_path": "lightning_drm.TaskArithmetic", "init_args": {"scale": 0.4}}
LARGEST = {"class_path": "helpers.own_method.Largest", "init_args": {"density": 0.75, "scale": 0.25}}
DRM_3 = method("lightning_drm.DRM", scale=3.0, density=0.4, direction="vertical")


def test_an_overlay_replaces_the_default_method(parse, overlay):
    assert parse(*overlay(method("lightning_drm.TaskArithmetic")))["drm"]["method"] == ARITHMETIC


def test_an_overlay_replaces_the_method_of_an_earlier_one(parse, overlay):
    words = [*overlay(DRM_3), *overlay(method("lightning_drm.TaskArithmetic"))]
    assert parse(*words)["drm"]["method"] == ARITHMETIC


def test_arguments_in_the_same_block_count(parse, overlay):
    chosen = parse(*overlay(DRM_3), *overlay(method("lightning_drm.TIES", density=0.3)))["drm"]["method"]
    assert chosen == {
        "class_path": "lightning_drm.TIES",
        "init_args": {"density": 0.3, "scope": "global", "scale": 1.0, "space": "entries"},
    }


@pytest.mark.parametrize(
    "words",
    [
        ["--drm.method", "TaskArithmetic"],
        ["--drm.method=TaskArithmetic"],
        ["--drm.method", "lightning_drm.TaskArithmetic"],
        ["--drm.method.class_path", "lightning_drm.TaskArithmetic"],
        ["--drm.method.class_path=lightning_drm.TaskArithmetic"],
        ["--drm.method", '{"class_path": "lightning_drm.TaskArithmetic"}'],
    ],
)
def test_an_option_replaces_the_method_of_a_file(words, parse, overlay):
    assert parse(*overlay(DRM_3), *words)["drm"]["method"] == ARITHMETIC


@pytest.mark.parametrize("parameter", ["--drm.method.density", "--drm.method.init_args.density"])
def test_options_after_the_method_are_its_own(parameter, parse, overlay):
    chosen = parse(*overlay(DRM_3), "--drm.method", "TIES", parameter, "0.3")["drm"]["method"]
    assert chosen["init_args"] == {"density": 0.3, "scope": "global", "scale": 1.0, "space": "entries"}


def test_a_file_of_a_method_replaces_the_method(parse, overlay, tmp_path):
    (tmp_path / "method.yaml").write_text(yaml.safe_dump({"class_path": "TIES", "init_args": {"density": 0.7}}))
    chosen = parse(*overlay(DRM_3), "--drm.method", str(tmp_path / "method.yaml"))["drm"]["method"]
    assert chosen["init_args"] == {"density": 0.7, "scope": "global", "scale": 1.0, "space": "entries"}


def test_a_users_own_method_has_its_own_defaults(parse, overlay):
    assert parse(*overlay(DRM_3), *overlay(method(LARGEST["class_path"])))["drm"]["method"] == LARGEST
    assert parse(*overlay(DRM_3), "--drm.method", LARGEST["class_path"])["drm"]["method"] == LARGEST


def test_a_users_own_method_leaves_nothing_to_the_next(parse, overlay):
    words = overlay(method(LARGEST["class_path"], density=0.1, scale=9.0))
    assert parse(*words, "--drm.method", "TaskArithmetic")["drm"]["method"] == ARITHMETIC


@pytest.mark.parametrize("name", ["lightning_drm.DRM", "lightning_drm.merging.DRM"])
def test_arguments_of_the_same_class_are_kept(name, parse, overlay):
    chosen = parse(*overlay(DRM_3), *overlay(method(name, density=0.7)))["drm"]["method"]["init_args"]
    assert (chosen["scale"], chosen["density"], chosen["direction"]) == (3.0, 0.7, "vertical")


def test_parameters_alone_are_of_the_method_that_is_there(parse, overlay):
    chosen = parse("--drm.method.density", "0.6")["drm"]["method"]
    assert (chosen["class_path"], chosen["init_args"]["density"]) == ("lightning_drm.DRM", 0.6)
    chosen = parse(*overlay(method("lightning_drm.TIES")), "--drm.method.density", "0.6")["drm"]["method"]
    assert (chosen["class_path"], chosen["init_args"]["density"]) == ("lightning_drm.TIES", 0.6)


@pytest.mark.parametrize("form", ["file", "option"])
def test_an_optimizer_has_its_own_defaults(form, parse_run, overlay):
    """AdamW, which the quickstart takes, decays weights by 0.01 and has betas; SGD does neither."""
    replaced = overlay({"model": {"init_args": {"optimizer": {"class_path": "torch.optim.SGD"}}}})
    words = replaced if form == "file" else ["--model.init_args.optimizer", "torch.optim.SGD"]
    chosen = parse_run("--config", QUICKSTART, *words, subcommand="fit")["model"]["init_args"]["optimizer"]
    assert chosen["class_path"] == "torch.optim.SGD"
    assert chosen["init_args"]["weight_decay"] == 0
    assert chosen["init_args"]["lr"] == 1e-3, "SGD's, where AdamW had 1e-4"


def test_an_optimizer_of_the_same_class_keeps_its_arguments(parse_run, overlay):
    words = overlay({"model": {"init_args": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {}}}}})
    chosen = parse_run("--config", QUICKSTART, *words)["model"]["init_args"]["optimizer"]["init_args"]
    assert (chosen["lr"], chosen["fused"]) == (1e-4, True)


def test_loggers_and_callbacks_have_their_own_defaults(parse_run, overlay):
    loggers = "lightning.pytorch.loggers"
    callbacks = "lightning.pytorch.callbacks"
    first = {
        "logger": {"class_path": f"{loggers}.CSVLogger", "init_args": {"save_dir": "x", "prefix": "mine"}},
        "callbacks": [{"class_path": f"{callbacks}.EarlyStopping", "init_args": {"monitor": "a", "mode": "max"}}],
    }
    second = {
        "logger": {"class_path": f"{loggers}.TensorBoardLogger", "init_args": {"save_dir": "y"}},
        "callbacks": [{"class_path": f"{callbacks}.ModelCheckpoint"}],
    }
    trainer = parse_run("--config", QUICKSTART, *overlay({"trainer": first}), *overlay({"trainer": second}))["trainer"]
    assert trainer["logger"]["init_args"]["prefix"] == ""
    (callback,) = trainer["callbacks"]
    assert (callback["init_args"]["monitor"], callback["init_args"]["mode"]) == (None, "min")


def test_a_task_that_another_class_loads_has_its_own_defaults(parse_run, overlay):
    path = "lightning_drm.data.TextTask"
    first = {"news_topic": {"class_path": path, "init_args": {"dataset": "a.csv", "pretrained": "b", "batch_size": 7}}}
    second = {"news_topic": {"class_path": "lightning_drm.data.QuickstartTask", "init_args": {"source": "news_topic"}}}
    words = [*overlay({"data": {"tasks": first}}), *overlay({"data": {"tasks": second}})]
    own = parse_run("--config", QUICKSTART)["data"]["tasks"]["news_topic"]["init_args"]
    assert parse_run("--config", QUICKSTART, *words)["data"]["tasks"]["news_topic"]["init_args"] == own


def test_the_command_line_has_the_rule(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["merge", "--config", QUICKSTART, "--drm.method", "TaskArithmetic", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["drm"]["method"] == ARITHMETIC


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--drm.method.density", "0.3", "--drm.method", "TIES"], "--drm.method.density comes before --drm.method,"),
        (["--drm.method.init_args.density=1", "--drm.method.class_path=x.Y"], "before --drm.method.class_path,"),
        (["--coefficients.a", "2", "--coefficients", "{b: 1}"], "--coefficients.a comes before --coefficients,"),
    ],
)
def test_an_option_that_a_later_one_replaces_is_refused(words, named):
    with pytest.raises(ValueError, match="which replaces it; give") as refused:
        refuse_lost_options(words)
    assert named in str(refused.value)


def test_options_in_order_are_not_refused():
    refuse_lost_options(["--drm.method", "TIES", "--drm.method.density", "0.3", "--drm.method.density", "0.4"])
    refuse_lost_options(["--models.a", "x", "--models.ab", "y", "--config", "z"])


def test_subcommands_take_the_same_configuration():
    """So a configuration that one of them accepts is accepted by all."""
    parsers = run_parser()._subcommands_action.choices
    assert tuple(parsers) == SUBCOMMANDS
    groups = ("seed_everything", "model", "data", "drm", "trainer")
    taken = [
        {(action.dest, str(action.type)) for action in parser._actions if action.dest.split(".")[0] in groups}
        for parser in parsers.values()
    ]
    assert len(taken[0]) > 40
    assert all(found == taken[0] for found in taken)


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_quickstarts_are_accepted_with_every_subcommand(subcommand: str, parse_run: Parse):
    quickstarts = sorted(CONFIGS.glob("quickstart*.yaml"))
    assert len(quickstarts) == 2
    for quickstart in quickstarts:
        parsed = parse_run("--config", str(quickstart), subcommand=subcommand)
        assert parsed["drm"]["method"]["class_path"] == "lightning_drm.DRM"


@pytest.mark.parametrize("overlay", sorted(CONFIGS.glob("method/*.yaml")), ids=lambda path: path.stem)
def test_shipped_methods_lie_over_any_configuration(overlay: Path, parse: Parse):
    written = yaml.safe_load(overlay.read_text())["drm"]["method"]
    chosen = parse("--config", str(overlay))["drm"]["method"]
    assert chosen["class_path"] == written["class_path"]
    assert chosen.get("init_args", {}).items() >= written.get("init_args", {}).items()


STRATEGIES = {
    "single_gpu": {"accelerator": "gpu", "devices": 1, "strategy": "auto"},
    "ddp": {"accelerator": "gpu", "devices": "auto", "strategy": "ddp"},
    "fsdp": {"accelerator": "gpu", "devices": "auto", "strategy": "fsdp"},
    "fsdp2": {"accelerator": "gpu", "inference_mode": False},
    "slurm": {"accelerator": "gpu", "devices": "auto", "strategy": "ddp", "enable_progress_bar": False},
}


def test_every_shipped_strategy_is_tested():
    assert {path.stem for path in CONFIGS.glob("strategy/*.yaml")} == set(STRATEGIES)


@pytest.mark.parametrize("overlay", STRATEGIES)
def test_strategies_lie_over_any_configuration(overlay: str, parse_run: Parse):
    files = ["--config", QUICKSTART, "--config", str(CONFIGS / "strategy" / f"{overlay}.yaml")]
    parsed = parse_run(*files, subcommand="fit")
    assert {name: parsed["trainer"][name] for name in STRATEGIES[overlay]} == STRATEGIES[overlay]
    assert parsed["trainer"]["max_steps"] == 100, "the rest stays"
    if overlay == "fsdp2":
        strategy = parsed["trainer"]["strategy"]
        assert strategy["class_path"] == "lightning.pytorch.strategies.ModelParallelStrategy"
        assert strategy["init_args"]["data_parallel_size"] == parsed["trainer"]["devices"]
        assert strategy["init_args"]["tensor_parallel_size"] == 1
    assert parsed["drm"]["store"] == ("disk" if overlay == "slurm" else "auto")


def test_a_method_around_another_one(parse_run: Parse):
    words = ["--config", QUICKSTART, "--config", str(CONFIGS / "method" / "svc.yaml")]
    words += ["--drm.method.method", "DRM", "--drm.method.method.density", "0.4"]
    method = parse_run(*words, subcommand="merge")["drm"]["method"]
    assert method["class_path"] == "lightning_drm.SVC"
    inner = method["init_args"]["method"]
    assert (inner["class_path"], inner["init_args"]["density"], inner["init_args"]["scale"]) == (
        "lightning_drm.DRM",
        0.4,
        1.0,
    )


def test_numbers_and_words_of_lines(parse_run: Parse):
    overlay = ["--config", QUICKSTART, "--config", str(CONFIGS / "method" / "lines.yaml")]
    method = parse_run(*overlay, subcommand="merge")["drm"]["method"]
    assert (method["class_path"], method["init_args"]["alpha"]) == ("lightning_drm.LiNeS", "auto")
    assert method["init_args"]["beta"] is None
    assert method["init_args"]["method"]["init_args"]["scale"] == 1.0
    given = ["--drm.method.alpha", "0.3", "--drm.method.beta", "1"]
    method = parse_run(*overlay, *given, subcommand="merge")["drm"]["method"]
    assert (method["init_args"]["alpha"], method["init_args"]["beta"]) == (0.3, 1.0)


def test_snapshots_and_the_options_of_analyses_are_taken(parse_run: Parse):
    words = ["--drm.snapshots", "[25, 50]", "--drm.snapshot_every_n_epochs", "2", "--drm.merge_at_snapshots", "true"]
    drm = parse_run("--config", QUICKSTART, *words, subcommand="fit")["drm"]
    assert (drm["snapshots"], drm["snapshot_every_n_epochs"], drm["merge_at_snapshots"]) == ([25, 50], 2, True)
    analyses = "[{class_path: lightning_drm.analysis.Tasks, init_args: {baselines: [{class_path: TIES}]}}, Conflicts]"
    found = parse_run("--config", QUICKSTART, "--analyses", analyses, "--num_samples", "50", subcommand="analyze")
    tasks, conflicts = found["analyses"]
    assert (tasks["init_args"]["most_subsets"], conflicts["init_args"]["task"], found["num_samples"]) == (10, None, 50)
    assert tasks["init_args"]["baselines"][0]["class_path"] == "lightning_drm.TIES"
