"""Mixtures of experts in a session: every expert of the merged module is merged alone, sharded or not."""

import copy
from pathlib import Path

import pytest
from helpers import experts
from helpers.ranks import end_codes, start_ranks
from torch import nn
from training.expert_cases import TASKS, check, sharded

from lightning_drm import MergeSession
from lightning_drm.fusion import Override

PATIENCE = 120.0


class Holder(nn.Module):
    """A model in a module of one's own, as a LightningModule would have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("store", [None, "disk"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", experts.MODELS)
def test_each_expert_is_merged_alone(name: str, lora: bool, store: str | None, tmp_path: Path) -> None:
    base = experts.base_model(name)
    folder = {"dirpath": tmp_path, "store": store} if store else {}
    session = MergeSession(TASKS, experts.METHOD, **folder, head=[])
    tuned = []
    for seed, task in enumerate(TASKS, 1):
        module = Holder(experts.with_lora(base) if lora else copy.deepcopy(base))
        session.note_base(module)
        tuned.append(experts.train(module, seed).model)
        session.collect(module, task)
    merged = session.fuse().task_module("a")
    check(merged, base, tuned, *((1e-5, 1e-7) if lora else (1e-12, 0.0)))
    if store:
        card = (tmp_path / "merged" / "README.md").read_text()
        rows, columns = base.model.layers[0].mlp.experts.gate_up_proj.shape[1:]
        assert f"- 3 experts of ({rows}, {columns}), in 2 parameters: method, one expert after another" in card
        assert lora or "- output embeddings, in 1 parameter: average" in card


def test_output_embeddings_are_merged_by_the_method_where_that_is_asked_for() -> None:
    base = experts.base_model("mixtral")
    overrides = [Override("lm_head.weight", rule="method")]
    session = MergeSession(TASKS, experts.METHOD, head=[], overrides=overrides)
    tuned = []
    for seed, task in enumerate(TASKS, 1):
        module = copy.deepcopy(base)
        session.note_base(module)
        tuned.append(experts.train(module, seed))
        session.collect(module, task)
    merged = session.fuse().task_module("a")
    deltas = [experts.deltas_of(model, base)["lm_head.weight"] for model in tuned]
    experts.assert_merged((merged.lm_head.weight - base.lm_head.weight).detach(), deltas, 1e-12)


@pytest.mark.processes
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_ranks_that_shard_experts(name: str, lora: bool, tmp_path: Path) -> None:
    codes = end_codes(start_ranks(sharded, 2, tmp_path, name, lora, tmp_path), PATIENCE)
    errors = "".join((tmp_path / f"{rank}.err").read_text()[-2000:] for rank in range(2))
    assert codes == [0, 0], errors
    assert all((tmp_path / f"{rank}.right").exists() for rank in range(2)), errors
