"""Folders that litgpt wrote (`litgpt/make.py` says how): read under the names of transformers, merged, and refused."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_drm import DRM, Average, merge_checkpoints
from lightning_drm.checkpoints.reading import open_base, open_input

WRITTEN = Path(__file__).parent / "litgpt"
KINDS = ["llama", "pythia"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN / "llama", tmp_path / "llama"))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "model_config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    content = torch.load(folder / "lit_model.pth")
    change(content.get("model", content))
    torch.save(content, folder / "lit_model.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_the_model_that_litgpt_converted(kind):
    base, source = open_base(str(WRITTEN / kind / "base")), load_file(WRITTEN / kind / "transformers/model.safetensors")
    assert {name: header.shape for name, header in base.tensors.headers.items()} == {
        name: tuple(tensor.shape) for name, tensor in source.items()
    }
    assert all(torch.equal(base.tensors.read(name), tensor) for name, tensor in source.items())


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_finetune_is_what_litgpt_converts_it_to(kind, finetune):
    folder = WRITTEN / kind / finetune
    expected = load_file(folder / "expected.safetensors")
    for path in (folder, folder / "lit_model.pth"):
        found = open_input(str(path), "a")
        assert found.entries.keys() == expected.keys()
        assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("base", ["base", "transformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_beside_either_base_gives_a_transformers_folder(kind, base, tmp_path):
    folder = WRITTEN / kind
    finetunes = {task: folder / task for task in ("full", "lora")}
    result = merge_checkpoints(folder / base, finetunes, tmp_path / "out", Average())
    assert any("litgpt convert_to_litgpt" in note for note in result.notes) == (base == "base")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    parts = [load_file(finetune / "expected.safetensors") for finetune in finetunes.values()]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == parts[0].keys()
    for name, tensor in merged.items():
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_queries_keys_and_values_are_merged_as_three_matrices(tmp_path):
    """As from the folders that transformers would have: a joint basis of the stacked weight would be another one."""
    folder = WRITTEN / "llama"
    finetunes = {task: folder / task for task in ("full", "lora")}
    converted = {}
    for task, finetune in finetunes.items():
        converted[task] = tmp_path / task
        shutil.copytree(folder / "transformers", converted[task])
        save_file(load_file(finetune / "expected.safetensors"), converted[task] / "model.safetensors")
    merge_checkpoints(folder / "base", finetunes, tmp_path / "out", DRM(density=0.5))
    merge_checkpoints(folder / "transformers", converted, tmp_path / "expected", DRM(density=0.5))
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_without_a_config_json(llama, tmp_path):
    """As litgpt leaves a model that it has pretrained itself."""
    for file in llama.rglob("config.json"):
        file.unlink()
    finetunes = {task: llama / task for task in ("full", "lora")}
    merge_checkpoints(llama / "base", finetunes, tmp_path / "out", DRM(density=0.5))
    merge_checkpoints(
        WRITTEN / "llama" / "base", {t: WRITTEN / "llama" / t for t in finetunes}, tmp_path / "same", DRM(density=0.5)
    )
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "same"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_of_a_step_with_its_optimizer(llama):
    content = torch.load(llama / "full" / "lit_model.pth")
    torch.save({**content, "optimizer": {"state": {0: torch.ones(2)}}, "step_count": 3}, llama / "full/lit_model.pth")
    expected = load_file(llama / "full" / "expected.safetensors")
    found = open_input(str(llama / "full"), "a")
    assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())


def test_embeddings_that_litgpt_has_untied(llama, tmp_path):
    """litgpt trains both weights of a tied model on their own. Nothing is lost as long as they are the same."""

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]

    config = AutoConfig.from_pretrained(llama / "transformers", tie_word_embeddings=True)
    base = AutoModelForCausalLM.from_config(config)
    source = load_file(llama / "transformers" / "model.safetensors")
    base.load_state_dict(source | {"lm_head.weight": source["model.embed_tokens.weight"]})
    base.save_pretrained(llama / "tied")
    edit_weights(llama / "full", tie)
    merge_checkpoints(llama / "tied", {"a": llama / "full"}, tmp_path / "out", Average())
    merged = load_file(tmp_path / "out" / "model.safetensors")
    finetuned = torch.load(llama / "full" / "lit_model.pth")["model"]
    assert "lm_head.weight" not in merged
    torch.testing.assert_close(merged["model.embed_tokens.weight"], finetuned["transformer.wte.weight"])

    edit_weights(llama / "full", lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 0.01}))
    with pytest.raises(ValueError, match=r"a: lm_head.weight and model.embed_tokens.weight differ, but the base ties"):
        merge_checkpoints(llama / "tied", {"a": llama / "full"}, tmp_path / "other", Average())


REFUSED = {  # what is done to the finetune's folder, and the message
    "only_lora": (
        lambda f: shutil.move(f / "lit_model.pth", f / "lit_model.pth.lora"),
        r"has lit_model.pth.lora, but no lit_model.pth: .*`litgpt merge_lora` for LoRA",
    ),
    "no_config": (lambda f: (f / "model_config.yaml").unlink(), r"has a lit_model.pth, but no model_config.yaml"),
    "no_yaml": (
        lambda f: (f / "model_config.yaml").write_text("name: [a"),
        r"model_config.yaml is not YAML that can be read: while parsing",
    ),
    "no_text": (lambda f: (f / "model_config.yaml").write_bytes(b"\xff\xfe\xfa"), r"is not YAML that can be read"),
    "no_fields": (lambda f: (f / "model_config.yaml").write_text("7"), r"should hold fields by name, but holds 7"),
    "field": (lambda f: edit_config(f, n_head="x"), r"expected a whole number for n_head, got 'x'"),
    "heads": (
        lambda f: edit_config(f, n_head=8),
        r"n_head 8, n_query_groups 2 and head_size 2 do not fit attn.qkv, which has 16 rows",
    ),
    "no_heads": (lambda f: edit_config(f, head_size=0), r"head_size 0 do not fit attn.qkv"),
    "phi": (
        lambda f: edit_config(f, name="Phi-3-mini-4k-instruct"),
        r"of the kind 'Phi-3-mini-4k-instruct' with 'LLaMAMLP', which is not known here. .*convert_from_litgpt",
    ),
    "experts": (lambda f: edit_config(f, mlp_class_name="LLaMAMoE"), r"with 'LLaMAMoE', which is not known here"),
    "falcon": (
        lambda f: edit_config(f, name="falcon-7b", mlp_class_name="GptNeoxMLP"),
        r"of the kind 'falcon-7b' with 'GptNeoxMLP', which is not known here",
    ),
    "old_layout": (
        lambda f: edit_weights(f, lambda t: t.update({"transformer.h.0.attn.attn.weight": torch.ones(16, 8)})),
        r"and has transformer.h.0.attn.attn.weight, which is not known here",
    ),
    "quantized": (
        lambda f: edit_weights(f, lambda t: t.update({"transformer.h.0.mlp.proj.weight.absmax": torch.ones(2)})),
        r"is quantized \(found transformer.h.0.mlp.proj.weight.absmax\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, llama):
    damage, message = REFUSED[case]
    damage(llama / "full")
    with pytest.raises(ValueError, match=message):
        open_input(str(llama / "full"), "a")
