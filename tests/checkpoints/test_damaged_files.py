"""Damaged and hostile files: each ends in one short message that names the file, or does no harm."""

import contextlib
import io
import json
import pickle
import random
import re
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from helpers import models, mutations
from helpers.limits import time_limit
from helpers.mutations import Mutation
from lightning_drm.cli.main import main
from lightning_drm.deltas import TaskVector, backbone_parameters, hash_tensor, hashed_file, save_task_vector

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
SECONDS = 10.0
MODEL, ADAPTER, DELTAS = "model.safetensors", "adapter_model.safetensors", "tasks/x/deltas.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base and a finetune of it in every format."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    base = BertModel(BertConfig(**TINY, max_position_embeddings=16))
    base.save_pretrained(folder / "base")
    tuned = BertForSequenceClassification(BertConfig(**TINY, max_position_embeddings=16))
    with torch.no_grad():
        for name, parameter in tuned.bert.named_parameters():
            parameter.copy_(base.get_parameter(name) + 0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(folder / "full")
    tuned.save_pretrained(folder / "shards", max_shard_size="2KB")
    (folder / "bin").mkdir()
    shutil.copy(folder / "full" / "config.json", folder / "bin")
    torch.save(tuned.state_dict(), folder / "bin" / "pytorch_model.bin")
    models.adapter("bert", base, 2).save_pretrained(folder / "adapter")
    (folder / "lightning").mkdir()
    models.save_checkpoint(tuned, folder / "lightning" / "last.ckpt")
    start = {name: parameter.tensor.detach() for name, parameter in backbone_parameters(base, ()).items()}
    finetuned = {name: parameter.tensor.detach() for name, parameter in backbone_parameters(tuned.bert, ()).items()}
    vector = TaskVector(
        "x",
        {name: finetuned[name] - value for name, value in start.items() if value.is_floating_point()},
        dict.fromkeys(start, "other"),
        {"classifier.weight": torch.ones(2, 8)},
        {name: hash_tensor(value) for name, value in start.items()},
    )
    save_task_vector(vector, folder / "stored" / "tasks" / "x")
    return folder


PATHS = {"lightning": "last.ckpt"}  # of a finetune inside its folder, where it is not the folder itself


def merge(base: Path, model: Path, output: Path) -> tuple[int, str]:
    """Exit code and messages of a merge of one task, on the command line."""
    said = io.StringIO()
    words = ["merge", "--base", str(base), "--models.x", str(model), "--output", str(output)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), time_limit(SECONDS):
            main([*words, "--drm.method", "Average"])
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


def fault_of(mutation: Mutation, which: str, inputs: Path, work: Path, shapes: dict[str, torch.Size]) -> str | None:
    """What is wrong with how a damaged input is treated; ``None`` if nothing."""
    copied, output = work / which, work / "out"
    for folder in (copied, output):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs / which, copied)
    mutation.apply(copied / mutation.file)
    base, model = (copied, inputs / "full") if which == "base" else (inputs / "base", copied)
    try:
        code, said = merge(base, model / PATHS.get(which, "."), output)
    except BaseException as error:  # whatever would have been a traceback
        return f"{type(error).__name__}: {str(error)[:300]}"
    if code == 0:
        written = load_file(output / ADAPTER if which == "adapter" else output / MODEL)
        if {name: value.shape for name, value in written.items()} != shapes:
            return "the output has other shapes"
        return None if all(value.isfinite().all() for value in written.values()) else "the output is not finite"
    # What does not fit together is told of both, the task and the base.
    owner = ["the base"] if which == "base" else ["x:", "task 0 is x", "x changes it by"]
    named = any(name in said for name in [Path(mutation.file).name, str(copied), *owner])
    lines = said.strip().splitlines()
    if code != 2 or not said.startswith("lightning-drm: ") or "Traceback" in said:
        return f"exit code {code}: {said[:300]}"
    if len(lines) > 3 or len(said) > 1500:
        return f"{len(lines)} lines, {len(said)} characters: {said[:300]}"
    if not named:
        return f"the file is not named: {said[:300]}"
    return "there is an output" if output.exists() else None


