"""RegMean++: inputs of each block come through the merged blocks before it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.vectors_run import TASKS, ValidatedTask, VectorsRun
from lightning_drm import DRM, SVC, Average, LiNeS, MergeSession, RegMean
from lightning_drm.deltas import Collected
from lightning_drm.fusion import Recipe
from lightning_drm.training.propagation import propagated

GOLDEN = Path(__file__).parents[1] / "merging" / "conformance"
CASE = json.loads((GOLDEN / "index_2.json").read_text())["case_204"]
PARTS = ("weight1", "bias1", "weight2", "bias2")


class Block(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(columns, rows), nn.Linear(rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(torch.tanh(self.one(x))))


class Network(nn.Module):
    """The network of the golden case."""

    head_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(CASE["rows"], CASE["cols"]) for _ in range(CASE["blocks"])))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def tensors(self, block: int) -> dict[str, Tensor]:
        own = self.blocks[block]
        return dict(zip(PARTS, (own.one.weight, own.one.bias, own.two.weight, own.two.bias), strict=True))


@pytest.mark.parametrize("name", ["regmean", "regmean_pp"])
def test_golden_network(name: str):
    golden, tasks = load_file(GOLDEN / "case_204.safetensors"), [f"t{t}" for t in range(CASE["num_tasks"])]
    session, finetuned = MergeSession(tasks, RegMean(CASE["regmean_alpha"])), {}
    inputs = {task: [(golden[f"inputs.{t}"], golden[f"inputs.{t}"][:, 0])] for t, task in enumerate(tasks)}
    for t, task in enumerate(tasks):
        module = Network()
        session.note_base(module)
        for block in range(CASE["blocks"]):
            for part, tensor in module.tensors(block).items():
                tensor.data.copy_(golden[f"block.{block}.{part}.{t}"])
        session.collect(module, task)
        session.collect_statistics(module, task, inputs[task])
        finetuned[task] = module
    vectors = None
    if name == "regmean_pp":
        session = copy.copy(session)
        session.recipe = Recipe(RegMean(CASE["regmean_alpha"], propagate=True))
        vectors = propagated(session, session.recipe, Network(), finetuned, inputs, Collected())
    merged = session.fuse(vectors=vectors).task_module("t0")
    for block in range(CASE["blocks"]):
        for part, tensor in merged.tensors(block).items():
            expected = golden[f"{name}.{block}.{part}"]
            # Statistics are kept in float32.
            assert torch.linalg.norm(tensor - expected) <= 1e-6 * torch.linalg.norm(expected), (block, part)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> VectorsRun:
    run = VectorsRun(tmp_path_factory.mktemp("propagated") / "run")
    run.fit()
    return run


def by_hand(run: VectorsRun, alpha: float) -> dict[str, Tensor]:
    """The three stages of `VectorTask`'s network with deltas: linear, norm, linear; in float64."""
    deltas = [load_file(run.folder / "tasks" / task / "deltas.safetensors") for task in TASKS]
    base = {name: tensor.detach().double() for name, tensor in ValidatedTask().named_parameters()}
    merged: dict[str, Tensor] = {}
    inputs = [run.data.tasks[task].train.tensors[0].double() for task in TASKS]

    def regression(name: str, rows: list[Tensor]) -> Tensor:
        grams = [x.T @ x / len(x) for x in rows]
        shrunk = [alpha * g + (1 - alpha) * torch.diag(g.diagonal()) for g in grams]
        met = sum(d[name].double() @ g for d, g in zip(deltas, shrunk, strict=True))
        return base[name] + met @ torch.linalg.inv(sum(shrunk))

    for name in base:
        if name.startswith("backbone"):
            merged[name] = base[name] + sum(d[name].double() for d in deltas) / 3
    first, last = "backbone.0.weight", "backbone.3.weight"
    merged[first] = regression(first, inputs)
    through = [x @ merged[first].T + merged["backbone.0.bias"] for x in inputs]
    normed = [
        nn.functional.layer_norm(x, (8,), merged["backbone.1.weight"], merged["backbone.1.bias"]).tanh()
        for x in through
    ]
    merged[last] = regression(last, normed)
    return merged


def test_a_merge_by_command_takes_the_inputs_from_the_merged_model(run: VectorsRun, capsys: pytest.CaptureFixture[str]):
    run.merge(RegMean(0.9, propagate=True))
    assert "Statistics of 256 samples of each task, block by block" in capsys.readouterr().out
    merged = load_file(run.folder / "merged" / "model.safetensors")
    for name, expected in by_hand(run, 0.9).items():
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-4, atol=1e-6)
    run.trainer(RegMean(0.9)).collect(ValidatedTask(), run.data)
    run.merge(RegMean(0.9))
    plain = load_file(run.folder / "merged" / "model.safetensors")
    assert torch.equal(plain["backbone.0.weight"], merged["backbone.0.weight"]), "nothing comes before the first block"
    assert not torch.allclose(plain["backbone.3.weight"], merged["backbone.3.weight"], rtol=1e-4)


def test_it_takes_as_many_samples_as_are_asked_for(run: VectorsRun, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="statistics_samples is 8, but RegMean asks for statistics of 256 samples"):
        run.trainer(RegMean(propagate=True), statistics_samples=8)
    run.merge(RegMean(num_samples=8, propagate=True))
    assert "Statistics of 8 samples of each task" in capsys.readouterr().out


def test_compare_scores_it_as_merge_does(run: VectorsRun):
    method = RegMean(0.9, propagate=True)
    found = run.compare(method, SVC(method), Average(), split="test")
    run.merge(method)
    scores = run.report()["scores"]["merged"]
    assert found["RegMean, alpha 0.9, propagate"]["scores"] == pytest.approx(scores)
    assert "SVC of RegMean, alpha 0.9, propagate" in found


def test_where_there_are_no_data_it_is_refused(run: VectorsRun):
    message = "RegMean with propagate takes the inputs of each block from the merge itself, which needs the tasks' data"
    session = MergeSession(["one"], RegMean(propagate=True))
    module = Network()
    session.note_base(module)
    session.collect(module, "one")
    with pytest.raises(ValueError, match=message):
        session.fuse()
    with pytest.raises(ValueError, match=message):
        run.trainer(RegMean(propagate=True)).tune(ValidatedTask(), run.data)
    with pytest.raises(ValueError, match="method must not have propagate"):
        LiNeS(RegMean(propagate=True))


def test_a_fit_with_it_collects_nothing_before(tmp_path: Path):
    run = VectorsRun(tmp_path / "run")
    run.trainer(RegMean(propagate=True)).fit(ValidatedTask(), datamodule=run.data)
    assert not list(run.folder.rglob("statistics.safetensors"))
    assert run.report()["method"]["init_args"]["propagate"] is True
    run.merge(DRM())
