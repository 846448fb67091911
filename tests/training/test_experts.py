"""Mixtures of experts in a session: every expert of the merged module is merged alone, sharded or not."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import experts, reference
from helpers.ranks import end_codes, start_ranks
from lightning_drm import WUDI, MergeSession, RegMean
from lightning_drm.fusion import Override
from training.expert_cases import TASKS, check, sharded

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


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_statistics_of_each_expert(name: str, tmp_path: Path) -> None:
    """RegMean by its formula on each expert alone, whose inputs are taken token by token; WUDI on its input side."""
    base, batches = experts.base_model(name).float(), {task: experts.tokens(n) for n, task in enumerate(TASKS)}
    session = MergeSession(TASKS, RegMean(), tmp_path, head=[])
    deltas, grams = [], []
    for seed, task in enumerate(TASKS, 1):
        module = experts.Reads(copy.deepcopy(base))
        session.note_base(module)
        tuned = experts.train(module, seed).model
        session.collect(module, task)
        session.collect_statistics(module, task, [batches[task]], ["gram"])
        deltas.append(experts.deltas_of(tuned, base))
        grams.append(experts.gram_matrices_by_hand(tuned, batches[task]))
    merged = session.fuse().task_module("a")
    drawn = session.fuse(method=WUDI()).task_module("a")
    start = dict(base.named_parameters())
    stored_in_out = name == "gpt_oss"
    for weight in (weight for weight in start if experts.is_experts(weight)):
        for index in range(experts.NUM_EXPERTS):
            own = [delta[weight][index].double() for delta in deltas]
            own = [delta.T for delta in own] if stored_in_out else own
            expected = regression_mean(own, [gram[weight][index] for gram in grams])
            for module, delta in ((merged, expected), (drawn, reference.wudi(own))):
                found = (module.get_parameter(f"model.{weight}")[index] - start[weight][index]).detach().double()
                torch.testing.assert_close(found.T if stored_in_out else found, delta, rtol=1e-3, atol=1e-5)


def regression_mean(deltas: list[Tensor], grams: list[Tensor], alpha: float = 0.95) -> Tensor:
    shrunk = [alpha * gram + (1 - alpha) * torch.diag(torch.diag(gram)) for gram in grams]
    mean = sum(deltas) / len(deltas)
    missed = sum((delta - mean) @ gram for delta, gram in zip(deltas, shrunk, strict=True))
    return mean + missed @ torch.linalg.pinv(sum(shrunk), rtol=1e-9)


@pytest.mark.processes
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_ranks_that_shard_experts(name: str, lora: bool, tmp_path: Path) -> None:
    codes = end_codes(start_ranks(sharded, 2, tmp_path, name, lora, tmp_path), PATIENCE)
    errors = "".join((tmp_path / f"{rank}.err").read_text()[-2000:] for rank in range(2))
    assert codes == [0, 0], errors
    assert all((tmp_path / f"{rank}.right").exists() for rank in range(2)), errors
