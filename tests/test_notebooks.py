"""The notebooks run, with few steps, and say what they should; what they have stored is fit to be shown."""

from pathlib import Path

import nbformat
import pytest
import torch
from transformers import BertConfig, BertModel

from helpers import notebooks

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # tests run side by side


@pytest.mark.processes
def test_finetune_merge_test(tmp_path: Path):
    wanted = """{
        "accuracy": accuracy,
        "predicted": predicted,
        "classes": {name: data.tasks[name].class_names for name in predicted},
    }"""
    path = EXAMPLES / "finetune_merge_test.ipynb"
    found = notebooks.run(path, tmp_path, wanted, ONE_THREAD, STEPS=5, SAMPLES=60)
    assert list(found["accuracy"]) == ["individual", "DRM", "TIES", "Average"]
    for scores in found["accuracy"].values():
        assert list(scores) == ["news_topic", "word_valence", "part_of_speech"]
        assert all(score * 60 == pytest.approx(round(score * 60), abs=1e-4) for score in scores.values())
        assert sum(scores.values()) / 3 > 0.45, "by chance it is 0.32: one of five, of two, of four classes"
    for task, classes in found["predicted"].items():
        assert len(classes) == 4
        assert set(classes) <= set(found["classes"][task])


@pytest.mark.processes
def test_merge_adapters_from_disk(tmp_path: Path):
    wanted = "{'scores': scores, 'errors': [float(e) for e in errors], 'rank': merged.peft_config['default'].r}"
    path = EXAMPLES / "merge_adapters_from_disk.ipynb"
    found = notebooks.run(path, tmp_path, wanted, ONE_THREAD, STEPS=3, SAMPLES=40)
    assert found["rank"] == 16, "two adapters of rank 8"
    assert len(found["errors"]) == 12, "queries and values of six layers"
    assert max(found["errors"]) < 1e-6
    names = ["base", "own adapter", "DRM", "TIES on entries", "TIES in core space"]
    assert list(found["scores"]) == names
    assert all(scores.keys() == {"word_valence", "part_of_speech"} for scores in found["scores"].values())


@pytest.mark.processes
def test_why_did_this_task_lose(tmp_path: Path):
    """On a tiny encoder, as it makes and measures many models. What its three calls found must agree."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**sizes, initializer_range=0.005)).save_pretrained(tmp_path / "encoder")
    wanted = """{
        "lost": conflicts.title.split()[2],
        "compared": pd.read_csv("runs/why/compare/methods.csv").to_dict("records"),
        "trials": trials.to_dict("records"),
        "counts": int(counts["samples"].sum()),
        "layers": pd.read_csv(layers.table).to_dict("records"),
    }"""
    path = EXAMPLES / "why_did_this_task_lose.ipynb"
    found = notebooks.run(path, tmp_path, wanted, ONE_THREAD, BASE=str(tmp_path / "encoder"), STEPS=60, SAMPLES=40)
    configured = {row["task"]: row for row in found["compared"] if row["method"] == "DRM, horizontal, density 0.2"}
    share = {task: row["normalized (%)"] for task, row in configured.items()}
    average = share.pop("average")
    assert share[found["lost"]] == min(share.values())
    assert min(share.values()) < 99

    in_full = [row for row in found["trials"] if row["validation samples per task"] == "all"]
    shares = {(row["density"], row["scale"]): 100 * row["normalized average"] for row in in_full}
    assert shares[0.2, 1.0] == pytest.approx(average)
    assert max(shares.values()) >= average
    assert len(found["trials"]) == 6 + len(in_full)

    assert found["counts"] == 2 * 40, "each sample once, before the merge and after it"
    assert len(found["layers"]) == 3 * 4 * 2, "tasks, blocks, and what they get"
    assert {row["block"] for row in found["layers"]} == {"embeddings", "outside blocks", "layer.0", "layer.1"}
    for row in found["layers"]:
        assert 100 * row["score of the merge"] == pytest.approx(configured[row["task"]]["score (%)"])
    assert any(row["score"] != row["score of the merge"] for row in found["layers"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path: Path):
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 100_000
    places = ("/tmp", "/var", "/home", "/root", "/Users", "site-packages", str(Path.home()))
    assert not [place for place in places if place in text]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "from one run, top to bottom"
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
