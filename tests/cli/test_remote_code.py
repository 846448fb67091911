"""Python code in a model's folder: it runs only where it is asked for by name, and nobody is asked on a terminal."""

import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from helpers.tiny import save_run_config, save_tiny_bert
from lightning_drm import TransformerTask
from lightning_drm.cli.main import main
from lightning_drm.data import TextTask

CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel, BertTokenizerFast

Path({mark!r}).touch()

class OwnConfig(BertConfig):
    model_type = "{kind}"

class OwnModel(BertModel):
    config_class = OwnConfig

class OwnTokenizer(BertTokenizerFast):
    pass
"""


def plant(folder, kind, mark):
    """Puts code into a model's folder that leaves a file behind when it is imported."""
    (folder / "own.py").write_text(CODE.format(mark=str(mark), kind=kind))
    config = json.loads((folder / "config.json").read_text())
    maps = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    maps["AutoModelForSequenceClassification"] = "own.OwnModel"
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": maps}))
    file = folder / "tokenizer_config.json"
    if file.is_file():
        tokenizer = {**json.loads(file.read_text()), "tokenizer_class": "OwnTokenizer"}
        tokenizer["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
        file.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def hands(monkeypatch):
    """Somebody who answers every question with yes."""
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", answers)
    return answers


@pytest.fixture
def planted(tmp_path, monkeypatch, request):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_tiny_bert(tmp_path / "base")
    return plant(tmp_path / "base", request.param, tmp_path / "mark")


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("planted", ["own_kind"], indirect=True)
def test_a_module_does_not_run_it(planted, pooling, hands, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        TransformerTask(str(planted), num_classes=2, pooling=pooling)
    assert not (tmp_path / "mark").exists()
    assert hands.tell() == 0, "somebody was asked"


@pytest.mark.parametrize("planted", ["bert"], indirect=True)
def test_a_known_architecture_does_without(planted, hands, tmp_path):
    task = TransformerTask(str(planted), num_classes=2, pooling="mean")
    assert type(task.backbone) is BertModel
    task.save_backbone(tmp_path / "out")
    assert not type(TextTask("none.csv", str(planted)).tokenizer).__name__.startswith("Own")
    assert not (tmp_path / "mark").exists()
    assert hands.tell() == 0, "somebody was asked"


@pytest.mark.parametrize("planted", ["own_kind"], indirect=True)
def test_it_runs_where_it_is_asked_for(planted, hands, tmp_path):
    task = TransformerTask(str(planted), num_classes=2, pooling="mean", trust_remote_code=True)
    assert type(task.backbone).__name__ == "OwnModel"
    assert (tmp_path / "mark").exists()
    assert type(TextTask("none.csv", str(planted), trust_remote_code=True).tokenizer).__name__.startswith(
        "OwnTokenizer"
    )
    assert hands.tell() == 0, "somebody was asked"


@pytest.mark.parametrize("kind", ["bert", "own_kind"])
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_merge_never_runs_it(kind, which, hands, tmp_path, capsys):
    save_tiny_bert(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    model = BertModel(BertConfig.from_pretrained(tmp_path / "tuned"))
    torch.nn.init.ones_(model.pooler.dense.bias)
    model.save_pretrained(tmp_path / "tuned")
    vocabulary = (tmp_path / "tuned" / "tokenizer.json").read_text()  # differs, so that tokenizers are loaded
    (tmp_path / "tuned" / "tokenizer.json").write_text(vocabulary.replace("\n", "\n "))
    plant(tmp_path / which, kind, tmp_path / "mark")
    words = ["--base", str(tmp_path / "base"), "--models.a", str(tmp_path / "tuned"), "--output", str(tmp_path / "out")]
    words += ["--drm.method", "Average"]
    if (which, kind) == ("tuned", "own_kind"):  # the base has a vocabulary, and the task's is known to its code alone
        with pytest.raises(SystemExit) as end:
            main(["merge", *words])
        assert end.value.code == 2
        assert f"{tmp_path / 'tuned'} has a tokenizer that cannot be read" in capsys.readouterr().err
    else:
        main(["merge", *words])
        assert load_file(tmp_path / "out" / "model.safetensors")["pooler.dense.bias"].eq(1).all()
    assert not (tmp_path / "mark").exists()
    assert hands.tell() == 0, "somebody was asked"


def test_a_fit_does_not_run_it(hands, tmp_path, capsys):
    config = save_run_config(tmp_path)
    plant(tmp_path / "base", "own_kind", tmp_path / "mark")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config)])
    assert end.value.code == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
    assert hands.tell() == 0, "somebody was asked"
