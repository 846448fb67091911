"""Models by hub name, and uploading: real processes against a hub that speaks the protocol on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load, load_file

from helpers import hub, models

pytestmark = pytest.mark.processes
SHELL = Path(__file__).with_name("merges_of_a_shell.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A hub with a base, a finetune and an adapter; a second finetune is here only."""
    folder = tmp_path_factory.mktemp("hub")
    base = models.base_model("bert")
    base.save_pretrained(folder / "base")
    models.finetune("bert", base, 1).save_pretrained(folder / "tuned", max_shard_size="10KB")
    models.adapter("bert", base, 2).save_pretrained(folder / "lora")
    models.finetune("bert", base, 3).save_pretrained(folder / "here")
    models.finetune("bert", base, 4).save_pretrained(folder / "earlier")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    running = hub.serve()
    for name in ("base", "tuned", "lora"):
        files = {file.name: file.read_bytes() for file in (folder / name).iterdir()}
        running.RequestHandlerClass.repositories[f"org/{name}"] = files
    earlier = {file.name: file.read_bytes() for file in (folder / "earlier").iterdir()}
    running.RequestHandlerClass.repositories["org/tuned@v1"] = earlier
    running.folder = folder
    yield running
    running.shutdown()


def run(server, commands, *, offline=False):
    """What commands say in one process, which finds the hub in its environment."""
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_here"}
    environment |= {"HF_HOME": str(server.folder / "home"), "HF_HUB_OFFLINE": str(int(offline))}
    environment["HF_HUB_DISABLE_XET"] = "1"
    done = subprocess.run(
        [sys.executable, SHELL], input=json.dumps(commands), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def command(server, output, base, inputs, *options):
    words = [word for task, name in inputs.items() for word in (f"--models.{task}", name)]
    return ["merge", "--base", base, *words, "--output", str(server.folder / output), *options]


@pytest.fixture(scope="module")
def online(server):
    """Merges of one process: what is mixed and uploaded, what was uploaded, names and revisions that are not there."""
    inputs = {"a": "org/tuned", "b": str(server.folder / "here"), "c": "org/lora"}
    method = ["--drm.method", "TaskArithmetic", "--drm.method.scale", "0.5"]
    commands = {
        "mixed": command(server, "out", "org/base", inputs, *method, "--push_to_hub", "me/merged", "--private", "true"),
        "again": command(server, "again", "org/base", {"again": "me/merged"}, "--drm.method", "Average"),
        "other": command(server, "none", "org/tuned", {"x": "me/merged"}, "--dry_run"),
        "gone": command(server, "none", "org/base", {"a": "org/gone", "b": "org/tuned"}),
        "revision": command(server, "earlier_out", "org/base@main", {"a": "org/tuned@v1"}, "--drm.method", "Average"),
        "adapter": command(server, "adapter_out", "org/base@main", {"c": "org/lora"}, "--drm.method", "Average"),
        "no revision": command(server, "none", "org/base@v9", {"a": "org/tuned@v1"}),
    }
    return dict(zip(commands, run(server, list(commands.values())), strict=True))


def test_hub_names_and_paths_mix(server, online):
    assert online["mixed"]["code"] == 0, online["mixed"]["said"]
    merged = load_file(server.folder / "out" / "model.safetensors")
    start = models.base_model("bert").state_dict()
    tuned = [models.finetune("bert", models.base_model("bert"), seed).bert.state_dict() for seed in (1, 3)]
    adapted = models.adapter("bert", models.base_model("bert"), 2).merge_and_unload().state_dict()
    for name, value in merged.items():
        expected = start[name] + 0.5 * sum(state[name] - start[name] for state in (*tuned, adapted))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_the_result_is_uploaded(server, online):
    assert online["mixed"]["code"] == 0, online["mixed"]["said"]
    folder, uploaded = server.folder / "out", server.RequestHandlerClass.repositories["me/merged"]
    written = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert uploaded == written
    assert load(uploaded["model.safetensors"]).keys() == load_file(folder / "model.safetensors").keys()
    card = uploaded["README.md"].decode()
    assert "base_model: org/base" in card
    assert "license: mit" in card


def test_what_will_be_uploaded_is_told_before(server, online):
    names = sorted(server.RequestHandlerClass.repositories["me/merged"])
    said = online["mixed"]["said"]
    assert f"Uploading {len(names)} files to me/merged: {', '.join(names)}\n" in said
    (created,) = server.RequestHandlerClass.created
    assert created["visibility"] == "private"


def test_a_base_that_the_model_card_does_not_name_is_mentioned(server, online):
    said = " ".join(online["other"]["said"].split())
    assert "x: its model card names org/base as its base, not org/tuned." in said
    assert "its model card" not in online["again"]["said"]


def test_what_is_in_the_cache_needs_no_hub(server, online):
    """And what was uploaded is an input like any other."""
    assert online["again"]["code"] == 0, online["again"]["said"]
    server.RequestHandlerClass.log.clear()
    words = command(server, "offline", "org/base", {"again": "me/merged"}, "--drm.method", "Average")
    (offline,) = run(server, [words], offline=True)
    assert offline["code"] == 0, offline["said"]
    assert not server.RequestHandlerClass.log
    merged = load_file(server.folder / "out" / "model.safetensors")
    for folder in ("again", "offline"):
        found = load_file(server.folder / folder / "model.safetensors")
        assert found.keys() == merged.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, merged[name], rtol=1e-6, atol=1e-6)


def test_a_revision_of_a_model(server, online):
    assert online["revision"]["code"] == 0, online["revision"]["said"]
    expected = models.finetune("bert", models.base_model("bert"), 4).bert.state_dict()
    for name, value in load_file(server.folder / "earlier_out" / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    card = (server.folder / "earlier_out" / "README.md").read_text()
    assert "base_model: org/base\n" in card
    assert "- base: org/base@main, fingerprint" in card


def test_a_merged_adapter_names_the_base_as_peft_does(server, online):
    assert online["adapter"]["code"] == 0, online["adapter"]["said"]
    config = LoraConfig.from_pretrained(server.folder / "adapter_out")
    assert (config.base_model_name_or_path, config.revision) == ("org/base", "main")


def test_a_missing_revision_is_one_clear_sentence(server, online):
    assert online["no revision"]["code"] == 2
    (line,) = [line for line in online["no revision"]["said"].splitlines() if "v9" in line]
    assert line.endswith("The hub has org/base, but no revision 'v9' of it.")
    assert "Traceback" not in online["no revision"]["said"]


def test_a_missing_hub_name_is_one_clear_sentence(server, online):
    assert online["gone"]["code"] == 2
    (line,) = [line for line in online["gone"]["said"].splitlines() if "org/gone" in line]
    expected = "- a: org/gone is no file or folder here, and the hub has no model of this name that you may read."
    assert line.strip() == expected
    assert "Traceback" not in online["gone"]["said"]
    assert not (server.folder / "none").exists()