def mutations_of(which: str, inputs: Path) -> list[Mutation]:
    """Every change that is tried on an input, always the same."""
    draw = random.Random(f"{which} 1")
    sizes = {str(file.relative_to(inputs / which)): file.stat().st_size for file in (inputs / which).rglob("*")}

    def of_bytes(file: str, count: int) -> Iterable[Mutation]:
        return mutations.of_bytes(file, sizes[file], draw, count)

    def of_json(file: str, per_field: int) -> Iterable[Mutation]:
        return mutations.of_json(file, json.loads((inputs / which / file).read_text()), draw, per_field)

    def safe(file: str) -> list[Mutation]:
        return [*of_bytes(file, 7), *mutations.of_header(file), *mutations.of_tensors(file, draw, 9)]

    plans: dict[str, Callable[[], list[Mutation]]] = {
        "base": lambda: [*safe(MODEL), *of_json("config.json", 1)],
        "full": lambda: [*safe(MODEL), *of_json("config.json", 1)],
        "shards": lambda: [*safe(sorted(sizes)[2]), *of_json(f"{MODEL}.index.json", 4), *of_weight_map(inputs, draw)],
        "bin": lambda: [*of_bytes("pytorch_model.bin", 14)],
        "lightning": lambda: [*of_bytes("last.ckpt", 20)],
        "adapter": lambda: [*safe(ADAPTER), *of_json("adapter_config.json", 1)],
        "stored": lambda: [
            *safe(DELTAS),
            *of_bytes("tasks/x/head.safetensors", 8),
            *mutations.of_metadata(DELTAS, ["format", "task", "base_hashes", "tensor_hashes"]),
        ],
    }
    return plans[which]()


def of_weight_map(inputs: Path, draw: random.Random) -> list[Mutation]:
    """Changes inside an index's table of shards."""
    file = f"{MODEL}.index.json"
    index = json.loads((inputs / "shards" / file).read_text())
    shards = sorted(set(index["weight_map"].values()))
    values = ["../base/model.safetensors", "/etc/passwd", "", ".", 7, None, ["x"], "gone.safetensors", "a\\0b", *shards]
    found = []
    for value in values:
        name = draw.choice(list(index["weight_map"]))
        if index["weight_map"][name] != value:
            content = {**index, "weight_map": {**index["weight_map"], name: value}}
            found.append(Mutation(f"{name} in {value!r}", file, lambda path, c=content: path.write_text(json.dumps(c))))
    return found


EXPECTED = {"base": 80, "full": 80, "shards": 55, "bin": 20, "lightning": 25, "adapter": 100, "stored": 80}


@pytest.mark.attacks
@pytest.mark.parametrize("which", EXPECTED)
def test_damage_is_told_or_does_no_harm(which, inputs, tmp_path):
    base, model = inputs / "base", inputs / ("full" if which == "base" else which)
    assert merge(base, model / ("." if which == "base" else PATHS.get(which, ".")), tmp_path / "out")[0] == 0
    written = load_file(tmp_path / "out" / (ADAPTER if which == "adapter" else MODEL))
    shapes = {name: value.shape for name, value in written.items()}
    tried = mutations_of(which, inputs)
    assert len(tried) >= EXPECTED[which], "fewer mutations than are promised"
    faults = {m.name: fault for m in tried if (fault := fault_of(m, which, inputs, tmp_path, shapes)) is not None}
    assert not faults, f"{len(faults)} of {len(tried)}:\n" + "\n".join(f"{k}: {v}" for k, v in faults.items())


INDEX = f"{MODEL}.index.json"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
WEIGHT_MAPS = {  # what becomes of an index's table of shards, and the message
    "parent": (
        lambda shards: {**shards, QUERY: "../base/model.safetensors"},
        f"expected the names of files beside it in weight_map, got '../base/model.safetensors' for {QUERY}.",
    ),
    "absolute": (lambda shards: {**shards, QUERY: "/etc/passwd"}, f"got '/etc/passwd' for {QUERY}."),
    "folder": (lambda shards: {**shards, QUERY: "sub/x.safetensors"}, f"got 'sub/x.safetensors' for {QUERY}."),
    "windows": (lambda shards: {**shards, QUERY: "..\\x.safetensors"}, f"got '..\\\\x.safetensors' for {QUERY}."),
    "null byte": (lambda shards: {**shards, QUERY: "a\0b"}, f"got 'a\\x00b' for {QUERY}."),
    "number": (lambda shards: {**shards, QUERY: 7}, f"got 7 for {QUERY}."),
    "gone": (lambda shards: {**shards, QUERY: "x.safetensors"}, "names files that are not there: x.safetensors."),
    "list": (lambda shards: list(shards), "weight_map must name the shard of each parameter, got ['"),
    "empty": (lambda shards: {}, "weight_map must name the shard of each parameter, got {}."),
    "elsewhere": (
        lambda shards: {**shards, QUERY: next(shard for shard in shards.values() if shard != shards[QUERY])},
        f"lists {QUERY} in model-",
    ),
    "unknown": (lambda shards: {**shards, "more": shards[QUERY]}, "lists more in model-"),
}


