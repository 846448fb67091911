"""Two processes under DDP: adapters on a quantized base are merged by both, and a compiled backbone changes no name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed.conftest import Launch
from distributed.training_forms import TASKS, Counting, save_base
from lightning_drm import DRM, MergeSession

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.processes

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def left(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    save_base(folder)
    launch([HERE / "training_forms.py", folder], 2)
    return folder


def test_both_ranks_merge_what_one_process_does(left: Path):
    run = left / "quantized"
    together = load_file(run / "merged" / "adapter_model.safetensors")
    assert len(together) == 6
    session = MergeSession(list(TASKS), DRM(density=0.5), run)
    session.note_base(Counting(left / "base"))
    assert session.restore() == list(TASKS)
    session.fuse(module=Counting(left / "base"))
    alone = load_file(run / "merged" / "adapter_model.safetensors")
    assert alone.keys() == together.keys()
    for name in {name.partition(".lora_")[0] for name in alone}:
        ours, theirs = (
            found[f"{name}.lora_B.weight"].double() @ found[f"{name}.lora_A.weight"].double()
            for found in (together, alone)
        )
        assert float(theirs.abs().max()) > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("file", ["tasks/a/deltas", "tasks/a/head", "merged/model"])
def test_a_compiled_backbone_leaves_the_same_files(left: Path, file: str):
    ours, theirs = (load_file(left / name / f"{file}.safetensors") for name in ("compiled", "plain"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-7)
