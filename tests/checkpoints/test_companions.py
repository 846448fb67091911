"""What a merged folder is handed on with: the base's own files and nothing else, and no path of this machine."""

import json
import os
import stat
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from helpers import models
from helpers.tiny import save_tiny_bert
from lightning_drm import Average, merge_checkpoints

OWN = {"config.json", "tokenizer.json", "tokenizer_config.json"}
WRITTEN = {"model.safetensors", "README.md"}
FOREIGN = ["credentials.json", "notes.txt", "run.py", "training_args.json", "modules.json", "secret.model", ".netrc"]


@pytest.fixture
def base(tmp_path):
    """A base beside whose files lie others, and a finetune of it."""
    folder = Path(save_tiny_bert(tmp_path / "models" / "base"))
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "_name_or_path": f"{tmp_path}/old", "name_or_path": "org/x"}))
    for name in FOREIGN:
        (folder / name).write_text("{}")
    return folder


def tuned(base, path):
    model = AutoModel.from_pretrained(base)
    model.encoder.layer[0].attention.self.query.weight.data += 0.1
    model.save_pretrained(path)
    return str(path)


def merge(base, folder, **options):
    return merge_checkpoints(base, {"a": tuned(base, folder / "tuned")}, folder / "out", Average(), **options)


def names(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_only_known_files_are_copied(base, tmp_path):
    for name in ("chat_template.jinja", "additional_chat_templates/tool.jinja", "vocab.txt", "LICENSE", "NOTICE.md"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("[PAD]")
    result = merge(base, tmp_path)
    more = {"chat_template.jinja", "additional_chat_templates/tool.jinja", "vocab.txt", "LICENSE", "NOTICE.md"}
    assert names(result.folder) == OWN | WRITTEN | more
    assert "The base's own code is not copied: run.py. Copy it if the merged model needs it." in result.notes
    words = AutoTokenizer.from_pretrained(result.folder)("red cat")["input_ids"]
    assert words == AutoTokenizer.from_pretrained(base)("red cat")["input_ids"]


def test_a_damaged_companion_is_told_before_merging(base, tmp_path):
    (base / "tokenizer_config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match=r"base/tokenizer_config\.json gives the field 'a' twice\."):
        merge(base, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "tuned"}


def test_links_out_of_the_folder_are_not_followed(base, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    (base / "spiece.model").symlink_to(Path("..", "..", "secret"))
    (base / "merges.txt").symlink_to("tokenizer.json")  # its own
    result = merge(base, tmp_path)
    assert names(result.folder) == OWN | WRITTEN | {"merges.txt"}
    assert not (result.folder / "merges.txt").is_symlink()
    for name in ("vocab.txt", "spiece.model"):
        note = f"The base's {name} is a link that leads out of its folder, so it is not copied."
        assert note in result.notes
    assert not any("secret" in file.read_text(errors="replace") for file in result.folder.glob("*.[tm]*"))


def test_the_hubs_cache_is_copied_as_files(base, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(sorted(OWN | {"model.safetensors"})):
        (base / name).rename(blobs / f"{number:040}")
        (snapshot / name).symlink_to(Path("..", "..", "blobs", f"{number:040}"))
    result = merge(snapshot, tmp_path)
    assert names(result.folder) == OWN | WRITTEN
    assert not any(file.is_symlink() for file in result.folder.iterdir())
    assert not [note for note in result.notes if "link" in note]


def test_no_path_is_handed_on(base, tmp_path):
    """Neither in a whole model nor in an adapter; a hub name stays."""
    folders = [merge(base, tmp_path).folder]
    adapter = models.adapter("bert", AutoModel.from_pretrained(base), 1)
    adapter.save_pretrained(tmp_path / "lora")
    paths = {"a": str(tmp_path / "lora")}
    folders.append(merge_checkpoints(base, paths, tmp_path / "adapter", Average()).folder)
    assert names(folders[1]) >= {"adapter_model.safetensors", "adapter_config.json"}
    for folder in folders:
        for file in folder.rglob("*"):
            assert str(tmp_path).encode() not in file.read_bytes(), file
    assert json.loads((folders[1] / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    config = json.loads((folders[0] / "config.json").read_text())
    assert (config["_name_or_path"], config["name_or_path"]) == ("old", "org/x")
    again = merge_checkpoints(base, {"a": str(folders[1])}, tmp_path / "again", Average(), output_format="full")
    assert load_file(again.folder / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_everybody_reads_what_was_merged(mask, base, tmp_path):
    before = os.umask(mask)
    try:
        folder = merge(base, tmp_path, max_shard_size="10KB").folder
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}
    assert len(modes) > len(OWN | WRITTEN)
    assert set(modes.values()) == {0o666 & ~mask}, modes