@pytest.mark.parametrize("case", WEIGHT_MAPS)
def test_an_index_names_its_own_shards(case, inputs, tmp_path):
    change, message = WEIGHT_MAPS[case]
    shutil.copytree(inputs / "shards", tmp_path / "x")
    (tmp_path / "x" / "sub").mkdir()
    shutil.copy(inputs / "full" / MODEL, tmp_path / "x" / "sub" / "x.safetensors")
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    (tmp_path / "x" / INDEX).write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))
    code, said = merge(inputs / "base", tmp_path / "x", tmp_path / "out")
    assert (code, str(tmp_path / "x" / INDEX) in said, message in said) == (2, True, True), said


def test_a_parameter_in_two_shards(inputs, tmp_path):
    shutil.copytree(inputs / "shards", tmp_path / "x")
    first, second, *_ = sorted((tmp_path / "x").glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.ones(2)}, second)
    code, said = merge(inputs / "base", tmp_path / "x", tmp_path / "out")
    assert code == 2
    assert f"{second} holds {name}, which {first.name} holds, too." in said


def test_shards_that_are_links_of_the_hubs_cache(inputs, tmp_path):
    """Its snapshots hold links to files of other names in another folder."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((inputs / "shards").iterdir())):
        shutil.copy(file, blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064}"))
    assert merge(inputs / "base", snapshot, tmp_path / "out") == (0, "")
    assert merge(inputs / "base", inputs / "shards", tmp_path / "plain") == (0, "")
    linked, plain = (load_file(tmp_path / name / MODEL) for name in ("out", "plain"))
    assert all(torch.equal(linked[name], value) for name, value in plain.items())


CONFIGS = {  # what config.json becomes, and the message
    "list": ("[]", "config.json should hold a JSON object, but holds []."),
    "twice": ('{"model_type": "bert", "model_type": "gpt2"}', "config.json gives the field 'model_type' twice."),
    "cut": ('{"model_type": "be', "config.json is not JSON that can be read: "),
    "deep": ('{"a":' * 100_000, "config.json is not JSON that can be read: "),
    "digits": ('{"a": ' + "9" * 10_000 + "}", "config.json is not JSON that can be read: "),
    "kind": ('{"model_type": 7}', "config.json: expected text for model_type, got 7."),
    "class": (
        '{"model_type": "bert", "architectures": "x"}',
        "config.json: expected a list for architectures, got 'x'.",
    ),
    "width": ('{"model_type": "bert", "hidden_size": "x"}', "config.json does not describe a bert model: "),
    "heads": ('{"model_type": "bert", "num_attention_heads": 0}', "config.json does not describe a bert model: "),
    "layers": (
        '{"model_type": "bert", "num_hidden_layers": 900000, "hidden_size": 8, "num_attention_heads": 2}',
        "config.json does not describe a bert model: ValueError: it would have more than 1",
    ),
    "labels": (
        '{"model_type": "bert", "num_labels": 1000000000}',
        "config.json: expected at most 1,000,000 for num_labels, got 1000000000.",
    ),
    "quantized": ('{"quantization_config": "x"}', "config.json: expected an object for quantization_config, got 'x'."),
}


@pytest.mark.parametrize("which", ["base", "full"])
@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case, which, inputs, tmp_path):
    text, message = CONFIGS[case]
    shutil.copytree(inputs / which, tmp_path / which)
    (tmp_path / which / "config.json").write_text(text)
    other = inputs / ("full" if which == "base" else "base")
    pair = (tmp_path / which, other) if which == "base" else (other, tmp_path / which)
    code, said = merge(*pair, tmp_path / "out")
    assert (code, message in said) == (2, True), said


def test_a_pickle_that_counts_to_four_billion(inputs, tmp_path):
    """The number of an object may be any; Python's own unpickler would make a list of that length, 64 GB long."""
    shutil.copytree(inputs / "lightning", tmp_path / "x")
    content = pickle.dumps({"state_dict": {QUERY: torch.nn.Module}}, 2)
    bomb = content.replace(b"X\x0a\x00\x00\x00state_dict", b"X\x0a\x00\x00\x00state_dictr\xff\xff\xff\xff", 1)
    assert bomb != content
    with zipfile.ZipFile(tmp_path / "x" / "last.ckpt") as old, zipfile.ZipFile(tmp_path / "x" / "new.ckpt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, bomb if entry.filename.endswith("data.pkl") else old.read(entry))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, limits[1]))
    try:
        code, said = merge(inputs / "base", tmp_path / "x" / "new.ckpt", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (code, "new.ckpt holds no tensors by name" in said) == (2, True), said


def test_a_checkpoint_that_holds_itself(inputs, tmp_path):
    state = {"m.lora_A.default.weight": torch.ones(1, 1), "m.lora_B.default.weight": torch.ones(1, 1)}
    hyperparameters: dict[str, object] = {"deep": []}
    hyperparameters["self"] = hyperparameters
    for _ in range(200):
        hyperparameters["deep"] = [hyperparameters["deep"]]
    torch.save({"state_dict": state, "hyper_parameters": hyperparameters}, tmp_path / "x.ckpt")
    code, said = merge(inputs / "base", tmp_path / "x.ckpt", tmp_path / "out")
    assert (code, "x.ckpt holds LoRA layers, but its hyper-parameters hold no LoraConfig" in said) == (2, True), said


def test_objects_beside_tensors_are_told_once(inputs, tmp_path):
    main(["merge", "--base", str(inputs / "base"), "--models.x", str(inputs / "lightning" / "last.ckpt"),
          "--output", str(tmp_path / "out"), "--drm.method", "Average"])  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("x: its file holds objects other than tensors (") == 1
    assert "LoraConfig" in card
    assert "which are ignored and not run." in card


STORED = {  # what is done to a task's folder, and the message
    "head": (
        lambda folder: (folder / "head.safetensors").write_bytes(b"x" * 50),
        "head.safetensors does not hold a head: it is damaged or no safetensors file",
    ),
    "cut": (
        lambda folder: (folder / "deltas.safetensors").write_bytes((folder / "deltas.safetensors").read_bytes()[:-5]),
        "deltas.safetensors does not hold deltas: it is damaged or no safetensors file",
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_stored_deltas(case, inputs, tmp_path):
    change, message = STORED[case]
    shutil.copytree(inputs / "stored", tmp_path / "run")
    change(tmp_path / "run" / "tasks" / "x")
    code, said = merge(inputs / "base", tmp_path / "run", tmp_path / "out")
    assert (code, message in said) == (2, True), said


@pytest.mark.parametrize("piece", [16 << 20, 64])
def test_a_flipped_bit_of_a_stored_delta_is_named(piece, inputs, tmp_path, monkeypatch):
    """Any bit of any value, read whole or in pieces; two equal flips, too, which an exclusive or would not show."""
    monkeypatch.setattr(hashed_file, "_PIECE", piece)
    file = tmp_path / "run" / DELTAS
    shutil.copytree(inputs / "stored", tmp_path / "run")
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    for _ in range(12):
        damaged, bit = bytearray(whole), 1 << draw.randrange(8)
        at = start + 4 * draw.randrange((len(whole) - start) // 4 - 1)
        for place in draw.choice([(at,), (at, at + 4)]):
            damaged[place] ^= bit
        file.write_bytes(damaged)
        code, said = merge(inputs / "base", tmp_path / "run", tmp_path / "out")
        assert code == 2
        assert re.search(rf"{file} is damaged: the values of \S+ of task 'x' are not those that were written", said), (
            said
        )
    file.write_bytes(whole)
    assert merge(inputs / "base", tmp_path / "run", tmp_path / "out") == (0, "")


def test_stored_deltas_without_hashes_are_read(inputs, tmp_path):
    """As older versions wrote them."""
    shutil.copytree(inputs / "stored", tmp_path / "run")
    for file in (tmp_path / "run" / "tasks" / "x").iterdir():
        with safe_open(file, framework="pt") as stored:
            metadata = {name: value for name, value in stored.metadata().items() if name != "tensor_hashes"}
        save_file(load_file(file), file, metadata)
    for name, run in (("old", tmp_path / "run"), ("new", inputs / "stored")):
        assert merge(inputs / "base", run, tmp_path / name) == (0, "")
    old, new = (load_file(tmp_path / name / MODEL) for name in ("old", "new"))
    assert all(torch.equal(old[name], value) for name, value in new.items())
