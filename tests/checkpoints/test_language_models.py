"""Finetunes of language models merged from their folders, against the merge of the run that made them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_language import save_tiny_llama, save_tiny_t5
from lightning_drm import DRM, MergeSession, TransformerTask, merge_checkpoints
from lightning_drm.kinds import Kind, Language, SequenceToSequence

CASES = {
    "t5": (save_tiny_t5, SequenceToSequence(), {}),
    "llama": (save_tiny_llama, Language(), {}),
    "llama_tied": (save_tiny_llama, Language(), {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_both_doors_lead_to_the_same_weights(name: str, tmp_path: Path):
    save, kind, settings = CASES[name]
    base, method = save(tmp_path / "base", **settings), DRM(density=0.4)
    session = MergeSession(["a", "b"], method, tmp_path / "run")
    folders = {}
    for seed, task in enumerate(session.tasks, 1):
        module = finetuned(base, kind, session, seed)
        session.collect(module, task)
        module.backbone.save_pretrained(tmp_path / task)
        folders[task] = str(tmp_path / task)
    session.fuse()
    merge_checkpoints(base, folders, tmp_path / "out", method)
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "run/merged"))
    assert ours.keys() == theirs.keys() == load_file(Path(base) / "model.safetensors").keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-7, msg=key)


def finetuned(base: str, kind: Kind, session: MergeSession, seed: int) -> TransformerTask:
    """A finetune that no training made."""
    module = TransformerTask(base, num_classes=0, kind=kind)
    session.note_base(module)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module
