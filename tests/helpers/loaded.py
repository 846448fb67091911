"""Whether a merged model that is loaded from its folder is the one that was merged."""

from pathlib import Path

import torch

from lightning_drm import MultiTaskDataModule, MultiTaskModule, load_merged


def assert_loads(folder: Path, data: MultiTaskDataModule, merged: MultiTaskModule) -> None:
    """Compares the logits of each task's first test batch, which must be the same numbers."""
    for task, own in data.tasks.items():
        batch = next(iter(own.test_dataloader()))
        loaded, expected = load_merged(folder, task), merged.task_module(task).eval()
        with torch.no_grad():
            ours, theirs = loaded.classify(batch)[0], expected.classify(batch)[0]
        assert torch.equal(ours, theirs), task
        assert loaded.class_names == getattr(own, "class_names", None)
        assert not loaded.training
