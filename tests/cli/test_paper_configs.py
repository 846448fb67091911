"""The paper's experiments: each configuration runs, on tiny models and data in place of those on the hub.

An overlay replaces where models and data are, sizes, and numbers of steps. All else is what is shipped.
"""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from jsonargparse._util import import_object
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.paper import CONFIGS, HUB, MODELS, PAPER, STEPS, TinyHub, shipped_config
from lightning_drm import load_merged
from lightning_drm.cli.main import main
from lightning_drm.deltas import head_state
from lightning_drm.evaluation import Published

FINETUNED = {  # two tasks of each configuration, so that every task of the paper but three is finetuned somewhere
    "vit_b32": ["cars", "svhn"],
    "vit_l14": ["dtd", "mnist"],
    "deberta_v3_base": ["paws", "qasc"],
    "t5_base": ["quartz", "story_cloze"],
    "t5_large": ["wiki_qa", "winogrande"],
    "llama31_8b_lora": ["cola", "mnli"],
}
pytestmark = pytest.mark.usefixtures("few_resampled_sets")

NUM_CLASSES = {"qasc": 8, "mnli": 3}  # as on the hub; that of images is a size, 3 here


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> TinyHub:
    return TinyHub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.mark.parametrize("name", PAPER)
def test_every_task_is_read_as_the_hub_has_it(name: str, hub: TinyHub):
    tasks = hub.overlay(name)["data"]["tasks"]
    published = Published(shipped_config(name)["drm"]["published"])
    assert published.covers(list(tasks)), "all tasks of the paper's table, and no others"
    for task, described in tasks.items():
        arguments = described["init_args"]
        data = import_object(described["class_path"])(**arguments)
        data.prepare_data()
        data.setup("fit")
        is_image = name.startswith("vit")
        assert data.num_classes == NUM_CLASSES.get(task, 3 if is_image else 2)
        sizes = {split: len(rows) for split, rows in data.splits.items()}
        if arguments["validation_split"] is None:
            held_out = -(-96 * arguments["validation_fraction"] // 1)  # scikit-learn rounds up
            assert sizes["validation"] == held_out, task
            assert sizes["train"] == 96 - held_out
        else:
            assert (sizes["train"], sizes["validation"]) == (96, 24)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            batch = next(iter(loader))
            assert ("pixel_values" if is_image else "input_ids") in batch
            assert len(batch["labels"]) > 0
        if not is_image:
            texts = data.tokenizer.batch_decode(batch["input_ids"])
            assert all(len(re.findall(r"word\d+", text)) >= 5 for text in texts), task


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_fit_merge_and_test(name: str, hub: TinyHub, tmp_path: Path, capsys: pytest.CaptureFixture):
    tasks = FINETUNED[name]
    overlay, run = tmp_path / "tiny.yaml", tmp_path / "run"
    overlay.write_text(yaml.safe_dump(hub.overlay(name, tasks), sort_keys=False))
    words = ["--config", str(CONFIGS / "paper" / f"{name}.yaml"), "--config", str(overlay), "--drm.dirpath", str(run)]
    main(["fit", *words, "--base_batches", "3"])
    shipped = shipped_config(name)
    report = json.loads((run / "report.json").read_text())
    assert report["tasks"] == tasks
    assert report["method"]["class_path"] == "lightning_drm.DRM"
    assert report["metrics"] == {task: {"name": "accuracy", "higher_is_better": True} for task in tasks}
    for task in tasks:
        folder = run / "tasks" / task
        with safe_open(folder / "deltas.safetensors", "pt") as file:
            names, settings = list(file.keys()), file.metadata()
        if name == "llama31_8b_lora":
            targets = {key.split("self_attn.")[1].split(".")[0] for key in names}
            assert targets == set(shipped["model"]["init_args"]["lora"]["target_modules"])
            kept = json.loads((run / "merged" / "config.json").read_text())
            assert kept["pad_token_id"] is not None, "without it, the merged model would not find where a text ends"
        assert names
        assert str(shipped["trainer"]["precision"]) in json.dumps(settings)
        if shipped["drm"].get("weights") == "best":
            (best,) = (folder / "checkpoints").glob("*.ckpt")
            assert re.search(r"step=(\d+)", best.name)[1] in {str(STEPS // 2), str(STEPS)}, "checked by steps"
    main(["merge", *words, "--config", str(CONFIGS / "method" / "average.yaml")])
    main(["test", *words, "--config", str(CONFIGS / "method" / "average.yaml")])
    report = json.loads((run / "report.json").read_text())
    assert report["method"]["class_path"] == "lightning_drm.Average"
    scores = [report["scores"][row][task] for row in ("individual", "merged") for task in tasks]
    assert all(0 <= score <= 1 for score in scores)
    assert "Test accuracy, merged with Average" in capsys.readouterr().out
    for task in tasks:
        loaded, head = load_merged(run / "merged", task), load_file(run / f"merged/heads/{task}.safetensors")
        assert all(torch.equal(value, head[key]) for key, value in head_state(loaded, loaded.head_names).items())
        merged = type(loaded.backbone).from_pretrained(run / "merged", dtype=loaded.load_dtype).state_dict()
        assert all(torch.equal(value, merged[key]) for key, value in loaded.backbone.state_dict().items())
    if name == "vit_b32":
        compare_and_check(words, run, tasks, capsys)


def compare_and_check(words: list[str], run: Path, tasks: list[str], capsys: pytest.CaptureFixture) -> None:
    """The published numbers, from the paper's Table 1, stand beside the measured ones of the same thing."""
    other = "{class_path: TIES, init_args: {density: 0.5}}"
    main(["compare", *words, "--split", "test", "--methods", "TIES", "IsoC", other])
    printed = capsys.readouterr().out
    assert "Published: ViT-B/32 in arXiv 2505.23117, on the test sets." in " ".join(printed.split())
    (individual,) = [line for line in printed.splitlines() if line.strip().startswith("individual")]
    assert individual.split()[-1] == "87.6", f"of Cars 77.7 and SVHN 97.5:\n{printed}"
    methods = json.loads((run / "report.json").read_text())["methods"]
    assert methods["TIES, density 0.2"]["published"] == {"cars": 0.588, "svhn": 0.862, "average": 0.725}
    assert set(methods["DRM, horizontal, density 0.2"]["published"]) == {*tasks, "average"}
    for title in ("IsoC", "TIES, density 0.5"):
        assert "published" not in methods[title], "the paper has no such method"
    page = (run / "report.html").read_text()
    assert "average, published" in page
    assert "published (%)" in (run / "compare" / "methods.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("overlay", [None, "one_node", "slurm"])
def test_it_is_read_with_every_overlay(name: str, overlay: str | None, capsys: pytest.CaptureFixture):
    paper = CONFIGS / "paper"
    if overlay == "one_node" and name == "llama31_8b_lora":
        overlay = "one_node_llama"
    added = ["--config", str(paper / f"{overlay}.yaml")] if overlay else []
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(paper / f"{name}.yaml"), *added, "--print_config"])
    assert ended.value.code in (0, None)
    read = yaml.safe_load(capsys.readouterr().out)
    trainer = read["trainer"]
    global_batch = {"vit": 128, "deb": 1024, "t5_": 1024, "lla": 256}[name[:3]]
    checks = [trainer["val_check_interval"]] if trainer["check_val_every_n_epoch"] is None else []
    for task in read["data"]["tasks"].values():
        per_step = task["init_args"]["batch_size"] * trainer["accumulate_grad_batches"]
        assert per_step * trainer["devices"] == global_batch, "the paper's"
    assert all(interval / trainer["accumulate_grad_batches"] == 100 for interval in checks), "every 100 steps"


def test_the_table_lists_what_they_expect():
    """README.md names each data set and model with the revision and columns that the configurations have."""
    lines = (CONFIGS / "paper" / "README.md").read_text().splitlines()
    for name in PAPER:
        content = shipped_config(name)
        backbone = content["model"]["init_args"]
        assert any(f"`{backbone['backbone']}`" in line and backbone["revision"] in line for line in lines)
        assert backbone["backbone"] in MODELS
        for task in content["data"]["tasks"].values():
            arguments = task["init_args"]
            assert arguments["pretrained"] == backbone["backbone"]
            assert arguments["pretrained_revision"] == backbone["revision"]
            if "data_files" in arguments:
                assert all(any(Path(file).name in line for line in lines) for file in arguments["data_files"].values())
                continue
            assert arguments["dataset"] in HUB
            named = [line for line in lines if f"`{arguments['dataset']}`" in line]
            config = arguments.get("config")
            (line,) = [line for line in named if config is None or f"`{config}`" in line]
            assert (arguments.get("revision") or "main") in line
            columns = arguments.get("text_columns") or [arguments["image_column"]]
            texts = [columns] if isinstance(columns, str) else columns
            read = {column for text in texts for column in re.findall(r"\{(\w+)", text) or [text]}
            assert all(f"`{column}`" in line for column in {*read, arguments["label_column"]}), line
