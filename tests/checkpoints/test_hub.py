"""Models by hub name, and uploading: real processes against a hub that speaks the protocol on this machine."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import hub, models
from safetensors.torch import load, load_file


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A hub with a base, a finetune and an adapter; a second finetune is here only."""
    folder = tmp_path_factory.mktemp("hub")
    base = models.base_model("bert")
    base.save_pretrained(folder / "base")
    models.finetune("bert", base, 1).save_pretrained(folder / "tuned", max_shard_size="10KB")
    models.adapter("bert", base, 2).save_pretrained(folder / "lora")
    models.finetune("bert", base, 3).save_pretrained(folder / "here")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    running = hub.serve()
    for name in ("base", "tuned", "lora"):
        files = {file.name: file.read_bytes() for file in (folder / name).iterdir()}
        running.RequestHandlerClass.repositories[f"org/{name}"] = files
    running.folder = folder
    yield running
    running.shutdown()


def merge(server, tmp_path, *words, offline=False):
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_here"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "lightning_drm", "merge", "--output", str(tmp_path / "out"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_hub_names_and_paths_mix_and_the_result_is_uploaded(server, tmp_path):
    inputs = ["--models.a", "org/tuned", "--models.b", str(server.folder / "here"), "--models.c", "org/lora"]
    method = ["--drm.method", "TaskArithmetic", "--drm.method.scale", "0.5"]
    done = merge(server, tmp_path, "--base", "org/base", *inputs, *method, "--push_to_hub", "me/merged")
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "out" / "model.safetensors")
    start = models.base_model("bert").state_dict()
    tuned = [models.finetune("bert", models.base_model("bert"), seed).bert.state_dict() for seed in (1, 3)]
    adapted = models.adapter("bert", models.base_model("bert"), 2).merge_and_unload().state_dict()
    for name, value in merged.items():
        expected = start[name] + 0.5 * sum(state[name] - start[name] for state in (*tuned, adapted))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)

    uploaded = server.RequestHandlerClass.repositories["me/merged"]
    written = {
        str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()
    }
    assert uploaded == written
    assert load(uploaded["model.safetensors"]).keys() == merged.keys()
    card = uploaded["README.md"].decode()
    assert "base_model: org/base" in card
    assert "license: mit" in card

    # What was uploaded is an input like any other; and what is in the cache needs no hub.
    words = ["--base", "org/base", "--models.again", "me/merged", "--overwrite", "true", "--drm.method", "Average"]
    assert merge(server, tmp_path, *words).returncode == 0
    server.RequestHandlerClass.log.clear()
    again = merge(server, tmp_path, *words, offline=True)
    assert again.returncode == 0, again.stderr
    assert not server.RequestHandlerClass.log
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, merged[name], rtol=1e-6, atol=1e-6)


def test_a_missing_hub_name_is_one_clear_sentence(server, tmp_path):
    done = merge(server, tmp_path, "--base", "org/base", "--models.a", "org/gone", "--models.b", "org/tuned")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "org/gone" in line]
    assert (
        line.strip()
        == "- a: org/gone is no file or folder here, and the hub has no model of this name that you may read."
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
